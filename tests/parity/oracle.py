"""An independent oracle: the loss of one token at a time, in float64, from probabilities and the papers' formulas.

It shares no code with the package: own softmax, own ranks, own sums. Autograd gives its gradients.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LIST = list[float]


@dataclass(frozen=True)
class Setting:
    """One composition, by name. `k`: top-k or candidates; `uniforms`: [N, k, 2] for Spec-k; `coins`: [N] for random gates."""

    gate: str
    rejected: str
    divergence: str
    k: int
    uniforms: Tensor
    coins: Tensor
    rate: float = 0.4
    beta: float = 0.01
    temperature: float = 1.0
    label_loss_weight: float = 0.0
    normalizer: str = "valid"


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    powers = torch.exp(logits / temperature - (logits / temperature).max())
    return powers / powers.sum()


# ---- gates: acceptance of one token, from p and q at temperature 1 as plain numbers ----------------------------------------


def in_top(p: LIST, token: int, k: int) -> bool:
    order = sorted(range(len(p)), key=lambda v: -p[v])
    return token in order[:k] and p[token] > 0


def accepts(gate: str, p: LIST, q: LIST, label: int, label_p: float, setting: Setting, row: int) -> float:
    """`p` holds 0 where a truncated teacher says nothing; `label_p` is always known."""
    k, proposal = setting.k, max(range(len(q)), key=lambda v: q[v])
    if gate == "none":
        return 1.0
    if gate == "top_k":
        return float(in_top(p, proposal, k))
    if gate == "two_sided":
        return float(in_top(p, proposal, k) or in_top(p, label, k))
    if gate == "threshold":
        return float(p[proposal] >= 0.1)
    if gate == "label_in_top_k":
        return float(in_top(p, label, k))
    if gate == "label_ratio":
        return min(1.0, label_p / q[label])
    if gate == "label_ratio_hard":
        return float(label_p >= q[label])
    if gate == "expected_spec":
        overlap = sum(min(a, b) for a, b in zip(p, q, strict=True))
        return 1 - (1 - overlap) ** k
    if gate == "random":
        return float(setting.coins[row] < setting.rate)
    if gate == "inverted":
        return 1 - accepts("top_k", p, q, label, label_p, setting, row)
    assert gate == "spec"
    for u, threshold in setting.uniforms[row].tolist():
        total, candidate = 0.0, 0
        for v, probability in enumerate(q):
            total += probability
            if total > u:
                candidate = v
                break
        if threshold < min(1.0, p[candidate] / q[candidate]):
            return 1.0
    return 0.0


# ---- divergences of one token, from probability vectors p (constant) and q --------------------------------------------------


def kl(a: Tensor, b: Tensor) -> Tensor:
    return sum((a[v] * torch.log(a[v] / b[v]) for v in range(len(a)) if a[v] > 0), torch.zeros((), dtype=torch.float64))


def overlap(p: Tensor, q: Tensor) -> Tensor:
    return sum((p[v] if bool(p[v] < q[v]) else q[v] for v in range(len(p))), torch.zeros((), dtype=torch.float64))


def diverges(name: str, p: Tensor, q: Tensor, mean_overlap: float) -> Tensor:
    """`mean_overlap`: Σ min(p, q), meant over the batch."""
    if name == "taid":  # softmax(0.6·z_q + 0.4·z_p) in probabilities: q^0.6·p^0.4, normalised
        mixed = q.detach() ** 0.6 * p**0.4
        return kl(mixed / mixed.sum(), q)
    if name == "lk_alpha":
        return -torch.log(overlap(p, q))
    if name == "lk_hybrid":
        share = math.exp(-3 * mean_overlap)
        return share * kl(p, q) + (1 - share) * diverges("total_variation", p, q, mean_overlap)
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "generalized_jsd":
        m = 0.3 * p + 0.7 * q
        return 0.3 * kl(p, m) + 0.7 * kl(q, m)
    if name == "skewed_forward_kl":
        return kl(p, 0.1 * p + 0.9 * q)
    if name == "skewed_reverse_kl":
        return kl(q, 0.9 * p + 0.1 * q)
    if name == "total_variation":
        return sum(torch.abs(p[v] - q[v]) for v in range(len(p))) / 2
    if name == "alpha_beta":
        a, b = 0.2, 0.7
        inner = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
        return -inner.sum() / (a * b)
    if name == "adaptive_kl":
        order = sorted(range(len(p)), key=lambda v: -float(p[v]))
        q_values = q.tolist()
        gap, mass, head = 0.0, 0.0, []
        for place, v in enumerate(order):
            mass += float(p[v])
            if place == 0 or mass <= 0.5:
                head.append(v)
        gap = sum(abs(float(p[v]) - q_values[v]) for v in head)
        share = gap / sum(abs(float(p[v]) - q_values[v]) for v in order)
        return share * kl(p, q) + (1 - share) * kl(q, p)
    assert name == "todi"
    total = torch.zeros((), dtype=torch.float64)
    for v in range(len(p)):
        gate = 1 / (1 + math.exp(-(math.log(float(p[v])) - math.log(float(q[v].detach())))))
        total = total + gate * p[v] * torch.log(p[v] / q[v]) + (1 - gate) * q[v] * torch.log(q[v] / p[v])
    return total


# ---- the loss --------------------------------------------------------------------------------------------------------------


def residual(p: Tensor, q: Tensor) -> Tensor:
    excess = torch.clamp(p - q.detach(), min=0)
    return kl(excess / excess.sum(), q) if excess.sum() > 0 else 0 * q.sum()


def bucketed(p: Tensor, q: Tensor, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Both on the teacher's top-K and one bucket for the rest."""
    rest = [v for v in range(len(p)) if v not in ids]
    return torch.cat([p[ids], p[rest].sum()[None]]), torch.cat([q[ids], q[rest].sum()[None]])


def loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: list[int], setting: Setting, top: int | None
) -> tuple[Tensor, float]:
    """(sum, count) over N rows. `top`: K of a truncated teacher, None for the whole distribution."""
    rows = []
    for row in range(len(labels)):
        p, q = softmax(teacher_logits[row]), softmax(student_logits[row])
        ids = sorted(range(len(p)), key=lambda v: -float(p[v]))[:top]
        known = [float(p[v]) if v in ids else 0.0 for v in range(len(p))]
        rows.append((p, q, ids, known))
    matched = setting.gate == "matched_random"
    inner = "top_k" if matched else setting.gate
    accepted = [
        accepts(inner, known, q.tolist(), labels[i], float(p[labels[i]]), setting, i) for i, (p, q, _, known) in enumerate(rows)
    ]
    if matched:
        mean = sum(accepted) / len(accepted)
        accepted = [float(setting.coins[i] < mean) for i in range(len(accepted))]
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    sides = [_sides(student_logits[i], teacher_logits[i], setting, rows[i][2] if top else None) for i in range(len(labels))]
    mean_overlap = sum(float(overlap(p, q.detach())) for p, q in sides) / max(len(sides), 1)
    for i, (_, q, _, _) in enumerate(rows):
        own, weight = _token(*sides[i], q[labels[i]], accepted[i], setting, mean_overlap)
        total = total + own
        count += weight if setting.normalizer == "weight" else 1.0
    return total, count


def _sides(student: Tensor, teacher: Tensor, setting: Setting, ids: list[int] | None) -> tuple[Tensor, Tensor]:
    p, q = softmax(teacher, setting.temperature), softmax(student, setting.temperature)
    return (p, q) if ids is None else bucketed(p, q, ids)


def _token(
    p: Tensor, q: Tensor, label_q: Tensor, accepted: float, setting: Setting, mean_overlap: float
) -> tuple[Tensor, float]:
    squared, mixed = setting.temperature**2, setting.label_loss_weight
    on = setting.beta + (1 - setting.beta) * accepted if setting.rejected == "down_weight" else accepted
    value, weight = torch.zeros((), dtype=torch.float64), on
    if on > 0 and setting.divergence == "label_nll":
        value = value - on * torch.log(label_q)
    elif on > 0:
        value = value + on * squared * diverges(setting.divergence, p, q, mean_overlap)
    if setting.rejected == "label":
        value, weight = value - (1 - accepted) * torch.log(label_q), 1.0
    if setting.rejected == "residual":
        value, weight = value + (1 - accepted) * squared * residual(p, q), 1.0
    return (1 - mixed) * value - mixed * torch.log(label_q), (1 - mixed) * weight + mixed
