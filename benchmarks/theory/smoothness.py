"""Question 5: how smooth is the loss? Curvature where the verdicts stand still, and the jump where one flips."""

from typing import Any

import torch
from benchmarks.theory.model import (
    DIVERGENCES,
    distributions,
    generator,
    linear_problems,
    look,
    rows_of,
    settled,
    slopes,
    values,
)
from benchmarks.theory.monotone import tied
from torch import Tensor

from speckd.gates import ExpectedSpec, NoGate, TopK
from speckd.objective import Objective
from speckd.policies import DownWeight, Mask

SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def hessians(divergence: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """∂²D/∂z² of each row, [N, V, V], exact; what a divergence holds constant stays constant, so it need not be symmetric."""
    z = student.detach().requires_grad_()
    own = settled(divergence, z, teacher)(z.log_softmax(-1), teacher.log_softmax(-1))
    (slope,) = torch.autograd.grad(own.sum(), z, create_graph=True)
    return torch.stack([torch.autograd.grad(slope[:, v].sum(), z, retain_graph=True)[0] for v in range(z.shape[-1])], 1)


def curvature(divergence: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """The largest singular value of each row's second derivative, [N]: how steep the gradient's field is."""
    return torch.linalg.matrix_norm(hessians(divergence, student, teacher), 2)


def sharpness(rows: int = 3_000, vocabulary: int = 6) -> dict[str, Any]:
    """The steepest gradient field found, by how sharp the teacher is (scale of its logits), over all rows and accepted ones."""
    source = generator(50)
    student = distributions(rows, vocabulary, source)
    directions = torch.randn(rows, vocabulary, generator=source, dtype=torch.float64)
    found: dict[str, Any] = {"scales": list(SCALES)}
    for name, divergence in DIVERGENCES.items():
        every, accepted, slope, height = [], [], [], []
        for scale in SCALES:
            teacher = scale * directions
            norms = curvature(divergence, student, teacher)
            kept = TopK(1)(rows_of(student, teacher)) > 0
            every.append(float(norms.max()))
            accepted.append(float(norms[kept].max()))
            slope.append(float(slopes(divergence, student, teacher).norm(dim=-1).max()))
            height.append(float(values(divergence, student, teacher).max()))
        found[name] = {"all": every, "accepted": accepted, "gradient": slope, "value": height}
    return found


def masked_curvature(problems: int = 100) -> dict[str, Any]:
    """Linear students, Top-1 mask, verdicts held fixed: the loss's largest curvature over that of the ungated loss.

    `ratio`, `accepted`: medians over problems where something is accepted, of that and of the share accepted; `steeper`: the
    share of problems where the mask raises it; `indefinite`: where the ungated loss is not convex at that point.
    """
    problem = linear_problems(problems, contexts=6, width=2, vocabulary=4, seed=80)
    student = problem.logits(torch.randn(problems, 2, 4, generator=generator(81), dtype=torch.float64))
    kept = TopK(1)(rows_of(student, problem.teacher)).view(problems, 6)
    some = kept.sum(-1) > 0
    found: dict[str, Any] = {}
    for name, divergence in DIVERGENCES.items():
        hessian = hessians(divergence, student, problem.teacher).view(problems, 6, 4, 4)
        whole, masked = (
            torch.einsum("pc,pci,pcj,pcab->piajb", weight, problem.features, problem.features, hessian).reshape(problems, 8, 8)
            for weight in (torch.ones_like(kept), kept)
        )
        plain, gated = (torch.linalg.matrix_norm(each, 2) for each in (whole, masked))
        found[name] = {
            "ratio": float((gated / plain)[some].median()),
            "accepted": float(kept.mean(-1)[some].median()),
            "steeper": float((gated > plain + 1e-12).double().mean()),
            "indefinite": float((torch.linalg.eigvalsh((whole + whole.mT) / 2)[:, 0] < -1e-9).double().mean()),
        }
    return found


def jumps(rows: int = 4_000, vocabulary: int = 8) -> dict[str, Any]:
    """Students a hair to either side of a tie between an accepted and a rejected token: what the loss jumps by, Top-1."""
    student, teacher, better, _ = tied(rows, vocabulary, 51)
    top = teacher.argmax(-1, keepdim=True)
    at_edge = (better == top)[:, 0]  # the others are rejected on both sides
    student, teacher, better = student[at_edge], teacher[at_edge], better[at_edge]
    nudge = torch.zeros_like(student).scatter(-1, better, 1e-9)
    found: dict[str, Any] = {}
    for name, divergence in DIVERGENCES.items():
        own: dict[str, Any] = {"rows": len(student)}
        for label, policy in (("mask", Mask()), ("down_weight", DownWeight(0.01))):
            objective = Objective(TopK(1), policy, divergence)
            inside = look(objective, student + nudge, teacher)
            outside = look(objective, student - nudge, teacher)
            size = inside.loss - outside.loss
            own[label] = {
                "median": float(size.median()),
                "largest": float(size.max()),
                "least": float(size.min()),
                "gradient": float((inside.gradient - outside.gradient).norm(dim=-1).max()),
            }
        plain = Objective(NoGate(), Mask(), divergence)
        own["ungated"] = float(
            (look(plain, student + nudge, teacher).loss - look(plain, student - nudge, teacher).loss).abs().max()
        )
        found[name] = own
    return found


def kinks(rows: int = 4_000, vocabulary: int = 6) -> dict[str, float]:
    """How far the ungated gradient itself jumps where q(v) crosses p(v) for one token: 0 but for what has |p − q| in it."""
    source = generator(52)
    teacher = distributions(rows, vocabulary, source).log_softmax(-1)
    other = distributions(rows, vocabulary, source)
    rest = other[:, 1:].log_softmax(-1) + torch.log1p(-teacher[:, :1].exp())
    student = torch.cat([teacher[:, :1], rest], -1)  # q(0) = p(0), the others anything
    nudge = torch.zeros_like(student)
    nudge[:, 0] = 1e-9
    return {
        name: float((slopes(own, student + nudge, teacher) - slopes(own, student - nudge, teacher)).norm(dim=-1).max())
        for name, own in DIVERGENCES.items()
    }


def line(points: int = 401) -> dict[str, Any]:
    """One line through logit space, from a confident wrong student to the teacher and beyond: the loss, gated and not."""
    teacher = torch.tensor([[0.55, 0.25, 0.15, 0.05]], dtype=torch.float64).log()
    wrong = torch.tensor([[-2.0, 1.5, 0.0, 0.5]], dtype=torch.float64)
    t = torch.linspace(0, 1.3, points, dtype=torch.float64)[:, None]
    student, wide = (1 - t) * wrong + t * teacher, teacher.expand(points, -1)
    found: dict[str, Any] = {"t": t[:, 0].tolist()}
    for name, gate, policy in (
        ("ungated", NoGate(), Mask()),
        ("Top-1, mask", TopK(1), Mask()),
        ("Top-1, β = 0.25", TopK(1), DownWeight(0.25)),
        ("Spec-1 expected, mask", ExpectedSpec(1), Mask()),
    ):
        found[name] = look(Objective(gate, policy, DIVERGENCES["forward_kl"]), student, wide).loss.tolist()
    return found
