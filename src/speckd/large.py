"""Room for large tensors. Fresh memory is handed out by the operating system page by page, at 5 % of a step on a CPU."""

import math
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

_WORTH_IT = 4 * 2**20


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; on a CPU under Linux in pages of 2 MiB, where the system grants them."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if device.type != "cpu" or sys.platform != "linux" or size < _WORTH_IT:
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size)  # lives as long as the tensor
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)
