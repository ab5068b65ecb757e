"""The few file operations that a store needs, in one place, so that tests can make each of them fail; and atomic publishing."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from speckd.errors import StoreError

PARTIAL = ".partial"
_SHORT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Files:
    """The operating system's. Every method may raise OSError."""

    def create(self, path: Path) -> int:
        """A new file's descriptor; FileExistsError where there is one."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """How many bytes were written, maybe fewer than given."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def names(self, folder: Path) -> list[str]:
        return sorted(os.listdir(folder))

    def exists(self, path: Path) -> bool:
        return path.exists()

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Up to so many bytes from there. Not memory-mapped: a file that shrinks then kills the process instead of an error."""
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Turns what the operating system says into an error that names the file."""
    try:
        yield
    except OSError as error:
        fix = "Free some space" if error.errno in _SHORT_OF_SPACE else "Check the disk and the folder's permissions"
        raise StoreError(
            f"{path}: {error.strerror or error}", f"{fix}, then run the same command again: it makes what is missing"
        ) from error


def exists(files: Files, path: Path) -> bool:
    with named(path):
        return files.exists(path)


def read_all(files: Files, path: Path) -> bytes:
    with named(path):
        return files.read(path, 0, files.size(path))


@contextmanager
def alone(files: Files, path: Path, patience: float) -> Iterator[None]:
    """Nobody else writes that file meanwhile; what a killed writer left of it is gone.

    Args:
        patience: seconds to wait for somebody else.

    Raises:
        StoreError: somebody else still writes it.
    """
    lock = FileLock(path.with_name(path.name + ".lock"))
    with named(path):
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            fix = "Wait for it, or stop it; let one process write a shard"
            raise StoreError(f"{path}: another process is writing it", fix) from None
    try:
        with named(path):
            files.remove(partial(path))
        yield
        # Whoever gets a lock that is gone sees that the file is there and writes nothing; before, the lock must stay.
        with suppress(OSError):
            if files.exists(path):
                files.remove(path.with_name(path.name + ".lock"))
    finally:
        lock.release()


def partial(path: Path) -> Path:
    """A file's name while it is written."""
    return path.with_name(path.name + PARTIAL)


def publish(files: Files, path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file that is there wholly or not at all, also after a power cut: new name, fsync, rename, fsync of the folder.

    To be called in `alone`. What `parts` raises comes through as it is.
    """
    unfinished = partial(path)
    with named(path):
        descriptor = files.create(unfinished)
    try:
        try:
            for part in parts:
                with named(path):
                    _write_all(files, descriptor, part)
            with named(path):
                files.sync(descriptor)
        finally:
            os.close(descriptor)
        with named(path):
            files.rename(unfinished, path)
            files.sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            files.remove(unfinished)
        raise


def _write_all(files: Files, descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        written = files.write(descriptor, rest)
        if written <= 0:
            raise OSError(errno.EIO, "nothing could be written")
        rest = rest[written:]
