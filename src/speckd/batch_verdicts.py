"""A `BatchGate`'s verdict over the batch of all processes: everybody's scores are gathered, each keeps its own rows' part."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from speckd.types import BatchGate, TokenKeys

#: [n, C] of this process -> [N, C] of all processes, and where this one's n rows stand there. A process may have no rows, and
#: then any C; dtypes are the same everywhere. All processes call it equally often.
Gather: TypeAlias = Callable[[Tensor], tuple[Tensor, slice]]


def alone(own: Tensor) -> tuple[Tensor, slice]:
    """The `Gather` of one process: its own rows are all there are."""
    return own, slice(0, len(own))


def everybody(own: Tensor, gather: Gather) -> tuple[Tensor, slice]:
    """[n] or [n, C] of this process -> the rows of all processes, and where its own stand; exact, in its dtype.

    A process without rows may not know C, and gets what it should not look at.
    """
    flat = own.double().reshape(len(own), -1) if len(own) else own.new_zeros(0, 1, dtype=torch.float64)
    every, mine = gather(flat)
    return (every.to(own.dtype).reshape(-1, *own.shape[1:]) if len(own) else every), mine


def verdicts(gate: BatchGate, scores: Tensor, keys: TokenKeys, gather: Gather) -> Tensor:
    """[n] acceptance of this process's rows, of which there may be none.

    Args:
        gate: decides over everybody's scores.
        scores: [n] or [n, C] of this process.
        keys: of its rows; seed and epoch are everybody's.
        gather: how the others' are had.
    """
    every, mine = everybody(scores, gather)
    who, _ = gather(torch.stack([keys.sample, keys.position], -1))
    if not len(scores):
        return scores.reshape(0)
    return gate.select(every, TokenKeys(who[:, 0], who[:, 1], keys.seed, keys.epoch))[mine]
