"""Question 3: where does the gated loss lead, and how fast? Starvation, escape, fixed points, sets that keep themselves."""

from typing import Any

import torch
from benchmarks.theory.model import (
    DIVERGENCES,
    Linear,
    distance,
    distributions,
    generator,
    keys,
    linear_problems,
    look,
    rows_of,
    slopes,
)
from torch import Tensor

from speckd.divergences import forward_kl
from speckd.gates import ExpectedSpec, NoGate, TopK
from speckd.objective import Objective, token_terms
from speckd.policies import DownWeight, Label, Mask
from speckd.types import DenseSignal, Rows


def starvation(rows: int = 400, vocabulary: int = 8, length: int = 300) -> dict[str, Any]:
    """Tabular, Top-1, mask, every divergence: how far rejected contexts move (not at all), and what becomes of TAR."""
    source = generator(60)
    start, teacher = distributions(rows, vocabulary, source), distributions(rows, vocabulary, source)
    rejected = TopK(1)(rows_of(start, teacher)) == 0
    found: dict[str, Any] = {}
    for name, divergence in DIVERGENCES.items():
        objective, z = Objective(TopK(1), Mask(), divergence), start.clone()
        for _ in range(length):
            z = z - 0.5 * look(objective, z, teacher).gradient
        found[name] = {
            "moved": float((z - start)[rejected].abs().max()),
            "tar_start": float(1 - rejected.double().mean()),
            "tar_end": float(TopK(1)(rows_of(z, teacher)).mean()),
        }
    return found


def first_acceptance(beta: float, start: Tensor, teacher: Tensor, size: float, length: int) -> Tensor:
    """Forward KL, Top-1, `down_weight`: the step at which each context is first accepted, [N]; `length` if never."""
    objective, z = Objective(TopK(1), DownWeight(beta), forward_kl), start.clone()
    first = torch.full((len(z),), float(length), dtype=torch.float64)
    for step in range(length):
        verdict = TopK(1)(rows_of(z, teacher)) > 0
        first = torch.where(verdict & (first == length), float(step), first)
        z = z - size * look(objective, z, teacher).gradient
    return first


def down_weight(rows: int = 200, vocabulary: int = 8) -> dict[str, Any]:
    """β > 0 only stretches time, by 1/β: median ratio of the steps a rejected context takes to those at β = 1 (5 to 100)."""
    source = generator(61)
    start, teacher = distributions(rows, vocabulary, source), distributions(rows, vocabulary, source)
    plain = first_acceptance(1.0, start, teacher, 0.05, 1_000)
    late = (plain >= 5) & (plain < 100)
    found: dict[str, Any] = {"contexts": int(late.sum())}
    for beta in (0.25, 0.1):
        found[f"{beta:g}"] = float((first_acceptance(beta, start, teacher, 0.05, 1_000)[late] / plain[late]).median())
    return found


def label_fallback(rows: int = 300, vocabulary: int = 4, length: int = 400) -> dict[str, Any]:
    """Top-1 with the label fallback, labels enumerated: drawn from the teacher, or always the teacher's least likely token."""
    source = generator(62)
    start, teacher = distributions(rows, vocabulary, source), distributions(rows, vocabulary, source)
    wrong = torch.nn.functional.one_hot(teacher.argmin(-1), vocabulary).double()
    before = TopK(1)(rows_of(start, teacher))
    found: dict[str, Any] = {"tar_start": float(before.mean())}
    for name, labels in (("labels_of_the_teacher", teacher.softmax(-1)), ("labels_wrong", wrong)):
        z = start.clone()
        for _ in range(length):
            z = z - 1.0 * label_gradient(z, teacher, labels)
        after = TopK(1)(rows_of(z, teacher))
        found[name] = {"tar_end": float(after.mean()), "lost": int(((before > 0) & (after == 0)).sum())}
    return found


