"""What a program may use in the box, and what comes back for each call."""

from dataclasses import dataclass
from typing import Any, Literal

from speckd.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Limits of one run: a program and all its calls together.

    Args:
        wall_s: seconds by the clock, from the start of the box; then everything in it is killed.
        cpu_s: seconds of CPU, whole ones.
        memory_mb: address space of the one process, MiB.
        threads: threads at a time, of all that the box starts (a few are its own).
        file_mb: the largest file, MiB.
        open_files: open files at a time.
        scratch_mb: size of /tmp inside, MiB. It lives in memory and goes with the box.
        inodes: files that /tmp holds.
        output_bytes: what is read of the answers, in bytes; above it the box is ended.
    """

    wall_s: float = 10.0
    cpu_s: int = 5
    memory_mb: int = 512
    threads: int = 32
    file_mb: int = 1
    open_files: int = 64
    scratch_mb: int = 64
    inodes: int = 1024
    output_bytes: int = 256 << 10

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"The box's {name} is {value}", "Give a number above 0.")


@dataclass(frozen=True)
class Outcome:
    """What became of one call.

    Args:
        kind: `value`, the call returned a plain value; `error`, it raised, or returned something else than plain values;
            `timeout`, time was over before it answered; `died`, the process ended before it answered.
        value: int, float, bool, str, None, list, tuple, dict, set, frozenset, bytes or complex, built of exactly these types.
            None unless `kind` is `value`.
        detail: why there is no value, in words; what the program itself says is in it, shortened.
    """

    kind: Literal["value", "error", "timeout", "died"]
    value: Any = None
    detail: str = ""
