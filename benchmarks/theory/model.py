"""Students of which everything can be computed: softmax over a few tokens, float64, expectations enumerated.

Gates, policies and divergences are the package's own. What is studied:

- *tabular*: every context has its own V logits, so contexts do not touch each other and rows may be studied one by one;
- *linear*: the logits of context c are `features[c] @ theta`, with fewer features than contexts: a gap in capacity, and
  parameters that contexts share. P such problems of C contexts run side by side, as [P·C, V] rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speckd.divergences import (
    AdaptiveKL,
    AlphaBeta,
    GeneralizedJSD,
    SkewedForwardKL,
    SkewedReverseKL,
    forward_kl,
    reverse_kl,
    todi,
    total_variation,
)
from speckd.gates import ExpectedSpec, LabelRatio, NoGate, TopK
from speckd.lk_losses import KLWithTotalVariation, LKAlpha, LKHybrid, acceptance_rate
from speckd.objective import Objective, token_terms
from speckd.types import BatchDivergence, DenseSignal, Rows, TokenKeys

DIVERGENCES: dict[str, Any] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "generalized_jsd": GeneralizedJSD(0.5),
    "skewed_forward_kl": SkewedForwardKL(0.1),
    "skewed_reverse_kl": SkewedReverseKL(0.1),
    "total_variation": total_variation,
    "alpha_beta": AlphaBeta(0.2, 0.7),
    "adaptive_kl": AdaptiveKL(0.5),
    "todi": todi,
    "lk_alpha": LKAlpha(),
    "lk_hybrid": LKHybrid(),
}
#: The gates of the study. Spec-k is taken by its expectation, 1 − TV^k, which needs no draw; the sampled one is in `variance`.
GATES: dict[str, Any] = {"none": NoGate(), "top_1": TopK(1), "spec_1": ExpectedSpec(1), "label_ratio": LabelRatio()}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distributions(rows: int, vocabulary: int, source: torch.Generator) -> Tensor:
    """[rows, V] logits of random distributions, from nearly flat to nearly one-hot (the scale is drawn, row by row)."""
    scale = 10 ** (1.3 * torch.rand(rows, 1, generator=source, dtype=torch.float64) - 0.5)
    return scale * torch.randn(rows, vocabulary, generator=source, dtype=torch.float64)


def keys(rows: int) -> TokenKeys:
    index = torch.arange(rows)
    return TokenKeys(index, torch.zeros_like(index))


def settled(divergence: Any, student: Tensor, teacher: Tensor, group: int = 1) -> Any:
    """A divergence of rows; of one with a coefficient of the batch, that of batches of `group` rows. [N, V] logits."""
    if not isinstance(divergence, BatchDivergence):
        return divergence
    log_q, log_p = student.detach().log_softmax(-1), teacher.log_softmax(-1)
    assert isinstance(divergence, LKHybrid)
    mean = acceptance_rate(log_q, log_p).view(-1, group).mean(-1).repeat_interleave(group)
    return KLWithTotalVariation((-divergence.eta * mean).exp())  # type: ignore[arg-type]  # one λ a row


def values(divergence: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """D of each row, [N], of [N, V] logits."""
    return settled(divergence, student, teacher)(student.log_softmax(-1), teacher.log_softmax(-1))


def slopes(divergence: Any, student: Tensor, teacher: Tensor, group: int = 1) -> Tensor:
    """∂D/∂z of each row, [N, V], as autograd takes it of the package's divergence (constants are constants)."""
    z = student.detach().requires_grad_()
    own = settled(divergence, z, teacher, group)(z.log_softmax(-1), teacher.log_softmax(-1))
    return torch.autograd.grad(own.sum(), z)[0]


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """TV of each row, [N], of [N, V] logits."""
    return 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)


def rows_of(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Rows:
    labels = teacher.argmax(-1) if labels is None else labels
    return Rows(student.detach(), DenseSignal(teacher), labels, keys(len(labels)))


def acceptance(gate: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """A gate's expected acceptance of each row, [N]; labels, where the gate looks at them, are drawn from the teacher."""
    if not isinstance(gate, LabelRatio):
        return gate(rows_of(student, teacher))
    vocabulary = teacher.shape[-1]
    labels = torch.arange(vocabulary).repeat(len(teacher))
    each = gate(rows_of(student.repeat_interleave(vocabulary, 0), teacher.repeat_interleave(vocabulary, 0), labels))
    return (teacher.softmax(-1) * each.view(-1, vocabulary)).sum(-1)


@dataclass(frozen=True)
class Step:
    """One look at a loss: its value a row and the gradient of the summed rows, both with the gate's verdicts held fixed."""

    loss: Tensor
    acceptance: Tensor
    gradient: Tensor


def look(objective: Objective, student: Tensor, teacher: Tensor, group: int = 1) -> Step:
    """The package's own weighing (`token_terms`) of [N, V] rows; a gate that looks at labels sees their expectation.

    A gate's weight carries no gradient and D no label, so with `mask` and `down_weight` the expectation over labels may be
    taken of the weight. That does not hold for `label`, which is therefore not used with this function.
    """
    accepted = acceptance(objective.gate, student, teacher)
    z = student.detach().requires_grad_()
    rows = Rows(z, DenseSignal(teacher), teacher.argmax(-1), keys(len(teacher)))
    on, _ = objective.rejected.weights(accepted)
    divergence = settled(objective.divergence, z, teacher, group)
    if divergence is objective.divergence:
        loss = token_terms(objective, rows, accepted).loss
    else:
        loss = on * divergence(z.log_softmax(-1), teacher.log_softmax(-1))
    # Where nothing has weight, the package computes no divergence at all.
    gradient = torch.autograd.grad(loss.sum(), z)[0] if loss.requires_grad else torch.zeros_like(student)
    return Step(loss.detach(), accepted, gradient)


@dataclass(frozen=True)
class Linear:
    """P problems side by side. `features`: [P, C, d]; `teacher`: [P·C, V] logits; every context weighs 1/C."""

    features: Tensor
    teacher: Tensor

    @property
    def contexts(self) -> int:
        return self.features.shape[1]

    def logits(self, theta: Tensor) -> Tensor:
        """[P, d, V] parameters -> [P·C, V]."""
        return (self.features @ theta).flatten(0, 1)

    def pull(self, gradient: Tensor) -> Tensor:
        """[P·C, V] gradients of rows -> [P, d, V], of the mean over a problem's contexts (`normalizer: valid`)."""
        return self.features.mT @ gradient.view(*self.features.shape[:2], -1) / self.contexts

    def mean(self, rows: Tensor) -> Tensor:
        """[P·C] -> [P]."""
        return rows.view(-1, self.contexts).mean(-1)


def linear_problems(problems: int, contexts: int, width: int, vocabulary: int, seed: int) -> Linear:
    source = generator(seed)
    features = torch.randn(problems, contexts, width, generator=source, dtype=torch.float64)
    features[..., -1] = 1  # a bias
    return Linear(features, distributions(problems * contexts, vocabulary, source))
