"""A synthetic distillation problem at the head: hidden states, two heads, labels, and a gate that accepts a wanted share.

Student and teacher are related as two models of one family are. The teacher's head is the student's head with more columns; at
a row to be accepted its hidden state is the student's with noise, at a row to be rejected it is mixed with another row's, so
that the proposal is a near miss or worse. Rows that came out wrong are moved until the gate's verdict is the wanted one; the
rate reached and the proposals' rank are printed. Logits spread so that entropies are a few nats, as a language model's are.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from speckd.tokens import SupervisedRows
from speckd.types import IGNORED_LABEL, TokenKeys

VERIFY_TOP_K = 5  # the gate of every gated candidate
CACHED_TOP_K = 32  # what a cached teacher keeps of a row
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Shape:
    """N positions, of which a share is supervised, of which a share is to be accepted; V tokens; the hidden widths.

    `far`: at a row to be rejected the teacher thinks of another row altogether, instead of a mixture.
    """

    positions: int
    vocabulary: int
    supervised: float = 0.6
    acceptance: float = 0.5
    far: bool = False
    student_width: int = 512
    teacher_width: int = 1024
    seed: int = 0


@dataclass
class Problem:
    """`hidden` [N, Hs] and `head` [V, Hs] gather gradients; the teacher is given as hidden states and as a cached top-K.

    `labels`: [N], −100 where not supervised; `accepted`: [N], the Top-5 verdict; `top_ids`, `top_log_probs`: [N, 32];
    `label_log_probs`: [N], the teacher's; `facts`: what to print about it.
    """

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor
    accepted: Tensor
    top_ids: Tensor
    top_log_probs: Tensor
    label_log_probs: Tensor
    facts: dict[str, float]

    @cached_property
    def supervised(self) -> Tensor:
        return self.labels != IGNORED_LABEL

    @cached_property
    def rows(self) -> SupervisedRows:
        index = self.supervised.nonzero()[:, 0]
        return SupervisedRows(index, self.labels[index], TokenKeys(torch.zeros_like(index), index))

    @cached_property
    def scratch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for the bare products: two [M, V], one [V, Hs]; written once, so that it is there."""
        logits = self.head.new_ones(len(self.rows), len(self.head))
        return logits, torch.ones_like(logits), torch.ones_like(self.head)

    @property
    def accepted_count(self) -> int:
        return int((self.accepted & self.supervised).sum())

    def start(self, frozen_head: bool) -> None:
        """Forgets the gradients of the step before."""
        self.hidden.grad = self.head.grad = None
        self.hidden.requires_grad_()
        self.head.requires_grad_(not frozen_head)

    def to(self, dtype: torch.dtype) -> "Problem":
        names = ("hidden", "head", "teacher_hidden", "teacher_head", "top_log_probs", "label_log_probs")
        return replace(self, **{name: getattr(self, name).detach().to(dtype) for name in names})


@torch.no_grad()
def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Problem:
    if shape.teacher_width <= shape.student_width:
        raise SystemExit(f"teacher_width {shape.teacher_width} must exceed student_width {shape.student_width}: it extends it")
    generator = torch.Generator(device).manual_seed(shape.seed)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device)

    n, more = shape.positions, shape.teacher_width - shape.student_width
    spread = math.sqrt(2 * math.log(shape.vocabulary))
    head = normal(shape.vocabulary, shape.student_width) / math.sqrt(shape.student_width)
    teacher_head = torch.cat([head, normal(shape.vocabulary, more) / math.sqrt(more)], -1).to(dtype)
    head, hidden = head.to(dtype), spread * normal(n, shape.student_width)
    wanted, supervised = _wanted(shape, generator, device)
    noise, extra = spread * normal(n, shape.student_width), spread * normal(n, more)
    size = torch.full((n, 1), 0.3, device=device)  # of the noise
    share = 0.4 + 0.3 * torch.rand(n, 1, generator=generator, device=device)  # of another row, at a row to be rejected
    if shape.far:
        share.fill_(1)
    ranks, wrong = torch.zeros(n, dtype=torch.long, device=device), torch.ones(n, dtype=torch.bool, device=device)
    for _ in range(12):
        mixed = (share * hidden.roll(1, 0) + (1 - share) * hidden) / (share**2 + (1 - share) ** 2).sqrt()
        follows = torch.where(wanted[:, None], hidden + size * noise, mixed)
        teacher_hidden = torch.cat([follows, size * extra], -1).to(dtype)
        ranks[wrong] = _ranks(hidden[wrong].to(dtype), head, teacher_hidden[wrong], teacher_head)
        accepted = ranks < VERIFY_TOP_K
        wrong = accepted != wanted
        if not wrong.any():
            break
        size = torch.where((wrong & wanted)[:, None], size / 2, size)
        share = torch.where((wrong & ~wanted)[:, None], share + 0.1, share).clamp(max=1)
    labels, top_ids, top_log_probs, label_log_probs, entropy = _teacher_says(teacher_hidden, teacher_head, generator)
    facts = {
        "supervised rows": int(supervised.sum()),
        "accepted rows": int((accepted & supervised).sum()),
        "acceptance rate": float(accepted[supervised].float().mean()),
        "teacher's entropy in nats": float(entropy.mean()),
        f"teacher's mass in its top {CACHED_TOP_K}": float(top_log_probs.exp().sum(-1).mean()),
    }
    rejected = supervised & ~accepted
    if rejected.any():
        facts["median rank of a rejected proposal"] = 1 + int(ranks[rejected].median())
    return Problem(
        hidden.to(dtype),
        head,
        teacher_hidden,
        teacher_head,
        labels.where(supervised, IGNORED_LABEL),
        accepted,
        top_ids,
        top_log_probs,
        label_log_probs,
        facts,
    )


def _wanted(shape: Shape, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """[N] bool twice: which rows the gate shall accept, and which are supervised; both shares are met exactly."""
    order = torch.randperm(shape.positions, generator=generator, device=device)
    count = round(shape.supervised * shape.positions)
    wanted, supervised = (torch.zeros(shape.positions, dtype=torch.bool, device=device) for _ in range(2))
    supervised[order[:count]] = True
    wanted[order[: round(shape.acceptance * count)]] = True
    return wanted, supervised


def _ranks(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """[n]: how many tokens the teacher prefers to the student's best one. Logits are float32, as the gate's are."""
    found = []
    hidden, head, teacher_hidden, teacher_head = (x.float() for x in (hidden, head, teacher_hidden, teacher_head))
    for student, teacher in zip(hidden.split(ROWS_AT_ONCE), teacher_hidden.split(ROWS_AT_ONCE), strict=True):
        proposal = (student @ head.T).argmax(-1, keepdim=True)
        logits = teacher @ teacher_head.T
        found.append((logits > logits.gather(-1, proposal)).sum(-1))
    return torch.cat(found)


def _teacher_says(hidden: Tensor, head: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Labels drawn from the teacher, its top-K ids and log-probabilities, its log-probability of the label, its entropy."""
    parts = []
    hidden, head = hidden.float(), head.float()
    for rows in hidden.split(ROWS_AT_ONCE):
        log_probs = (rows @ head.T).log_softmax(-1)
        labels = log_probs.exp().multinomial(1, generator=generator)
        top = log_probs.topk(CACHED_TOP_K)
        entropy = torch.special.entr(log_probs.exp()).sum(-1)
        parts.append((labels[:, 0], top.indices, top.values, log_probs.gather(-1, labels)[:, 0], entropy))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
