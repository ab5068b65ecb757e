"""Every composition, run by the package and by the oracle on the same numbers."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from speckd import LMHead, Objective, distillation_loss
from speckd.divergences import (
    AdaptiveKL,
    AlphaBeta,
    GeneralizedJSD,
    HasEntries,
    LabelNLL,
    SkewedForwardKL,
    SkewedReverseKL,
    forward_kl,
    reverse_kl,
    todi,
    total_variation,
)
from speckd.gates import (
    ExpectedSpec,
    Inverted,
    LabelInTopK,
    LabelRatio,
    MatchedRandom,
    NoGate,
    Random,
    Spec,
    Threshold,
    TopK,
    TwoSided,
)
from speckd.lk_losses import KLWithTotalVariation, LKAlpha, LKHybrid
from speckd.objective import token_terms
from speckd.policies import DownWeight, Label, Mask, Residual
from speckd.randomness import uniforms
from speckd.support import label_places, shared_support
from speckd.taid import TAID
from speckd.teachers import DenseTeacher, TopKTeacher
from speckd.tokens import SupervisedRows
from speckd.types import BatchDivergence, BatchGate, Rows, TokenKeys
from tests.parity import oracle

K = 3
GATES: dict[str, Any] = {
    "none": NoGate(),
    "top_k": TopK(K),
    "spec": Spec(K, allow_lower_bound=True),
    "expected_spec": ExpectedSpec(K, allow_lower_bound=True),
    "two_sided": TwoSided(K),
    "threshold": Threshold(0.1, allow_lower_bound=True),
    "label_in_top_k": LabelInTopK(K),
    "label_ratio": LabelRatio(),
    "label_ratio_hard": LabelRatio(hard=True),
    "random": Random(0.4),
    "inverted": Inverted(TopK(K)),
    "matched_random": MatchedRandom(TopK(K)),
}
POLICIES: dict[str, Any] = {"mask": Mask(), "down_weight": DownWeight(0.01), "label": Label(), "residual": Residual()}
DIVERGENCES: dict[str, Any] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "generalized_jsd": GeneralizedJSD(0.3),
    "skewed_forward_kl": SkewedForwardKL(0.1),
    "skewed_reverse_kl": SkewedReverseKL(0.1),
    "total_variation": total_variation,
    "alpha_beta": AlphaBeta(0.2, 0.7),
    "adaptive_kl": AdaptiveKL(0.5),
    "todi": todi,
    "taid": TAID(0.4),
    "lk_alpha": LKAlpha(),
}
#: Those that state a closed form, the hybrid as it is once settled among them.
ENTRYWISE: dict[str, Any] = {name: own for name, own in DIVERGENCES.items() if isinstance(own, HasEntries)}
ENTRYWISE["lk_hybrid, settled"] = KLWithTotalVariation(0.3)
#: No functions of two distributions: one has the batch's coefficient, the other asks for the label.
OF_BATCH_OR_LABEL: dict[str, Any] = {"lk_hybrid": LKHybrid(3.0), "label_nll": LabelNLL()}
TEACHERS: dict[str, int | None] = {"dense": None, "top-K": 6}
EXECUTIONS: dict[str, int | None] = {"whole": None, "chunks of 4": 4, "chunks of 1": 1}


@dataclass(frozen=True)
class Problem:
    """One batch: hidden states, head and teacher, in float64 numbers that float32 holds exactly."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher: Tensor
    rows: SupervisedRows