def label_gradient(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The expected gradient of Top-1 with `label` over `labels`, [N, V] probabilities: every label is a row of its own."""
    count, vocabulary = student.shape
    z = student.detach().requires_grad_()
    wide, each = z.repeat_interleave(vocabulary, 0), torch.arange(vocabulary).repeat(count)
    signal = DenseSignal(teacher.repeat_interleave(vocabulary, 0))
    rows = Rows(wide, signal, each, keys(len(each)))
    objective = Objective(TopK(1), Label(), forward_kl)
    accepted = TopK(1)(Rows(wide.detach(), signal, each, keys(len(each))))
    loss = (token_terms(objective, rows, accepted).loss * labels.flatten()).sum()
    return torch.autograd.grad(loss, z)[0]


HEIGHTS = (0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0)


def escape(length: int = 2_000, size: float = 0.5, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """A student sure of a wrong token, by how sure (its logit above the others): steps until Top-1 accepts; `length`: never."""
    teacher = torch.tensor([[0.7, 0.1, 0.1, 0.1]], dtype=torch.float64).log().expand(len(HEIGHTS), -1)
    start = torch.zeros(len(HEIGHTS), 4, dtype=torch.float64)
    start[:, 3] = torch.tensor(HEIGHTS, dtype=torch.float64) + 0.1
    cases = {name: Objective(NoGate(), Mask(), own) for name, own in DIVERGENCES.items()}
    cases |= {
        "forward_kl, Spec-1 mask": Objective(ExpectedSpec(1), Mask(), forward_kl),
        "forward_kl, Spec-5 mask": Objective(ExpectedSpec(5), Mask(), forward_kl),
        "forward_kl, Top-1 mask": Objective(TopK(1), Mask(), forward_kl),
    }
    found: dict[str, Any] = {"heights": list(HEIGHTS), "cap": length}
    for name, objective in ((name, own) for name, own in cases.items() if not only or name in only):
        z, first = start.clone(), torch.full((len(start),), length)
        for step in range(length):
            verdict = TopK(1)(rows_of(z, teacher)) > 0
            first = torch.where(verdict & (first == length), step, first)
            if bool(verdict.all()) or name.endswith("Top-1 mask"):
                break
            z = z - size * look(objective, z, teacher).gradient
        found[name] = first.tolist()
    return found


def fixed_points(rows: int = 100, length: int = 1_500, size: float = 0.5) -> dict[str, Any]:
    """Ungated: do all divergences lead to one place? TV to the teacher (tabular), and to forward KL's end (with a gap)."""
    source = generator(63)
    start = distributions(rows, 6, source)
    teacher = torch.randn(rows, 6, generator=source, dtype=torch.float64)  # of moderate sharpness, so that all arrive
    problem = linear_problems(40, contexts=6, width=2, vocabulary=4, seed=64)
    found: dict[str, Any] = {}
    ends: dict[str, Tensor] = {}
    for name, divergence in DIVERGENCES.items():
        objective, z = Objective(NoGate(), Mask(), divergence), start.clone()
        theta = torch.zeros(40, 2, 4, dtype=torch.float64)
        for step in range(length):
            z = z - size * look(objective, z, teacher).gradient
            if step % 3 == 0:
                theta = theta - 2 * size * problem.pull(look(objective, problem.logits(theta), problem.teacher, 6).gradient)
        ends[name] = problem.logits(theta)
        far = distance(z, teacher)
        found[name] = {
            "tabular_median": float(far.median()),
            "tabular_largest": float(far.max()),
            "gap_from_forward_kl": float(distance(ends[name], ends["forward_kl"]).mean()),
        }
    return found


def local_rates() -> dict[str, float]:
    """At q = p, the slowest decay of ∂D's Jacobian over that of forward KL's, diag(p) − pp^T; NaN where it has a kink."""
    teacher = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64).log()
    fisher = torch.diag(teacher[0].exp()) - teacher[0].exp()[:, None] * teacher[0].exp()
    slowest = float(torch.linalg.eigvalsh(fisher)[1])
    found: dict[str, float] = {}
    for name, divergence in DIVERGENCES.items():
        if name in ("total_variation", "lk_alpha", "lk_hybrid"):
            found[name] = float("nan")
            continue
        columns = []
        for token in range(4):
            nudge = torch.zeros(1, 4, dtype=torch.float64)
            nudge[0, token] = 1e-5
            columns.append(
                (slopes(divergence, teacher + nudge, teacher) - slopes(divergence, teacher - nudge, teacher))[0] / 2e-5
            )
        jacobian = torch.stack(columns, 1)
        found[name] = float(torch.linalg.eigvals(jacobian).real.sort().values[1]) / slowest
    return found


