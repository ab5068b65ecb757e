"""Rows of all processes put together, by accelerate: unequal counts, and processes without any."""

from typing import Any

import torch
from torch import Tensor

from speckd.batch_verdicts import Gather, alone


def gather_by(accelerator: Any) -> Gather:
    """The `Gather` of these processes, which must all call it equally often."""
    return Gathered(accelerator) if accelerator.num_processes > 1 else alone


class Gathered:
    """Pads every process's rows to the largest count and width, gathers, and cuts again."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __call__(self, own: Tensor) -> tuple[Tensor, slice]:
        shapes = self._accelerator.gather(torch.tensor([own.shape], device=own.device)).tolist()
        counts = [count for count, _ in shapes]
        rows, columns = max(counts), max((width for count, width in shapes if count), default=1)
        before = sum(counts[: self._accelerator.process_index])
        mine = slice(before, before + len(own))
        if rows == 0:  # everywhere, so nobody gathers
            return own, mine
        padded = own.new_zeros(rows, columns)
        padded[: len(own), : own.shape[1]] = own if len(own) else 0
        every = self._accelerator.gather(padded)
        return torch.cat([every[i * rows : i * rows + count] for i, count in enumerate(counts)]), mine
