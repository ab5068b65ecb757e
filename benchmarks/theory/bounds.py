"""Question 2: what does a small divergence promise of the acceptance rate?

Spec-k accepts with probability 1 − TV^k, so a bound of TV by D is a bound of Spec's TAR. Top-k is certain to accept while TV
stays below a radius that depends on the teacher alone.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.theory.model import DIVERGENCES, distance, distributions, generator, rows_of, values
from torch import Tensor

from speckd.gates import TopK

#: D_AB ≥ c·Σ(√p − √q)², c = 1/(β(α + β)), for ABKD's α = 0.2, β = 0.7 (entry by entry: `alpha_beta_constant`).
ALPHA_BETA = 1 / (0.7 * 0.9)


def pinsker(d: Tensor) -> Tensor:
    """KL ≥ 2·TV², either way round."""
    return (d / 2).sqrt().clamp(max=1)


def bretagnolle_huber(d: Tensor) -> Tensor:
    """KL ≥ −log(1 − TV²): below 1 however large the KL."""
    return (1 - (-d).exp()).sqrt()


def either(d: Tensor) -> Tensor:
    return torch.minimum(pinsker(d), bretagnolle_huber(d))


def jensen_shannon(d: Tensor) -> Tensor:
    """Pinsker on both halves of GKD's JSD at β = ½: JSD ≥ ½·TV²."""
    return (2 * d).sqrt().clamp(max=1)


def skewed(d: Tensor) -> Tensor:
    """The mixture is (1 − α) as far away, α = 0.1."""
    return (pinsker(d) / 0.9).clamp(max=1)


def jeffreys(d: Tensor) -> Tensor:
    """ToDi's value is KL(p ‖ q) + KL(q ‖ p), which is at least 4·TV² and at least −2·log(1 − TV²)."""
    return either(d / 2)


def alpha_beta(d: Tensor) -> Tensor:
    """TV² ≤ h(2 − h), h = ½ Σ(√p − √q)² ≤ D/(2c)."""
    h = (d / (2 * ALPHA_BETA)).clamp(max=1)
    return (h * (2 - h)).sqrt()


def exact(d: Tensor) -> Tensor:
    return d.clamp(max=1)


def lk_alpha(d: Tensor) -> Tensor:
    """−log(1 − TV), an equality."""
    return 1 - (-d).exp()


def lk_hybrid(d: Tensor) -> Tensor:
    """λ ≥ e^−3, so D ≥ 2λ·TV² + (1 − λ)·TV at the λ of this row, e^(−3(1 − TV)): inverted on a grid, it rises with TV."""
    grid = torch.linspace(0, 1, 20_001, dtype=d.dtype)
    share = (-3 * (1 - grid)).exp()
    least = 2 * share * grid**2 + (1 - share) * grid
    above = torch.flip(torch.cummin(torch.flip(least, [0]), 0).values, [0])  # the least D of any TV at least so large
    place = torch.searchsorted(above, d.contiguous(), right=True)
    return grid[place.clamp(max=len(grid) - 1)]


#: Divergence -> the largest TV that its value allows.
BOUNDS: dict[str, Callable[[Tensor], Tensor]] = {
    "forward_kl": either,
    "reverse_kl": either,
    "generalized_jsd": jensen_shannon,
    "skewed_forward_kl": skewed,
    "skewed_reverse_kl": skewed,
    "total_variation": exact,
    "alpha_beta": alpha_beta,
    "adaptive_kl": either,
    "todi": jeffreys,
    "lk_alpha": lk_alpha,
    "lk_hybrid": lk_hybrid,
}


def alpha_beta_constant() -> float:
    """The least of D_AB's summand over max(p, q)·(1 − √r)², r the ratio of the smaller to the larger, on a fine grid.

    For α + β ≤ 1 a probability's power α + β is at least the probability, so this times Σ(√p − √q)² is below D_AB.
    """
    r = torch.linspace(0, 0.999, 200_001, dtype=torch.float64)
    a, b, c = 0.2, 0.7, 0.9
    teacher_larger = (a / c + b / c * r**c - r**b) / (a * b)
    student_larger = (a / c * r**c + b / c - r**a) / (a * b)
    return float((torch.minimum(teacher_larger, student_larger) / (1 - r.sqrt()) ** 2).min())


