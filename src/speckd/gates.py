"""Propose → verify: which tokens the student may learn from the teacher. (Weigh is `policies.py`, diverge `divergences.py`.)

A gate maps `Rows` to an acceptance in [0, 1] per row, without gradient; `monotone` says that a teacher who thinks less of a
token never makes it accept more, so that its rejections can be proved from a part of the teacher's logits. Notation: p teacher,
q student, y the data's token.

Greedy Top-k and Spec-k are the paper's (arXiv 2510.24021); what is ours says so. All verdicts are taken at temperature 1.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from speckd.errors import ConfigError
from speckd.randomness import uniforms
from speckd.types import BatchGate, Gate, Rows, TokenKeys, needs_reference, notation_of

# ---- propose -------------------------------------------------------------------------------------------------------------


def propose_greedy(rows: Rows) -> Tensor:
    """The student's own most probable token, [N]."""
    return rows.student.argmax()


def propose_candidates(rows: Rows, draws: Tensor) -> Tensor:
    """Independent samples of the student by inverse CDF, duplicates possible: uniforms [N, C] -> token ids [N, C]."""
    return rows.student.sample(draws)


# ---- verify --------------------------------------------------------------------------------------------------------------


def verify_in_top_k(rows: Rows, token_ids: Tensor, k: int) -> Tensor:
    """[N] ids -> [N] bool: the token is among the teacher's k most probable."""
    return rows.teacher.in_top_k(token_ids, k)


def verify_speculative(rows: Rows, candidates: Tensor, draws: Tensor) -> Tensor:
    """Speculative decoding's test, each candidate by its own uniform: [N, C] ids, [N, C] uniforms -> [N, C] bool."""
    student = rows.student.log_prob(candidates).double().exp()
    teacher = rows.teacher.log_prob(candidates).double().exp()
    return draws * student < teacher  # u < p/q, without the division


def label_ratio(rows: Rows) -> Tensor:
    """p(y)/q(y), [N]: how much better the teacher explains the data than the student does; 0 where p(y) is 0, whatever q(y)."""
    teacher = rows.teacher.label_log_prob(rows.labels)
    return torch.where(teacher > -torch.inf, teacher - rows.student_label_log_prob, -torch.inf).exp()


