"""Question 1: does the acceptance rate only rise? At an instant of gradient flow, along steps, and with shared parameters."""

from typing import Any

import torch
from benchmarks.theory.model import (
    DIVERGENCES,
    GATES,
    Linear,
    acceptance,
    distance,
    distributions,
    generator,
    linear_problems,
    look,
    rows_of,
    slopes,
)
from torch import Tensor

from speckd.divergences import forward_kl
from speckd.gates import NoGate, TopK
from speckd.objective import Objective
from speckd.policies import Mask

STEPS = (0.5, 2.0, 8.0)


def speculative_rate(divergence: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """d(1 − TV)/dt along the gradient flow of D in a tabular student, exactly, [N]."""
    q, p, velocity = student.softmax(-1), teacher.softmax(-1), -slopes(divergence, student, teacher)
    moved = q * (velocity - (q * velocity).sum(-1, keepdim=True))
    return -0.5 * (torch.sign(q - p) * moved).sum(-1)


def natural_rate(divergence: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """The same along the natural gradient, which divides ∂D/∂z by q (Fisher's matrix of a softmax is diag(q) − qq^T), [N]."""
    q, p, slope = student.softmax(-1), teacher.softmax(-1), slopes(divergence, student, teacher)
    return 0.5 * (torch.sign(q - p) * slope).sum(-1)


def label_rate(divergence: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """The same of the label ratio's acceptance, E_{y~p} min(1, p(y)/q(y)), [N]."""
    q, p, velocity = student.softmax(-1), teacher.softmax(-1), -slopes(divergence, student, teacher)
    moved = q * (velocity - (q * velocity).sum(-1, keepdim=True))
    return -torch.where(q > p, (p / q) ** 2 * moved, 0).sum(-1)


def tied(rows: int, vocabulary: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Students whose two best tokens are equally probable: student, teacher, the one that the teacher prefers, the other."""
    source = generator(seed)
    student, teacher = distributions(rows, vocabulary, source), distributions(rows, vocabulary, source)
    best = student.topk(2).indices
    student = student.scatter(-1, best, student.amax(-1, keepdim=True).expand(-1, 2))
    swap = teacher.gather(-1, best[:, :1]) < teacher.gather(-1, best[:, 1:])
    best = torch.where(swap, best.flip(-1), best)
    return student, teacher, best[:, :1], best[:, 1:]


def top_k_rate(divergence: Any, rows: int, vocabulary: int, seed: int) -> Tensor:
    """At such a tie, how fast the token that the teacher prefers pulls away, [rows]; below 0 a verdict is lost."""
    student, teacher, better, worse = tied(rows, vocabulary, seed)
    velocity = -slopes(divergence, student, teacher)
    return (velocity.gather(-1, better) - velocity.gather(-1, worse))[:, 0]


def flow(rows: int = 60_000) -> dict[str, Any]:
    """Random pairs, one instant of flow each: how often acceptance falls, and the steepest fall."""
    found: dict[str, Any] = {}
    for name, divergence in DIVERGENCES.items():
        own: dict[str, Any] = {}
        for vocabulary in (2, 3, 8):
            source = generator(vocabulary)
            student, teacher = distributions(rows, vocabulary, source), distributions(rows, vocabulary, source)
            rates = {
                "top_k": top_k_rate(divergence, rows, vocabulary, vocabulary),
                "spec_1": speculative_rate(divergence, student, teacher),
                "spec_1_natural": natural_rate(divergence, student, teacher),
                "label_ratio": label_rate(divergence, student, teacher),
            }
            own[str(vocabulary)] = {
                measure: {"falls": float((rate < -1e-9).double().mean()), "steepest": float(rate.min())}
                for measure, rate in rates.items()
            }
        found[name] = own
    return found


def rounded_counterexample(divergence: Any, measure: Any, rows: int = 60_000) -> dict[str, Any] | None:
    """The steepest fall among random pairs over three tokens, in whole hundredths (else thousandths), no entry alike."""
    for digits in (2, 3):
        found = _steepest(divergence, measure, rows, digits)
        if found is not None:
            return found
    return None


def _steepest(divergence: Any, measure: Any, rows: int, digits: int) -> dict[str, Any] | None:
    source = generator(3)
    student, teacher = (_rounded(distributions(rows, 3, source), digits) for _ in range(2))
    # Where q(v) = p(v) the sign of their difference is rounding's.
    apart = ((student - teacher).abs().amin(-1) > 5e-4) & (student.amin(-1) > 0) & (teacher.amin(-1) > 0)
    student, teacher = student[apart].log(), teacher[apart].log()
    rate = measure(divergence, student, teacher)
    worst = int(rate.argmin())
    if rate[worst] > -1e-9:
        return None
    shown = {"student": _shown(student[worst]), "teacher": _shown(teacher[worst])}
    return shown | {"rate": float(rate[worst]), "distance": float(distance(student, teacher)[worst])}


def _rounded(logits: Tensor, digits: int) -> Tensor:
    head = logits.softmax(-1)[:, :-1].round(decimals=digits)
    return torch.cat([head, (1 - head.sum(-1, keepdim=True)).round(decimals=digits).clamp(min=0)], -1)


def counterexamples() -> dict[str, Any]:
    """Per divergence: an instant of flow at which Spec-1's acceptance falls, and the label ratio's; None: none found."""
    return {
        name: {"spec_1": rounded_counterexample(own, speculative_rate), "label_ratio": rounded_counterexample(own, label_rate)}
        for name, own in DIVERGENCES.items()
    }


def _shown(log_probs: Tensor) -> list[float]:
    return [round(value, 6) for value in log_probs.exp().tolist()]


def steps(rows: int = 600, vocabulary: int = 8, length: int = 100) -> dict[str, Any]:
    """Gradient descent of tabular students: the share of contexts that ever lose acceptance, by divergence, gate and step."""
    source = generator(10)
    start, teacher = distributions(rows, vocabulary, source), distributions(rows, vocabulary, source)
    found: dict[str, Any] = {}
    for name, divergence in DIVERGENCES.items():
        for gate in ("none", "top_1", "spec_1", "label_ratio"):
            for size in STEPS:
                fall = _falls_of_rows(divergence, gate, size, start, teacher, length)
                found.setdefault(name, {}).setdefault(gate, {})[f"{size:g}"] = fall
    return found


def _falls_of_rows(divergence: Any, gate: str, size: float, start: Tensor, teacher: Tensor, length: int) -> dict[str, Any]:
    """Each context under its own gate; ungated ones are judged by both verdicts."""
    objective = Objective(GATES[gate], Mask(), divergence)
    judged = ("top_1", "spec_1") if gate == "none" else (gate,)
    z = start.clone()
    before = {judge: acceptance(GATES[judge], z, teacher) for judge in judged}
    largest = {judge: torch.zeros_like(before[judge]) for judge in judged}
    for _ in range(length):
        z = z - size * look(objective, z, teacher).gradient
        for judge in judged:
            now = acceptance(GATES[judge], z, teacher)
            largest[judge] = torch.maximum(largest[judge], before[judge] - now)
            before[judge] = now
    return {
        judge: {"falls": float((largest[judge] > 1e-9).double().mean()), "largest": float(largest[judge].max())}
        for judge in judged
    }


def gap(problems: int = 100, length: int = 150, size: float = 1.0) -> dict[str, Any]:
    """Linear students that cannot represent the teacher: the share of problems whose TAR ever falls, and where they end.

    Full batch, and with half the contexts drawn at random at every step; each gate judged by itself, none by two of them.
    """
    problem = linear_problems(problems, contexts=6, width=2, vocabulary=4, seed=20)
    found: dict[str, Any] = {}
    for name, divergence in DIVERGENCES.items():
        for gate in GATES:
            for batch in ("full", "half"):
                own = _falls_of_problems(divergence, gate, batch == "half", problem, length, size)
                found.setdefault(name, {}).setdefault(gate, {})[batch] = own
    return found


def _falls_of_problems(divergence: Any, gate: str, halved: bool, problem: Linear, length: int, size: float) -> dict[str, Any]:
    objective = Objective(GATES[gate], Mask(), divergence)
    judged = ("top_1", "spec_1") if gate == "none" else (gate,)
    source = generator(21)
    problems, contexts = problem.features.shape[:2]
    theta = torch.randn(problems, problem.features.shape[2], 4, generator=source, dtype=torch.float64)
    before = start = _rates(judged, problem, theta)
    largest = torch.zeros_like(before)
    for _ in range(length):
        gradient = look(objective, problem.logits(theta), problem.teacher, contexts).gradient
        if halved:
            order = torch.rand(problems, contexts, generator=source).argsort(-1)
            gradient = gradient * 2 * (order < contexts // 2).double().view(-1, 1)
        theta = theta - size * problem.pull(gradient)
        now = _rates(judged, problem, theta)
        largest, before = torch.maximum(largest, before - now), now
    last = problem.logits(theta)
    found: dict[str, Any] = {"kl_end": float(forward_kl(last.log_softmax(-1), problem.teacher.log_softmax(-1)).mean())}
    for place, judge in enumerate(judged):
        found[judge] = {
            "falls": float((largest[place] > 1e-6).double().mean()),
            "largest": float(largest[place].max()),
            "tar_start": float(start[place].mean()),
            "tar_end": float(before[place].mean()),
            "ends_lower": float((before[place] < start[place] - 1e-6).double().mean()),
        }
    return found


def _rates(judged: tuple[str, ...], problem: Linear, theta: Tensor) -> Tensor:
    """[judges, P] acceptance rates."""
    z = problem.logits(theta)
    return torch.stack([problem.mean(acceptance(GATES[judge], z, problem.teacher)) for judge in judged])


def shared_example(size: float = 0.1, length: int = 600) -> dict[str, Any]:
    """The smallest example found: two contexts that share one vector of logits, three tokens, Top-2, forward KL, mask.

    Both contexts are accepted at first. What they are taught moves the student's best token to one that the second context's
    teacher does not have among its two best, and then that context is never taught again.
    """
    teacher = torch.tensor([[0.30, 0.68, 0.02], [0.30, 0.10, 0.60]], dtype=torch.float64).log()
    problem = Linear(torch.ones(1, 2, 1, dtype=torch.float64), teacher)
    return _trace(problem, torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float64), 2, size, length)


def linear_example(size: float = 0.5, length: int = 600) -> dict[str, Any]:
    """The same with Top-1 and two tokens: three contexts at x = −1, 0, 1, logit difference a·x + b (two parameters)."""
    teacher = torch.tensor([[0.05, 0.95], [0.55, 0.45], [0.60, 0.40]], dtype=torch.float64).log()
    features = torch.tensor([[[-1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    return _trace(Linear(features, teacher), torch.tensor([[[1.0, 0.0], [0.1, 0.0]]], dtype=torch.float64), 1, size, length)


def _trace(problem: Linear, theta: Tensor, k: int, size: float, length: int) -> dict[str, Any]:
    """TAR under the gate that trains and KL of each context, gated and not, from one start."""
    found: dict[str, Any] = {}
    for name, gate in (("gated", TopK(k)), ("ungated", NoGate())):
        objective, now = Objective(gate, Mask(), forward_kl), theta.clone()
        rates, losses, taught = [], [], []
        for _ in range(length):
            z = problem.logits(now)
            step = look(objective, z, problem.teacher)
            rates.append(float(TopK(k)(rows_of(z, problem.teacher)).mean()))
            losses.append(forward_kl(z.log_softmax(-1), problem.teacher.log_softmax(-1)).tolist())
            taught.append(float(step.loss.mean()))
            now = now - size * problem.pull(step.gradient)
        found[name] = {"tar": rates, "kl": losses, "loss": taught}
    return found


def theorem_rate(rows: int = 60_000, vocabulary: int = 8) -> dict[str, Any]:
    """κ = (dTAR/dt)/(1 − TAR) along ungated flow, TAR that of one expected candidate: its least value by decile of TAR."""
    source = generator(30)
    student, teacher = distributions(rows, vocabulary, source), distributions(rows, vocabulary, source)
    short = distance(student, teacher)
    found: dict[str, Any] = {}
    for name, divergence in DIVERGENCES.items():
        kappa = speculative_rate(divergence, student, teacher) / short
        bins = ((1 - short) * 10).long().clamp(max=9)
        found[name] = {
            "least": [float(kappa[bins == b].min()) for b in range(10)],
            "median": [float(kappa[bins == b].median()) for b in range(10)],
        }
    return found
