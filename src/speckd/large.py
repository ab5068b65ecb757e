"""Room for large tensors on a CPU, handed out again when nobody uses it any more.

The operating system hands out fresh memory page by page, which costs 5 to 20 % of a step's loss. So pages are large where the
system grants them, and those of a step before are used again, as a GPU's allocator does by itself.
"""

import math
import mmap
import sys
from contextlib import suppress
from threading import Lock

import torch
from torch import Tensor

_WORTH_IT = 4 * 2**20
_MOST_KEPT = 8

_kept: list[mmap.mmap] = []
_lock = Lock()


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor. On a CPU under Linux its memory is kept for the next one of about this size."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if device.type != "cpu" or sys.platform != "linux" or size < _WORTH_IT:
        return torch.empty(shape, dtype=dtype, device=device)
    with _lock:
        return torch.frombuffer(_pages(size), dtype=dtype, count=count).view(shape)


def _pages(size: int) -> mmap.mmap:
    """The smallest of the idle ones that hold so much, else new ones."""
    idle = [place for place in range(len(_kept)) if sys.getrefcount(_kept[place]) == 2]  # the list's and the call's own
    fitting = [place for place in idle if size <= len(_kept[place]) <= 2 * size]
    if fitting:
        return _kept[min(fitting, key=lambda place: len(_kept[place]))]
    if len(_kept) >= _MOST_KEPT and idle:
        del _kept[idle[0]]
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    if len(_kept) < _MOST_KEPT:
        _kept.append(pages)
    return pages