# ---- the paper's gates ---------------------------------------------------------------------------------------------------


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} is {value}", f"Use {name} of at least 1 (the paper's default is 5)")


def _require_whole(rows: Rows, allow_lower_bound: bool, why: str) -> None:
    if not allow_lower_bound:
        rows.teacher.require_whole(rows.student_logits.shape[-1], why)


@dataclass(frozen=True)
class TopK:
    """Greedy Top-k: accepted iff the student's argmax is among the teacher's k most probable tokens."""

    monotone: ClassVar[bool] = True
    verify_top_k: int = 5

    def __post_init__(self) -> None:
        _require_positive("verify_top_k", self.verify_top_k)

    @property
    def notation(self) -> str:
        return f"1[argmax q_t ∈ Top-{self.verify_top_k}(p_t)]"

    def __call__(self, rows: Rows) -> Tensor:
        proposal = propose_greedy(rows)
        return verify_in_top_k(rows, proposal, self.verify_top_k).to(rows.student_logits.dtype)


@dataclass(frozen=True)
class Spec:
    """Spec-k: the student draws k candidates; accepted iff at least one passes `min(1, p/q)` with its own uniform.

    `allow_lower_bound`: with a teacher that gives its top-K only, a candidate inside is judged exactly and one outside counts
    as rejected; without it, such a teacher is refused.
    """

    monotone: ClassVar[bool] = True
    candidates: int = 5
    allow_lower_bound: bool = False

    def __post_init__(self) -> None:
        _require_positive("candidates", self.candidates)

    @property
    def notation(self) -> str:
        return f"1[some i ≤ {self.candidates}: u_i < min(1, p_t(v_i)/q_t(v_i))]; v_i ~ q_t"

    def __call__(self, rows: Rows) -> Tensor:
        _require_whole(rows, self.allow_lower_bound, "spec needs the teacher's probability of whatever the student draws")
        keys = rows.keys
        draws = uniforms(keys.seed, keys.epoch, keys.sample, keys.position, self.candidates)
        candidates = propose_candidates(rows, draws[..., 0])
        return verify_speculative(rows, candidates, draws[..., 1]).any(-1).to(rows.student_logits.dtype)


@dataclass(frozen=True)
class ExpectedSpec:
    """Spec-k's probability of acceptance, `1 − TV(p, q)^k`, as a weight: the same on average, without variance. Ours.

    `allow_lower_bound`: as of `Spec`.
    """

    candidates: int = 5
    allow_lower_bound: bool = False

    def __post_init__(self) -> None:
        _require_positive("candidates", self.candidates)

    @property
    def notation(self) -> str:
        return f"1 − TV(p_t, q_t)^{self.candidates}"

    def __call__(self, rows: Rows) -> Tensor:
        _require_whole(rows, self.allow_lower_bound, "expected_spec needs the whole of the teacher's distribution")
        total_variation = 1 - rows.teacher.overlap(rows.student)
        return 1 - total_variation**self.candidates


@dataclass(frozen=True)
class Threshold:
    """Accepted iff the teacher gives the student's argmax a probability of at least `threshold`: Top-k's test without ranks,
    which a controller can move without steps. Ours. (A top-K teacher rejects a proposal outside, though its own may be above.)
    """

    monotone: ClassVar[bool] = True
    threshold: float = 0.1
    allow_lower_bound: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold is {self.threshold}", "Use a threshold above 0, up to 1")

    @property
    def notation(self) -> str:
        return f"1[p_t(argmax q_t) ≥ {self.threshold:.4g}]"

    def __call__(self, rows: Rows) -> Tensor:
        _require_whole(rows, self.allow_lower_bound, "threshold needs the teacher's probability of the student's token")
        proposed = rows.teacher.log_prob(propose_greedy(rows)[:, None])[:, 0]
        return (proposed >= math.log(self.threshold)).to(rows.student_logits.dtype)


# ---- verifying the teacher against the data: ours ------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoSided:
    """Accepted iff the student's proposal *or* the data's token is among the teacher's k most probable."""

    monotone: ClassVar[bool] = True
    verify_top_k: int = 5

    def __post_init__(self) -> None:
        _require_positive("verify_top_k", self.verify_top_k)

    @property
    def notation(self) -> str:
        return f"1[argmax q_t ∈ Top-{self.verify_top_k}(p_t) or y_t ∈ Top-{self.verify_top_k}(p_t)]"

    def __call__(self, rows: Rows) -> Tensor:
        proposed = verify_in_top_k(rows, propose_greedy(rows), self.verify_top_k)
        written = verify_in_top_k(rows, rows.labels, self.verify_top_k)
        return (proposed | written).to(rows.student_logits.dtype)


@dataclass(frozen=True)
class LabelInTopK:
    """Accepted iff the data's token is among the teacher's k most probable."""

    monotone: ClassVar[bool] = True
    verify_top_k: int = 5

    def __post_init__(self) -> None:
        _require_positive("verify_top_k", self.verify_top_k)

    @property
    def notation(self) -> str:
        return f"1[y_t ∈ Top-{self.verify_top_k}(p_t)]"

    def __call__(self, rows: Rows) -> Tensor:
        return verify_in_top_k(rows, rows.labels, self.verify_top_k).to(rows.student_logits.dtype)


@dataclass(frozen=True)
class LabelRatio:
    """The data verifies the teacher: weight `min(1, p(y)/q(y))` (soft), or accepted iff `p(y) ≥ q(y)` (hard)."""

    hard: bool = False

    @property
    def monotone(self) -> bool:
        return self.hard

    @property
    def notation(self) -> str:
        return "1[p_t(y_t) ≥ q_t(y_t)]" if self.hard else "min(1, p_t(y_t)/q_t(y_t))"

    def __call__(self, rows: Rows) -> Tensor:
        if self.hard:
            teacher = rows.teacher.label_log_prob(rows.labels)
            accepted = (teacher >= rows.student_label_log_prob) & (teacher > -torch.inf)
            return accepted.to(rows.student_logits.dtype)
        return label_ratio(rows).clamp(max=1.0).to(rows.student_logits.dtype)


# ---- controls ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoGate:
    """Everything is accepted: plain distillation."""

    notation: ClassVar[str] = "1"

    def __call__(self, rows: Rows) -> Tensor:
        return torch.ones_like(rows.student_logits[:, 0])


@dataclass(frozen=True)
class Random:
    """Accepts a row with probability `rate`, whatever teacher and student say."""

    monotone: ClassVar[bool] = True
    rate: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ConfigError(f"rate is {self.rate}", "Use a rate between 0 and 1")

    @property
    def notation(self) -> str:
        return f"1[u_t < {self.rate:g}]"

    def __call__(self, rows: Rows) -> Tensor:
        return (_one_uniform(rows.keys) < self.rate).to(rows.student_logits.dtype)


@dataclass(frozen=True)
class Inverted:
    """Accepts exactly what another gate rejects."""

    gate: Gate

    def __post_init__(self) -> None:
        if isinstance(self.gate, BatchGate):
            raise ConfigError(f"inverted: {type(self.gate).__name__} judges whole batches", "Invert the gate inside it")

    @property
    def needs_reference(self) -> bool:
        return needs_reference(self.gate)

    @property
    def notation(self) -> str:
        return f"1 − {notation_of(self.gate)}"

    def __call__(self, rows: Rows) -> Tensor:
        return 1 - self.gate(rows)


@dataclass(frozen=True)
class MatchedRandom:
    """Accepts at random, at the rate at which another gate of either kind accepts in the same batch: a `BatchGate`."""

    gate: Gate | BatchGate

    @property
    def needs_reference(self) -> bool:
        return needs_reference(self.gate)

    @property
    def notation(self) -> str:
        return f"1[u_t < mean of {notation_of(self.gate)}]"

    def score(self, rows: Rows) -> Tensor:
        return self.gate.score(rows) if isinstance(self.gate, BatchGate) else self.gate(rows)

    def select(self, scores: Tensor, keys: TokenKeys) -> Tensor:
        accepted = self.gate.select(scores, keys) if isinstance(self.gate, BatchGate) else scores
        return (_one_uniform(keys) < accepted.double().mean()).to(scores.dtype)


def _one_uniform(keys: TokenKeys) -> Tensor:
    return uniforms(keys.seed, keys.epoch, keys.sample, keys.position, draws=1, stream=1)[:, 0, 0]


AnyGate = Gate | BatchGate
