"""Brute-force selections in float64, one token at a time, from the papers' formulas; nothing is shared with the package.

p teacher, q student, r reference, y the data's token, all as lists of probabilities.
"""

import math
from collections.abc import Callable

LIST = list[float]


def entropy(p: LIST) -> float:
    return -sum(v * math.log(v) for v in p if v > 0)


def kl(a: LIST, b: LIST) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def quantile(values: LIST, at: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(values)
    place = at * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def unit(values: LIST) -> LIST:
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


def tip(ps: list[LIST], qs: list[LIST]) -> LIST:
    """2604.14084: h = H(q)/log|V|, delta = KL(q||p); clip the top 2 % of h, min-max both, s = h + d - h·d."""
    h = [entropy(q) / math.log(len(q)) for q in qs]
    top = quantile(h, 0.98)
    h = unit([min(v, top) for v in h])
    d = unit([kl(q, p) for p, q in zip(ps, qs, strict=True)])
    return [a + b - a * b for a, b in zip(h, d, strict=True)]


def teachability(ps: list[LIST], qs: list[LIST], forward: bool = False, top: int = 16) -> LIST:
    """2605.26844: s = N(KL)·N(C), C = Σ_{v in TopK(q)} p(v), K = 16, N clips to the 5 to 95 % quantiles and puts on [0, 1]."""

    def scaled(values: LIST) -> LIST:
        low, high = quantile(values, 0.05), quantile(values, 0.95)
        return unit([min(max(v, low), high) for v in values])

    divergence = [kl(p, q) if forward else kl(q, p) for p, q in zip(ps, qs, strict=True)]
    considered = []
    for p, q in zip(ps, qs, strict=True):
        best = sorted(range(len(q)), key=lambda v: -q[v])[:top]
        considered.append(sum(p[v] for v in best))
    return [a * b for a, b in zip(scaled(divergence), scaled(considered), strict=True)]


#: name -> (scores of a batch, fraction, are sequences ranked each by itself?), with the methods' own defaults.
ORACLES: dict[str, tuple[Callable[[list[LIST], list[LIST], list[LIST], list[int]], LIST], float, bool]] = {
    # SE-KD 2602.01395: u(t) = H(q_t); m_t = 1[u(t) >= tau], tau such that exactly ceil(k(L-1)) are kept; k = 20 %.
    "student_entropy": (lambda ps, qs, rs, ys: [entropy(q) for q in qs], 0.2, True),
    # Its comparison, table 1: teacher entropy H(p_t).
    "teacher_entropy": (lambda ps, qs, rs, ys: [entropy(p) for p in ps], 0.2, True),
    "total_variation": (
        lambda ps, qs, rs, ys: [sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2 for p, q in zip(ps, qs, strict=True)],
        0.5,
        False,
    ),
    # AdaKD 2510.11615: Hellinger distance ||sqrt p - sqrt q|| / sqrt 2, top r of the batch's tokens.
    "hellinger": (
        lambda ps, qs, rs, ys: [
            math.sqrt(sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(p, q, strict=True))) / math.sqrt(2)
            for p, q in zip(ps, qs, strict=True)
        ],
        0.5,
        False,
    ),
    # ATKD 2402.11890: uncertainty u = 1 - p(y); the top 50 % of the batch are hard.
    "label_uncertainty": (lambda ps, qs, rs, ys: [1 - p[y] for p, y in zip(ps, ys, strict=True)], 0.5, False),
    "tip": (lambda ps, qs, rs, ys: tip(ps, qs), 0.5, False),
    "teachability": (lambda ps, qs, rs, ys: teachability(ps, qs), 0.05, False),
    # AdaSPEC 2510.19779: the 40 % largest KL(p||q) - KL(p||q_ref).
    "excess_divergence": (
        lambda ps, qs, rs, ys: [kl(p, q) - kl(p, r) for p, q, r in zip(ps, qs, rs, strict=True)],
        0.4,
        False,
    ),
    # Rho-1 2404.07965: excess loss CE(y, q) - CE(y, reference), the top 60 %.
    "excess_label_loss": (
        lambda ps, qs, rs, ys: [math.log(r[y]) - math.log(q[y]) for q, r, y in zip(qs, rs, ys, strict=True)],
        0.6,
        False,
    ),
}


def chosen(scores: LIST, samples: list[int], fraction: float, per_sequence: bool, lowest: bool = False) -> set[int]:
    """The rows among the ceil(fraction·n) first; scores are distinct."""
    groups = [[i for i, own in enumerate(samples) if own == sample] for sample in sorted(set(samples))]
    found: set[int] = set()
    for group in groups if per_sequence else [list(range(len(scores)))]:
        ranked = sorted(group, key=lambda i: scores[i] if lowest else -scores[i])
        found |= set(ranked[: math.ceil(round(fraction * len(group), 9))])
    return found