def self_keeping(problems: int = 8, starts: int = 60, length: int = 800) -> dict[str, Any]:
    """Which sets of accepted contexts keep themselves: the loss over the set is at its least where exactly the set is accepted.

    All 2^6 sets of every problem are minimised (forward KL, convex), and gated descent (Top-1, mask) runs from random starts.
    """
    each = linear_problems(problems, contexts=6, width=2, vocabulary=3, seed=65)
    sets = torch.tensor([[float(number >> bit & 1) for bit in range(6)] for number in range(64)], dtype=torch.float64)
    fixed, keeps = _minimised(each, sets, length)
    wide = _repeated(each, starts)
    source = generator(66)
    theta = 2 * torch.randn(problems * starts, 2, 3, generator=source, dtype=torch.float64)
    objective, late, before = Objective(TopK(1), Mask(), forward_kl), torch.zeros(problems * starts), None
    for step in range(length):
        seen = look(objective, wide.logits(theta), wide.teacher)
        verdict = seen.acceptance.view(-1, 6)
        if before is not None and step > 0.8 * length:
            late += (verdict != before).any(-1)
        before = verdict
        theta = theta - 1.0 * wide.pull(seen.gradient)
    code = (before @ (2.0 ** torch.arange(6, dtype=torch.float64))).long().view(problems, starts)
    ends = [sorted(set(row.tolist())) for row in code]
    predicted = [set(keeps[place].nonzero()[:, 0].tolist()) for place in range(problems)]
    reached = [sum(c in predicted[place] or c == 0 for c in code[place].tolist()) / starts for place in range(problems)]
    rate = before.mean(-1).view(problems, starts)
    return {
        "self_keeping_sets": [int(keeps[place][1:].sum()) for place in range(problems)],
        "distinct_ends": [len(row) for row in ends],
        "share_of_ends_predicted": reached,
        "tar_least": rate.amin(-1).tolist(),
        "tar_largest": rate.amax(-1).tolist(),
        "tar_of_ungated_optimum": fixed[:, 63].tolist(),
        "still_changing": float((late > 0).double().mean()),
    }


def _repeated(problem: Linear, times: int) -> Linear:
    contexts, vocabulary = problem.contexts, problem.teacher.shape[-1]
    teacher = problem.teacher.view(-1, contexts, vocabulary).repeat_interleave(times, 0).flatten(0, 1)
    return Linear(problem.features.repeat_interleave(times, 0), teacher)


def _minimised(problem: Linear, sets: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """TAR at the minimiser over each set, and does exactly that set come out accepted? Both [P, sets]."""
    count = problem.features.shape[0]
    wide = _repeated(problem, len(sets))
    members = sets.repeat(count, 1)
    theta = torch.zeros(count * len(sets), 2, problem.teacher.shape[-1], dtype=torch.float64)
    plain = Objective(NoGate(), Mask(), forward_kl)
    for _ in range(length):
        theta = theta - 1.0 * wide.pull(look(plain, wide.logits(theta), wide.teacher).gradient * members.view(-1, 1))
    verdict = TopK(1)(rows_of(wide.logits(theta), wide.teacher)).view(-1, 6)
    keeps = (verdict == members).all(-1).view(count, -1)
    return verdict.mean(-1).view(count, -1), keeps
