"""How two whole distributions of the same rows differ: what gates rank tokens by. No gradient, no [N, V] beside the logits.

(What is minimised is `divergences.py`, which works on any support and is differentiated; a gate knows nothing of it.)
"""

import torch
from torch import Tensor

from speckd import tiles
from speckd.types import DenseSignal, TeacherSignal

_ASK_LESS = "Use a teacher that gives the whole vocabulary, or a gate that asks it for less (top_k, student_entropy)"


def as_dense(signal: TeacherSignal) -> DenseSignal:
    """A top-K that is the whole vocabulary, as one; a dense signal as it is."""
    if isinstance(signal, DenseSignal):
        return signal
    return DenseSignal(torch.empty_like(signal.log_probs).scatter_(-1, signal.token_ids, signal.log_probs))


def whole(signal: TeacherSignal, vocabulary_size: int, why: str) -> DenseSignal:
    """The distribution over all tokens.

    Raises:
        CapabilityError: it is cut to a top K, of which nothing could be ranked against other rows; `why` says who asks.
    """
    signal.require_whole(vocabulary_size, why, _ASK_LESS)
    return as_dense(signal)


def kl(one: DenseSignal, other: DenseSignal) -> Tensor:
    """KL(one ‖ other) = Σ_v one(v)·log(one(v)/other(v)), [N] nats; infinite where `other` rules out what `one` believes in."""
    some = []
    for part in tiles.row_slices(one.logits):
        log_a, log_b = one.rows(part).log_probs, other.rows(part).log_probs
        a = log_a.exp()
        some.append(torch.where(a > 0, a * (log_a - log_b), 0).sum(-1))
    return torch.cat(some or [one.logits[:, 0]])


def hellinger(one: DenseSignal, other: DenseSignal) -> Tensor:
    """√(½ Σ_v (√one(v) − √other(v))²), [N] in [0, 1]."""
    some = []
    for part in tiles.row_slices(one.logits):
        roots = tiles.softmax(one.logits[part]).sqrt_() - tiles.softmax(other.logits[part]).sqrt_()
        some.append((roots.square().sum(-1) / 2).sqrt())
    return torch.cat(some or [one.logits[:, 0]])
