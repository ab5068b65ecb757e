"""A disk that fails: at its k-th operation, once or from then on, in the way that is asked for."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from speckd.errors import StoreError
from speckd.teachers.files import Files


def refusal(action: Callable[[], object]) -> StoreError | None:
    """The error that it ends with, None if it does not; any other comes through."""
    try:
        action()
    except StoreError as error:
        return error
    return None


class Killed(BaseException):
    """The process is gone: nothing after this can run, not even cleaning up."""


def no_space() -> BaseException:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken() -> BaseException:
    return OSError(errno.EIO, os.strerror(errno.EIO))


@dataclass
class FailingFiles(Files):
    """`at`: which operation fails, from 0; `torn`: a failing write still writes half; `short`: every write writes little."""

    failure: Callable[[], BaseException] = Killed
    at: int | None = None
    for_good: bool = True
    torn: bool = False
    short: bool = False
    done: list[str] = field(default_factory=list)

    def _step(self, name: str) -> None:
        number = len(self.done)
        self.done.append(name)
        if self.at is not None and (number == self.at or (self.for_good and number > self.at)):
            raise self.failure()

    def create(self, path: Path) -> int:
        self._step("create")
        return super().create(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.torn and len(self.done) == self.at:
            super().write(descriptor, data[: len(data) // 2])
        self._step("write")
        return super().write(descriptor, data[:7] if self.short else data)

    def sync(self, descriptor: int) -> None:
        self._step("sync")
        super().sync(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        self._step("rename")
        super().rename(old, new)

    def sync_folder(self, folder: Path) -> None:
        self._step("sync_folder")
        super().sync_folder(folder)

    def remove(self, path: Path) -> None:
        self._step("remove")
        super().remove(path)

    def make_folder(self, folder: Path) -> None:
        self._step("make_folder")
        super().make_folder(folder)

    def names(self, folder: Path) -> list[str]:
        self._step("names")
        return super().names(folder)

    def exists(self, path: Path) -> bool:
        self._step("exists")
        return super().exists(path)

    def size(self, path: Path) -> int:
        self._step("size")
        return super().size(path)

    def read(self, path: Path, offset: int, length: int) -> bytes:
        self._step("read")
        return super().read(path, offset, length)


class DamagedFiles(Files):
    """Files in memory, of which some bytes are others than were written."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = contents

    def size(self, path: Path) -> int:
        return len(self.contents[path.name])

    def read(self, path: Path, offset: int, length: int) -> bytes:
        return self.contents[path.name][offset : offset + length]
