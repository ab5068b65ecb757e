"""Question 4: does the gate calm the gradient? Exact variances over batches of two contexts, draws of the gate included.

Students are linear, so a context's gradient is the outer product of its features and ∂D/∂z. A batch is two contexts drawn
uniformly with replacement; a gate's draw and a label (of the teacher) are enumerated with it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.theory.model import DIVERGENCES, Linear, acceptance, distance, generator, linear_problems, rows_of, slopes
from torch import Tensor

from speckd.gates import ExpectedSpec, LabelRatio, TopK


@dataclass(frozen=True)
class Weights:
    """What a row's weight may be and how likely: both [P, C, M], M outcomes."""

    values: Tensor
    chances: Tensor


def weights_of(gate: str, problem: Linear, student: Tensor) -> Weights:
    shape = (-1, problem.contexts)
    if gate in ("none", "top_1", "expected_spec_1"):
        if gate == "none":
            sure = torch.ones_like(student[:, 0])
        else:
            sure = acceptance(TopK(1) if gate == "top_1" else ExpectedSpec(1), student, problem.teacher)
        values = sure.view(*shape, 1)
        return Weights(values, torch.ones_like(values))
    if gate == "label_ratio":
        vocabulary = student.shape[-1]
        labels = torch.arange(vocabulary).repeat(len(student))
        wide = rows_of(student.repeat_interleave(vocabulary, 0), problem.teacher.repeat_interleave(vocabulary, 0), labels)
        return Weights(LabelRatio()(wide).view(*shape, vocabulary), problem.teacher.softmax(-1).view(*shape, vocabulary))
    if gate == "spec_1":
        rate = (1 - distance(student, problem.teacher)).view(*shape)
    else:  # at random, at Top-1's rate in that problem
        rate = acceptance(TopK(1), student, problem.teacher).view(*shape).mean(-1, keepdim=True).expand(*shape)
    return Weights(torch.tensor([1.0, 0.0], dtype=torch.float64).expand(*rate.shape, 2), torch.stack([rate, 1 - rate], -1))


GATES = ("none", "top_1", "random_at_top_1s_rate", "spec_1", "expected_spec_1", "label_ratio")


def moments(gradients: Tensor, weights: Weights, normalizer: str) -> tuple[Tensor, Tensor]:
    """Mean, [P, D], and variance (trace), [P], of a batch's gradient; `gradients`: [P, C, D], unweighted."""
    problems, contexts, size = gradients.shape
    outcomes = weights.values.shape[-1]
    value = weights.values.reshape(problems, -1)
    chance = (weights.chances / contexts).reshape(problems, -1)
    weighed = weights.values[..., None] * gradients[:, :, None]
    one = weighed.reshape(problems, contexts * outcomes, size)
    total = one[:, :, None] + one[:, None]
    count = value[:, :, None] + value[:, None] if normalizer == "weight" else torch.full_like(total[..., 0], 2.0)
    estimate = torch.where(count[..., None] > 0, total / count.clamp(min=1e-300)[..., None], 0)
    both = (chance[:, :, None] * chance[:, None])[..., None]
    mean = (both * estimate).sum((1, 2))
    return mean, (both * (estimate - mean[:, None, None]) ** 2).sum((1, 2, 3))


def study(problems: int = 60) -> dict[str, Any]:
    """Per divergence, gate and normaliser, against the ungated gradient of the same problem, by `valid`.

    `variance`, `relative`: medians of the ratio of variances, and of variances over the squared norm of the mean; `lower_…`:
    the share of problems where it is below 1; `signal`: the same for progress along the ungated mean gradient over the
    standard deviation, higher is better; `cosine`: of the two means.
    """
    problem = linear_problems(problems, contexts=6, width=3, vocabulary=4, seed=70)
    source = generator(71)
    student = problem.logits(torch.randn(problems, 3, 4, generator=source, dtype=torch.float64))
    near = 0.7 * problem.teacher + 0.3 * student  # beside a student far away, one that is close
    found: dict[str, Any] = {}
    for place, z in (("far", student), ("near", near)):
        for name, divergence in DIVERGENCES.items():
            slope = slopes(divergence, z, problem.teacher, problem.contexts).view(problems, 6, 1, -1)
            gradients = (problem.features[..., None] * slope).flatten(2)
            plain = moments(gradients, weights_of("none", problem, z), "valid")
            for gate in GATES[1:]:
                for normalizer in ("valid", "weight"):
                    own = moments(gradients, weights_of(gate, problem, z), normalizer)
                    kept = own[0].norm(dim=-1) > 1e-12  # nothing accepted at all has no direction
                    found.setdefault(place, {}).setdefault(name, {}).setdefault(gate, {})[normalizer] = _compared(
                        plain, own, kept
                    )
    return found


def _compared(plain: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], kept: Tensor) -> dict[str, float]:
    (mean, spread), (gated, noise) = [(m[kept], v[kept]) for m, v in (plain, own)]
    variance = noise / spread
    relative = (noise / gated.square().sum(-1)) / (spread / mean.square().sum(-1))
    cosine = torch.nn.functional.cosine_similarity(mean, gated, dim=-1)
    signal = ((mean * gated).sum(-1) / noise.sqrt()) / (mean.square().sum(-1) / spread.sqrt())
    return {
        "problems": int(kept.sum()),
        "variance": float(variance.median()),
        "lower_variance": float((variance < 1).double().mean()),
        "relative": float(relative.median()),
        "lower_relative": float((relative < 1).double().mean()),
        "signal": float(signal.median()),
        "higher_signal": float((signal > 1).double().mean()),
        "cosine": float(cosine.median()),
    }


def example() -> dict[str, float]:
    """Two contexts that agree but for a hair, one rejected: the mask makes noise where there was none (batches of one)."""
    teacher = torch.tensor([[0.51, 0.49], [0.49, 0.51]], dtype=torch.float64).log()
    student = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log().expand(2, -1)
    slope = slopes(DIVERGENCES["forward_kl"], student, teacher)
    weight = TopK(1)(rows_of(student, teacher))[:, None]
    return {name: float((g - g.mean(0)).square().sum(-1).mean()) for name, g in (("ungated", slope), ("gated", weight * slope))}
