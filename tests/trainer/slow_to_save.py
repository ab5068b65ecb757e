"""`speckd train` in one of several processes, of which the first takes a second to save."""

import os
import sys
import time
from typing import Any

from speckd.cli import main
from speckd.trainer import SpecKDTrainer

if __name__ == "__main__":
    save = SpecKDTrainer._save_optimizer_and_scheduler

    def slowly(self: SpecKDTrainer, *given: Any) -> None:
        time.sleep(os.environ["RANK"] == "0")
        save(self, *given)

    SpecKDTrainer._save_optimizer_and_scheduler = slowly  # type: ignore[method-assign]
    sys.exit(main(["train", *sys.argv[1:]]))