def pairs(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random pairs over 2 to 32 tokens, far and near (the second half: the teacher's logits, nudged), padded to 32."""
    source = generator(seed)
    student, teacher = distributions(rows, 32, source), distributions(rows, 32, source)
    near = torch.arange(rows) >= rows // 2
    nudge = 10 ** (-2 * torch.rand(rows, 1, generator=source, dtype=torch.float64))
    student = torch.where(near[:, None], teacher + nudge * student, student)
    sizes = torch.tensor([2, 3, 8, 32])[torch.randint(4, (rows, 1), generator=source)]
    outside = torch.arange(32) >= sizes
    return student.masked_fill(outside, -40.0), teacher.masked_fill(outside, -40.0)


def check(rows: int = 40_000) -> dict[str, Any]:
    """How often the bound on TV is broken (it must not be), and how near the nearest pair comes, by decile of TV."""
    student, teacher = pairs(rows, 40)
    far = distance(student, teacher)
    found: dict[str, Any] = {}
    for name, divergence in DIVERGENCES.items():
        bound = BOUNDS[name](values(divergence, student, teacher).clamp(min=0))  # rounding leaves some at −1e-17
        promised, tar = 1 - bound, 1 - far
        slack = tar - promised
        bins = (far * 10).long().clamp(max=9)
        found[name] = {
            "broken": int((slack < -1e-4 if name == "lk_hybrid" else slack < -1e-9).sum()),
            "least_slack": float(slack.min()),
            "median_slack": float(slack.median()),
            "least_slack_by_tv": [float(slack[bins == b].min()) for b in range(10)],
            "says_nothing": float((promised <= 1e-9).double().mean()),
        }
    return found


def scatter(rows: int = 600) -> dict[str, Any]:
    """Points of a picture: D against 1 − TV, with the bound at the same D."""
    student, teacher = pairs(rows, 41)
    tar = 1 - distance(student, teacher)
    found: dict[str, Any] = {"tar": tar.tolist()}
    for name, divergence in DIVERGENCES.items():
        own = values(divergence, student, teacher)
        grid = torch.logspace(-4, math.log10(float(own.max())), 120, dtype=torch.float64)
        found[name] = {"d": own.tolist(), "grid": grid.tolist(), "bound": (1 - BOUNDS[name](grid)).tolist()}
    return found


def radius(teacher: Tensor, k: int) -> Tensor:
    """The least TV at which any student's argmax may lie outside the teacher's top k, [N], of log-probabilities [N, V].

    The cheapest way out cuts the k best tokens down to a level t and lifts the next one up to it: what is taken off,
    Σ_{i ≤ k} max(0, p_i − t), equals what is put on, t − p_{k+1}. At least half the gap between the first and the (k + 1)-th.
    """
    p = teacher.exp().sort(-1, descending=True).values
    head, following = p[:, :k], p[:, k]
    low, high = following.clone(), p[:, 0].clone()
    for _ in range(60):
        level = (low + high) / 2
        wanting = (head - level[:, None]).clamp(min=0).sum(-1) > level - following
        low, high = torch.where(wanting, level, low), torch.where(wanting, high, level)
    return (low + high) / 2 - following


def nearest_rejected(teacher: Tensor, k: int, over: float = 1e-6) -> Tensor:
    """The student, as log-probabilities, that lies just outside the radius and is rejected."""
    p = teacher.exp()
    order = p.argsort(-1, descending=True)
    level = radius(teacher, k)[:, None] + p.gather(-1, order[:, k : k + 1])
    q = torch.where(p.argsort(-1, descending=True).argsort(-1) < k, torch.minimum(p, level - over / k), p)
    q = q.scatter(-1, order[:, k : k + 1], level)
    return (q / q.sum(-1, keepdim=True)).log()


def certificate(rows: int = 20_000) -> dict[str, Any]:
    """Top-k inside the radius: rejected never; just outside, by the construction: always. The pairs are both far and near."""
    student, teacher = pairs(rows, 42)
    log_p, far = teacher.log_softmax(-1), distance(student, teacher)
    found: dict[str, Any] = {}
    for k in (1, 2, 5):
        reach = radius(log_p, k)
        accepted = TopK(k)(rows_of(student, teacher)) > 0
        outside = nearest_rejected(log_p, k)
        lost = TopK(k)(rows_of(outside, log_p)) == 0
        ordered = log_p.exp().sort(-1, descending=True).values
        boundary = ordered[:, k - 1] - ordered[:, k]
        # Below 1e-4 the construction's own margin is larger than the radius; rows of at most k tokens cannot be rejected.
        wide = (reach > 1e-4) & (ordered[:, k] > 1e-9)
        found[str(k)] = {
            "inside": int((far < reach).sum()),
            "rejected_inside": int(((far < reach) & ~accepted).sum()),
            "accepted": float(accepted.double().mean()),
            "certified": float((far < reach).double().mean()),
            "just_outside_rejected": float(lost[wide].double().mean()),
            "just_outside_gap": float((distance(outside, log_p) - reach)[wide].abs().max()),
            "median_radius": float(reach[wide].median()),
            "median_boundary_gap": float(boundary[wide].median()),
        }
    return found


def example(k: int = 2) -> dict[str, Any]:
    """The gap at the Top-k boundary alone promises nothing of its own size: two teachers with the same p_k − p_{k+1}."""
    teachers = torch.tensor([[0.80, 0.10, 0.10], [0.34, 0.33, 0.33]], dtype=torch.float64).log()
    p = teachers.exp().sort(-1, descending=True).values
    return {
        "teachers": [[round(value, 6) for value in row] for row in teachers.exp().tolist()],
        "boundary": (p[:, k - 1] - p[:, k]).tolist(),
        "radius": radius(teachers, k).tolist(),
    }