def problem(seed: int = 0, tokens: int = 9, width: int = 7, vocabulary: int = 17, sharpness: float = 1.5) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    index = torch.arange(tokens)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    keys = TokenKeys(index // 4, index % 4, seed=seed, epoch=1)
    teacher = (sharpness * draw(tokens, vocabulary)).float().double()
    return Problem(draw(tokens, width), draw(vocabulary, width), draw(vocabulary), teacher, SupervisedRows(index, labels, keys))


def setting(given: Problem, gate: str, rejected: str, divergence: str, **more: Any) -> oracle.Setting:
    keys = given.rows.keys
    spec = uniforms(keys.seed, keys.epoch, keys.sample, keys.position, K)
    coins = uniforms(keys.seed, keys.epoch, keys.sample, keys.position, 1, stream=1)[:, 0, 0]
    return oracle.Setting(gate, rejected, divergence, K, spec, coins, **more)


def objective(chosen: oracle.Setting) -> Objective:
    return Objective(
        GATES[chosen.gate],
        POLICIES[chosen.rejected],
        {**DIVERGENCES, **OF_BATCH_OR_LABEL}[chosen.divergence],
        chosen.normalizer,  # type: ignore[arg-type]
        chosen.label_loss_weight,
        chosen.temperature,
    )


def by_oracle(given: Problem, chosen: oracle.Setting, top: int | None) -> list[Tensor]:
    """Loss and its gradients for hidden states, weight and bias."""
    leaves = [t.clone().requires_grad_() for t in (given.hidden, given.weight, given.bias)]
    hidden, weight, bias = leaves
    total, count = oracle.loss(hidden @ weight.T + bias, given.teacher, given.rows.labels.tolist(), chosen, top)
    loss = total / max(count, 1e-300)
    if not loss.requires_grad:
        return [loss, *(torch.zeros_like(leaf) for leaf in leaves)]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def teacher_rows(given: Problem, top: int | None, dtype: torch.dtype) -> Any:
    if top is None:
        return DenseTeacher(given.teacher.to(dtype))
    log_probs = given.teacher.log_softmax(-1)
    best = log_probs.topk(top)
    own = log_probs.gather(-1, given.rows.labels[:, None])[:, 0]
    return TopKTeacher(best.indices, best.values.to(dtype), own.to(dtype))


def by_package(given: Problem, chosen: oracle.Setting, top: int | None, chunk: int | None, dtype: torch.dtype) -> list[Tensor]:
    """The same by `token_terms` on whole logits (chunk None) or by the engine."""
    leaves = [t.to(dtype).requires_grad_() for t in (given.hidden, given.weight, given.bias)]
    hidden, head = leaves[0], LMHead(leaves[1], leaves[2])
    teacher, wanted = teacher_rows(given, top, dtype), objective(chosen)
    if chunk is None:
        rows = Rows(head(hidden), teacher.signal(given.rows.index), given.rows.labels, given.rows.keys)
        with torch.no_grad():
            judged = Rows(rows.student_logits.detach(), rows.teacher, rows.labels, rows.keys)
            gate = wanted.gate
            accepted = gate.select(gate.score(judged), rows.keys) if isinstance(gate, BatchGate) else gate(judged)
            if isinstance(wanted.divergence, BatchDivergence):
                support = shared_support(judged.student_logits, judged.teacher, wanted.divergence_temperature)
                wanted = wanted.settled(wanted.divergence.score(*support, label_places(rows.teacher, rows.labels)))
        terms = token_terms(wanted, rows, accepted)
        total = terms.loss.sum()
        count = terms.weight.sum() if wanted.normalizer == "weight" else torch.tensor(len(given.rows))
    else:
        output = distillation_loss(wanted, hidden, head, teacher, given.rows, chunk)
        total, count = output.sum, output.count
    loss = total / count.clamp(min=1e-30)
    if not loss.requires_grad:
        return [loss, *(torch.zeros_like(leaf) for leaf in leaves)]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves, strict=True))]


def relative_error(found: list[Tensor], wanted: list[Tensor]) -> tuple[float, float]:
    """(loss, gradients): relative L2 over all gradients together; absolute where the truth is 0."""
    loss = abs(float(found[0]) - float(wanted[0])) / max(abs(float(wanted[0])), 1e-12)
    a, b = (torch.cat([t.double().flatten() for t in side[1:]]) for side in (found, wanted))
    return loss, float((a - b).norm() / max(float(b.norm()), 1e-12))


def compositions(gate: str | None = None) -> Iterator[tuple[str, str, str]]:
    yield from product([gate] if gate else GATES, POLICIES, DIVERGENCES)
