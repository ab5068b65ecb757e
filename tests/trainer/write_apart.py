"""`speckd write` in a process of its own, in small parts; killed within the part after so many, where that is asked for.

python -m tests.trainer.write_apart KILLED_AFTER ARGUMENTS...
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from speckd import write
from speckd.cli import main
from speckd.parts import Parts
from speckd.teachers import files


def die_within_part(number_alive: int) -> None:
    """SIGKILL when half of the next part is on the disk."""
    put, written = Parts.write, []

    def put_or_die(self: Parts, number: int, records: Sequence[Mapping[str, Any]]) -> None:
        if len(written) >= number_alive:
            write_all = files._write_all

            def half(own: Any, descriptor: int, data: bytes) -> None:
                write_all(own, descriptor, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

            files._write_all = half
        put(self, number, records)
        written.append(number)

    Parts.write = put_or_die  # type: ignore[method-assign]


if __name__ == "__main__":
    write.PART_COMPLETIONS = 4
    if (alive := int(sys.argv[1])) >= 0:
        die_within_part(alive)
    sys.exit(main(["write", *sys.argv[2:]]))
