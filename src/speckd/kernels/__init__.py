"""Triton kernels for what the engine does between the products, on a GPU: the PyTorch code's results in fewer passes.

Nothing here is needed: where the kernels cannot be used, these functions give what the PyTorch code gives. Without a GPU the
kernels run, very slowly, in Triton's interpreter, where the environment says `TRITON_INTERPRET=1` before Triton is imported:
that is for tests. This module imports no Triton before it is asked for.
"""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from speckd.divergences import HasEntries
from speckd.head import LMHead
from speckd.objective import Objective
from speckd.row_pass import RowPass
from speckd.types import DenseSignal

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_GPU = (8, 0)  # what Triton supports


def available(logits: Tensor) -> bool:
    """Can kernels work on these logits, where they are and in their precision? Tried out once a device."""
    interpreted = logits.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return logits.dtype in _DTYPES and (logits.device.type == "cuda" or interpreted) and _works(logits.device)


@cache
def _works(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _OLDEST_GPU:
        return False
    from speckd.kernels.statistics import trial

    return trial(device)


def usable(objective: Objective, logits: Tensor, by_definition: bool) -> bool:
    """Can `KernelPass` stand in for `RowPass` on a student's logits like these, [N, V]?"""
    divergence = objective.divergence  # settled, or the label's cross-entropy, which has no entries
    if logits.dtype != torch.float32 or by_definition or not isinstance(divergence, HasEntries) or not available(logits):
        return False
    from speckd.kernels.programs import translatable

    return translatable(divergence.entrywise.entry)


def row_pass(objective: Objective, head: LMHead, tile: int, by_definition: bool, logits: Tensor) -> RowPass:
    """The pass for a student's logits like these: by kernels where `usable`."""
    if not usable(objective, logits, by_definition):
        return RowPass(objective, head, tile, by_definition)
    from speckd.kernels.kernel_pass import KernelPass

    return KernelPass(objective, head, tile, by_definition)


def signal(logits: Tensor, temperature: float = 1.0) -> DenseSignal:
    """Of [N, V] logits; measured at once where `available`. `temperature`: the divergence's."""
    if not available(logits):
        return DenseSignal(logits)
    from speckd.kernels.statistics import MeasuredSignal

    return MeasuredSignal.of(logits, temperature)


def swap_rows(data: Tensor, some: Tensor, others: Tensor, needed: bool = True) -> None:
    """Exchanges rows of `data`, [n, V], pair by pair, [h] int64 each; no row is named twice. No copy of them all is made.

    `needed`: False where `some` are spent, and only the `others` have to go into their places.
    """
    if available(data):
        from speckd.kernels.kernel_pass import move_rows

        return move_rows(data, others, some, swap=needed)
    for one, other in zip(some.tolist(), others.tolist(), strict=True):
        kept = data[one].clone() if needed else None
        data[one] = data[other]
        if kept is not None:
            data[other] = kept
    return None
