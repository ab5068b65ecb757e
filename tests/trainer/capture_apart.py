"""`speckd cache` in a process of its own: in small shards, and killed after some of them where that is asked for.

python -m tests.trainer.capture_apart KILLED_AFTER ARGUMENTS...
"""

import os
import signal
import sys
from collections.abc import Iterable
from typing import Any

from speckd import capture
from speckd.cli import main
from speckd.teachers.store import StoreWriter


def die_within_shard(number_alive: int) -> None:
    """SIGKILL in the middle of the shard after so many."""
    write, written = StoreWriter.write, []

    def write_or_die(self: StoreWriter, number: int, entries: Iterable[Any]) -> None:
        def cut() -> Iterable[Any]:
            for place, entry in enumerate(entries):
                if len(written) >= number_alive and place == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield entry

        write(self, number, cut())
        written.append(number)

    StoreWriter.write = write_or_die  # type: ignore[method-assign]


if __name__ == "__main__":
    capture.SHARD_ANSWERS = 60
    if (alive := int(sys.argv[1])) >= 0:
        die_within_shard(alive)
    sys.exit(main(["cache", *sys.argv[2:]]))
