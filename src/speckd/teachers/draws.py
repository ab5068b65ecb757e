"""Tokens drawn at random from the teacher, with how often each was: an estimate of its distribution that is unbiased.

Sparse Logit Sampling: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", 2025 (RS-KD).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from speckd.errors import StoreError
from speckd.teachers.answers import Answer
from speckd.teachers.layout import Layout

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Drawn:
    """n rows, one after the other. `lengths`: [n] distinct tokens of each; `token_ids`, `counts`: [Σ lengths]."""

    lengths: Integers
    token_ids: Integers
    counts: Integers


def answer_of_draws(positions: Tensor, draws: Tensor, label_log_probs: Tensor, layout: Layout) -> Answer:
    """[n, S] token ids, drawn from the teacher with replacement at each position -> the answer that a store keeps.

    Raises:
        StoreError: another number of draws than the layout's, or more distinct tokens than its width.
    """
    if draws.shape != (len(positions), layout.draws):
        raise StoreError(
            f"{tuple(draws.shape)} tokens were drawn where {len(positions)} × {layout.draws} were to be", "Draw as many"
        )
    ordered = draws.sort(-1).values.numpy()
    first = np.ones(ordered.shape, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    counts = np.diff(np.append(np.flatnonzero(first), ordered.size))
    lengths = first.sum(-1)
    if (lengths > layout.width).any():
        raise StoreError(
            f"{lengths.max()} distinct tokens were drawn at a position, and the cache holds {layout.width}",
            f"Set its width to {min(layout.draws, layout.vocabulary_size)}",
        )
    ids, log_probs = padded(Drawn(lengths, ordered[first], counts), layout)
    return Answer(positions, torch.from_numpy(ids), log_probs, label_log_probs, ranked=False)


def drawn_of(answer: Answer, layout: Layout) -> Drawn:
    """The counts behind an answer's log(count / S), exactly.

    Raises:
        StoreError: log-probabilities that are none of these.
    """
    assert answer.token_ids is not None
    log_probs = answer.log_probs.numpy()
    counts = np.rint(np.exp(log_probs.astype(np.float64)) * layout.draws)
    with np.errstate(divide="ignore"):
        again = np.log(counts / layout.draws)
    near = np.isclose(again, log_probs, rtol=0, atol=1e-5)
    if not near.all() or (counts.sum(-1) > layout.draws).any():
        raise StoreError(
            f"log-probabilities are not those of counts out of {layout.draws} draws",
            "Give log(count / S), and −inf in the padding",
        )
    some = counts > 0
    return Drawn(some.sum(-1), answer.token_ids.numpy()[some], counts[some].astype(np.int64))


def padded(drawn: Drawn, layout: Layout) -> tuple[Integers, Tensor]:
    """[n, K] ids and log-probabilities: each row filled up with the smallest ids that are not in it, at −inf."""
    some = np.arange(layout.width) < drawn.lengths[:, None]
    ids, log_probs = np.zeros(some.shape, dtype=np.int64), np.full(some.shape, -np.inf, dtype=np.float32)
    ids[some], log_probs[some] = drawn.token_ids, np.log(drawn.counts / layout.draws)
    free = np.ones((len(ids), min(layout.vocabulary_size, 2 * layout.width)), dtype=bool)
    small = some & (ids < free.shape[-1])
    free[np.nonzero(small)[0], ids[small]] = False
    wanted = layout.width - drawn.lengths
    ids[~some] = np.nonzero(free & (np.cumsum(free, -1) <= wanted[:, None]))[1]
    return ids, torch.from_numpy(log_probs)
