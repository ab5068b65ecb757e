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


def verdicts(gate: BatchGate, scores: Tensor | None, keys: TokenKeys, gather: Gather) -> Tensor:
    """[n] acceptance of this process's rows.

    Args:
        gate: decides over everybody's scores.
        scores: [n] or [n, C] of this process; None where it has no rows, which still takes part in the gathering.
        keys: of its rows; seed and epoch are everybody's.
        gather: how the others' are had.
    """
    own = torch.zeros(0, 1, device=keys.sample.device) if scores is None else scores.double().reshape(len(scores), -1)
    everybody, mine = gather(own.double())
    who, _ = gather(torch.stack([keys.sample, keys.position], -1))
    if scores is None:
        return own[:, 0]
    everybody = everybody.to(scores.dtype).reshape(-1, *scores.shape[1:])
    every = TokenKeys(who[:, 0], who[:, 1], keys.seed, keys.epoch)
    return gate.select(everybody, every)[mine]
