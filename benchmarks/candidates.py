"""What is compared: this package's loss, the same written plainly on full logits, and the bare matrix products."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from problem import VERIFY_TOP_K, Problem
from speckd import LMHead, Objective, distillation_loss
from speckd.config import DIVERGENCES
from speckd.early_rejection import EarlyRejection
from speckd.engine import default_chunk_size
from speckd.gates import NoGate, TopK
from speckd.policies import Label, Mask
from speckd.reference import speckd_loss
from speckd.teachers import HiddenTeacher, TopKTeacher
from speckd.types import TeacherRows

FORWARD_KL, JSD, CACHED, FROZEN, REST = "forward KL", "JSD", "cached top-32 teacher", "frozen head", "other divergences"
FAMILIES = (FORWARD_KL, JSD, CACHED, FROZEN, REST)
NAIVE = "naive SpecKD, full logits"
Teacher = Literal["dense", "top-K and tail", "top-K renormalised"]


@dataclass(frozen=True)
class Loss:
    """What a candidate says that it computes, as the mean over supervised rows: enough for `plain` to compute it again.

    `divergence`: its name in this package; `gated`: only rows that the Top-5 gate accepts; `label`: the others learn a label.
    """

    divergence: str
    gated: bool = False
    label: bool = False
    teacher: Teacher = "dense"

    def __str__(self) -> str:
        who = "" if self.teacher == "dense" else f", {self.teacher}"
        rejected = "label" if self.label else "mask"
        return self.divergence + who + (f", Top-{VERIFY_TOP_K} and {rejected}" if self.gated else ", ungated")


@dataclass(frozen=True)
class Candidate:
    """`run(problem, chunk)` gives the loss, a scalar whose backward leaves gradients in `problem.hidden` and `problem.head`.

    `gate_rounds`: its gate sees logits in the inputs' precision, so that in bfloat16 some verdicts come out otherwise.
    """

    name: str
    family: str
    loss: Loss
    run: Callable[[Problem, int], Tensor]
    ours: bool = False
    compiled: bool = False
    gate_rounds: bool = False

    @property
    def frozen(self) -> bool:
        return self.family == FROZEN

    @property
    def key(self) -> str:
        return f"{self.family}: {self.name}"

    def step(self, problem: Problem, chunk: int) -> Tensor:
        """Loss and gradients, as in a training step."""
        problem.start(self.frozen)
        loss = self.run(problem, chunk)
        loss.backward()
        return loss.detach()


# ---- this package --------------------------------------------------------------------------------------------------------


def our_chunk(rows: int, vocabulary: int, device_type: str) -> int:
    """Rows of the engine's chunks at its default, balanced: what "equal chunk" means for the peers."""
    chunks = -(-rows // default_chunk_size(vocabulary, device_type))
    return -(-rows // chunks)


def ours(name: str, family: str, loss: Loss, early_rejection: bool = False) -> Candidate:
    objective = Objective(
        gate=TopK(VERIFY_TOP_K) if loss.gated else NoGate(),
        rejected=Label() if loss.label else Mask(),
        divergence=DIVERGENCES[loss.divergence](),
    )

    def run(problem: Problem, chunk: int) -> Tensor:
        teacher: TeacherRows = HiddenTeacher(problem.teacher_hidden, LMHead(problem.teacher_head))
        if loss.teacher != "dense":
            teacher = TopKTeacher(problem.top_ids, problem.top_log_probs, problem.label_log_probs)
        certify = EarlyRejection() if early_rejection else None
        output = distillation_loss(objective, problem.hidden, LMHead(problem.head), teacher, problem.rows, chunk, certify)
        return output.sum / output.count

    return Candidate(f"ours, {name}", family, loss, run, ours=True)


def all_ours() -> list[Candidate]:
    found = []
    for family, divergence in ((FORWARD_KL, "forward_kl"), (JSD, "generalized_jsd"), (FROZEN, "forward_kl")):
        gated = Loss(divergence, gated=True)
        found += [ours("ungated", family, Loss(divergence)), ours("gated", family, gated)]
        found += [ours("gated, early rejection", family, gated, early_rejection=True)]
        found += [ours("gated, label", family, Loss(divergence, gated=True, label=True))]
    for gated in (False, True):
        found.append(ours("gated" if gated else "ungated", CACHED, Loss("forward_kl", gated, teacher="top-K and tail")))
    for divergence in DIVERGENCES:
        if divergence not in ("forward_kl", "generalized_jsd"):
            found.append(ours(f"{divergence}, gated", REST, Loss(divergence, gated=True)))
    return found


# ---- the same, plainly ---------------------------------------------------------------------------------------------------


def plain(loss: Loss, problem: Problem) -> Tensor:
    """The loss on full logits: in float64 what every candidate is checked against, in float32 the naive candidate."""
    student = full_logits(problem.hidden, problem.head)
    supervised, count = problem.supervised, problem.supervised.sum()
    if loss.teacher == "dense":
        teacher = full_logits(problem.teacher_hidden, problem.teacher_head)
        beta, divergence = 0.0 if loss.gated else 1.0, DIVERGENCES[loss.divergence]()
        value, _ = speckd_loss(student[None], teacher[None], supervised[None], VERIFY_TOP_K, beta, divergence)
    else:
        q, p = (_renormalised if loss.teacher == "top-K renormalised" else _with_tail)(student, problem)
        counted = supervised & problem.accepted if loss.gated else supervised
        value = (DIVERGENCES[loss.divergence]()(q, p) * counted).sum() / count
    if loss.label:
        rejected = supervised & ~problem.accepted
        value = value + cross_entropy(student[rejected], problem.labels[rejected], reduction="sum") / count
    return value


def full_logits(hidden: Tensor, head: Tensor) -> Tensor:
    logits = linear(hidden, head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _renormalised(student: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    return student.gather(-1, problem.top_ids).log_softmax(-1), problem.top_log_probs.log_softmax(-1)


def _with_tail(student: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Log-probabilities over the teacher's top-K and one bucket for the rest."""
    outside = student.scatter(-1, problem.top_ids, -torch.inf).logsumexp(-1, keepdim=True)
    inside, whole = student.gather(-1, problem.top_ids), student.logsumexp(-1, keepdim=True)
    tail = torch.log1p(-problem.top_log_probs.exp().sum(-1, keepdim=True))
    return torch.cat([inside, outside], -1) - whole, torch.cat([problem.top_log_probs, tail], -1)


def naive() -> list[Candidate]:
    losses = {FORWARD_KL: Loss("forward_kl", gated=True), JSD: Loss("generalized_jsd", gated=True)}
    losses[CACHED] = Loss("forward_kl", gated=True, teacher="top-K and tail")
    losses[FROZEN] = losses[FORWARD_KL]
    return [
        Candidate(NAIVE, family, loss, lambda problem, chunk, loss=loss: plain(loss, problem), gate_rounds=True)
        for family, loss in losses.items()
    ]


# ---- the bare products ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floor:
    """Only the matrix products that a loss cannot do without, each one whole `torch.mm` into memory that is already there.

    Student logits of the M supervised rows; the teacher's unless it is cached; dH, and dW unless the head is frozen, of the
    rows that have a gradient: all M, or the accepted ones.
    """

    family: str
    gated: bool

    @property
    def name(self) -> str:
        return f"floor: bare products, {'gated' if self.gated else 'ungated'}"

    @property
    def key(self) -> str:
        return f"{self.family}: {self.name}"

    def prepare(self, problem: Problem) -> Callable[[], None]:
        """What is to be timed. All floors write to the same memory."""
        rows = problem.rows.index
        hidden, head = problem.hidden.detach()[rows], problem.head.detach()
        teacher_hidden, teacher_head = problem.teacher_hidden[rows], problem.teacher_head
        logits, teacher_logits, head_gradient = problem.scratch
        with_gradient = problem.accepted_count if self.gated else len(rows)
        gradient, few = logits[:with_gradient], hidden[:with_gradient]
        hidden_gradient = torch.empty_like(few)

        def products() -> None:
            torch.mm(hidden, head.T, out=logits)
            if self.family != CACHED:
                torch.mm(teacher_hidden, teacher_head.T, out=teacher_logits)
            torch.mm(gradient, head, out=hidden_gradient)
            if self.family != FROZEN:
                torch.mm(gradient.T, few, out=head_gradient)

        return products


def floor_of(candidate: Candidate) -> Floor:
    """A masked row has no gradient; one that falls back to its label has."""
    return Floor(candidate.family, candidate.loss.gated and not candidate.loss.label)
