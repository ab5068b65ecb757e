"""Each off-policy recipe, by its name, against its paper's formula written out in float64: loss and gradient, plain and gated.

Where a paper's body was not available, the formula is that of its abstract and of reading notes, as docs/method.md says.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from speckd import LMHead, distillation_loss
from speckd.moving import Clock, MovingObjective
from speckd.settings import load_settings
from speckd.teachers import DenseTeacher
from tests.parity.cases import Problem, problem
from tests.trainer.test_text_recipes import FORMULAS as OF_WRITTEN_TEXT

#: (p, q, z_p, z_q, labels, N rows each) -> [N]
Formula = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


def abkd(p: Tensor, q: Tensor, *_: Tensor) -> Tensor:
    """ABKD, 2505.04560: −1/(αβ) Σ [p^α q^β − α/(α+β) p^{α+β} − β/(α+β) q^{α+β}], α = 0.2, β = 0.7."""
    a, b = 0.2, 0.7
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


def akl(p: Tensor, q: Tensor, *_: Tensor) -> Tensor:
    """AKL, 2404.02657: g_head/(g_head+g_tail)·FKL + g_tail/(g_head+g_tail)·RKL, g = Σ |p − q|, head: cumulative p ≤ 0.5."""
    shares = []
    for own_p, own_q in zip(p.tolist(), q.tolist(), strict=True):
        mass, gaps = 0.0, [0.0, 0.0]
        for place, v in enumerate(sorted(range(len(own_p)), key=lambda v: -own_p[v])):
            mass += own_p[v]
            gaps[int(place > 0 and mass > 0.5)] += abs(own_p[v] - own_q[v])
        shares.append(gaps[0] / sum(gaps))
    share = torch.tensor(shares, dtype=torch.float64)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def todi(p: Tensor, q: Tensor, *_: Tensor) -> Tensor:
    """ToDi, 2505.16297: Σ_v [α·p·log(p/q) + (1 − α)·q·log(q/p)], α = sg[σ(log p/q)] = p/(p + q)."""
    share = (p / (p + q)).detach()
    return (share * p * (p / q).log() + (1 - share) * q * (q / p).log()).sum(-1)


def taid(p: Tensor, q: Tensor, z_p: Tensor, z_q: Tensor, labels: Tensor) -> Tensor:
    """TAID, 2501.16937: KL(p_t ‖ q), p_t = softmax((1 − t)·sg[z_q] + t·z_p); t = 0.4 at first."""
    return kl(torch.softmax(0.6 * z_q.detach() + 0.4 * z_p, -1), q)


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """α = Σ_v min(p, q)."""
    return torch.where(p < q, p, q).sum(-1)


def lk_hybrid(p: Tensor, q: Tensor, *_: Tensor) -> Tensor:
    """LK losses, 2602.23881: λ·KL(p ‖ q) + (1 − λ)·TV(p, q), λ = exp(−3·sg[mean α])."""
    share = math.exp(-3 * float(overlap(p, q).detach().mean()))
    return share * kl(p, q) + (1 - share) * 0.5 * (p - q).abs().sum(-1)


def nll(p: Tensor, q: Tensor, z_p: Tensor, z_q: Tensor, labels: Tensor) -> Tensor:
    """SFT; SeqKD, 1606.07947, on teacher-written text: −log q(y)."""
    return -q.gather(-1, labels[:, None])[:, 0].log()


FORMULAS: dict[str, Formula] = {
    "kd": lambda p, q, *_: kl(p, q),  # Hinton et al., 1503.02531, at T = 1: KL(p ‖ q)
    "ungated": lambda p, q, *_: kl(p, q),
    "reverse-kl": lambda p, q, *_: kl(q, p),  # MiniLLM, 2306.08543: KL(q ‖ p)
    "jsd": lambda p, q, *_: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,  # GKD, 2306.13649, eq. 1, β = ½
    "total-variation": lambda p, q, *_: 0.5 * (p - q).abs().sum(-1),  # ½ Σ |p − q|
    "distillspec": lambda p, q, *_: 0.5 * (p - q).abs().sum(-1),  # DistillSpec, 2310.08461: one of its choices, TVD
    "lk-alpha": lambda p, q, *_: -overlap(p, q).log(),  # LK losses, 2602.23881: −log Σ min(p, q)
    "lk-hybrid": lk_hybrid,
    "abkd": abkd,
    "akl": akl,
    "todi": todi,
    "taid": taid,
    "seqkd": nll,
    "sft": nll,
}


def by_formula(given: Problem, formula: Formula, gated: bool) -> tuple[Tensor, Tensor]:
    """(1/N) Σ_t V_t·D_t, V_t = 0.01 + 0.99·1[argmax q_t ∈ Top-5(p_t)] where it is gated; and the gradient for z_q."""
    z_q, z_p = (given.hidden @ given.weight.T + given.bias).requires_grad_(), given.teacher
    p, q = torch.softmax(z_p, -1), torch.softmax(z_q, -1)
    weights = torch.ones(len(z_q), dtype=torch.float64)
    if gated:
        best = [set(sorted(range(p.shape[1]), key=lambda v, row=row: -row[v])[:5]) for row in p.tolist()]
        accepted = [int(row.argmax()) in top for row, top in zip(q, best, strict=True)]
        weights = 0.01 + 0.99 * torch.tensor(accepted, dtype=torch.float64)
        assert 0 < sum(accepted) < len(accepted)
    loss = (weights * formula(p, q, z_p, z_q, given.rows.labels)).mean()
    return loss.detach(), torch.autograd.grad(loss, z_q)[0]


def by_recipe(given: Problem, names: str, place: Path, chunk: int) -> tuple[Tensor, Tensor]:
    args = load_settings(None, names, ["--output_dir", str(place), "--use_cpu", "true"]).training
    objective = args.moving_objective().at(Clock(0, 0), {})
    logits = (given.hidden @ given.weight.T + given.bias).requires_grad_()
    head = LMHead(torch.eye(logits.shape[-1], dtype=torch.float64))
    output = distillation_loss(objective, logits, head, DenseTeacher(given.teacher), given.rows, chunk)
    loss = output.sum / output.count
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "+speckd"])
@pytest.mark.parametrize("recipe", FORMULAS)
def test_a_recipe_is_its_papers_formula(recipe: str, gated: bool, tmp_path: Path) -> None:
    if recipe == "sft" and gated:
        pytest.skip("no teacher, no gate: seqkd is the one that takes it")
    given = problem(seed=21, tokens=12)
    wanted = by_formula(given, FORMULAS[recipe], gated)
    for chunk in (5, 100):
        found = by_recipe(given, f"{recipe}+speckd" if gated else recipe, tmp_path, chunk)
        assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-9)
        assert torch.allclose(found[1], wanted[1], rtol=1e-9, atol=1e-12)


def test_every_baseline_without_a_gate_is_here_or_among_those_of_written_text(tmp_path: Path) -> None:
    from speckd.recipe_book import recipe_names, recipe_settings

    without = {name: recipe_settings(name) for name in recipe_names() if recipe_settings(name)["gate"] == "none"}
    on_data = {name for name, settings in without.items() if settings.get("sequence_source", "dataset") == "dataset"}
    assert set(FORMULAS) == on_data
    of_texts = {"minillm"}  # whose loss is a whole text's, by a test of its own beside those
    assert OF_WRITTEN_TEXT.keys() | of_texts == without.keys() - on_data


def test_taids_t_moves_its_target(tmp_path: Path) -> None:
    args = load_settings(None, "taid", ["--output_dir", str(tmp_path), "--use_cpu", "true"]).training
    moving: MovingObjective = args.moving_objective()
    assert [moving.at(Clock(step, 10), {}).divergence.t for step in (0, 5, 10)] == pytest.approx([0.4, 0.7, 1.0])
    given = problem(seed=22)
    end, kd = moving.at(Clock(10, 10), {}).divergence, torch.log_softmax(given.teacher, -1)
    student = torch.log_softmax(given.hidden @ given.weight.T + given.bias, -1)
    assert torch.equal(end(student, kd), (kd.exp() * (kd - student)).sum(-1))
