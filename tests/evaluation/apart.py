"""`speckd evaluate` several times in processes of their own, each killed within a line after so many batches.

python -m tests.evaluation.apart KILLED_AFTER=CONFIG...

One process imports everything and forks: that costs a second a kill, and not ten.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from speckd.cli import main
from speckd.evaluation import command, journal


def die_within_batch(number_alive: int) -> None:
    """SIGKILL when half of the next batch is on the disk."""
    append, written = journal._append, []

    def append_or_die(path: Path, data: bytes) -> None:
        if len(written) >= number_alive:
            append(path, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(path, data)
        written.append(path)

    journal._append = append_or_die


def killed(number_alive: int, config: str) -> bool:
    """Was it SIGKILL that ended it?"""
    child = os.fork()
    if not child:
        die_within_batch(number_alive)
        os._exit(main(["evaluate", "--config", config]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert command.KINDS
    sys.exit(0 if all(killed(int(n), path) for n, path in (word.split("=", 1) for word in sys.argv[1:])) else 1)
