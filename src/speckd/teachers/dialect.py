"""How a teacher's server is asked and understood: what a dialect must say, and what is checked of any answer in any dialect."""

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from speckd.teachers.answers import Answer

#: Rounding of a server's 16-bit or 32-bit arithmetic: log-probabilities above 0, and sums of probabilities above 1.
_ABOVE_ZERO = 1e-4
_ABOVE_ONE = 1e-3
#: No vocabulary is larger: what is not among the most probable tokens is at most so many times the least of them.
_LARGEST_VOCABULARY = 1_000_000


class BadAnswer(Exception):
    """What a server said is not an answer to what it was asked."""


class TooFewInside(Exception):
    """Of a row's entries too few lie in the shared vocabulary, so more must be asked for."""


@dataclass(frozen=True)
class Wanted:
    """`count`: how many of the most probable tokens; `whole`: the server's whole vocabulary instead."""

    count: int
    whole: bool = False


@dataclass(frozen=True)
class ServedModel:
    """A model that a server offers. `longest`: tokens of prompt and continuation together, where it says so; `adapted`: it is
    an adapter over another one."""

    name: str
    longest: int | None
    adapted: bool = False


@dataclass(frozen=True)
class Heard:
    """One sequence's answer as it was read, at the n positions asked for.

    `token_ids`: the sequence as the server repeats it, where it does; `request_id`: likewise. `ids`, `log_probs`: n lists, most
    probable first; `labels`: n log-probabilities of the tokens that do follow. −inf is a probability of 0.
    """

    token_ids: list[int] | None
    request_id: str | None
    ids: list[list[int]]
    log_probs: list[list[float]]
    labels: list[float]


@dataclass(frozen=True)
class Reply:
    """A response: who speaks, to which request, where the server says so, and an answer for each sequence."""

    model: str | None
    request_id: str | None
    heard: list[Heard]


class Dialect(Protocol):
    """A kind of server. Paths are relative to its address; bodies are JSON; `read` raises `BadAnswer`."""

    @property
    def path(self) -> str: ...

    def write(self, model: str, sequences: Many[list[int]], wanted: Wanted, request_id: str) -> dict[str, Any]:
        """A request's body: the log-probabilities of every sequence's tokens, at temperature 1."""
        ...

    def read(self, reply: Any, sequences: Many[list[int]], positions: Many[list[int]], wanted: Wanted) -> Reply:
        """A response's body, parsed. Every sequence's every token is checked; the positions asked for are read."""
        ...

    def allow(self, wanted: Wanted) -> str:
        """What to start the server with so that it gives so many log-probabilities."""
        ...

    def lengthen(self, tokens: int) -> str:
        """What to start the server with so that it takes sequences of so many tokens."""
        ...


def field(reply: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of a JSON object, of that type.

    Raises:
        BadAnswer: there is none.
    """
    value = reply.get(name) if isinstance(reply, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BadAnswer(f"its '{name}' is {_shown(value)}")
    return value


def number(value: Any) -> float:
    """A JSON number, or the −Infinity that some servers write.

    Raises:
        BadAnswer: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadAnswer(f"a log-probability is {_shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise BadAnswer("a log-probability is no number that a computer knows") from None


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{value!r:.40}"


def checked(heard: Heard, positions: Tensor, wanted: int | None, vocabulary: int) -> tuple[Answer, int]:
    """An answer that can be one of a softmax at temperature 1, on the shared vocabulary.

    Args:
        heard: at these positions.
        positions: [n] int64.
        wanted: K, how many tokens of the shared vocabulary to keep; None for all of it.
        vocabulary: the shared one's size: ids from there on are not part of it, and their probability goes to the tail.

    Returns:
        The answer, and how many entries were left out for lying outside of the shared vocabulary.

    Raises:
        BadAnswer: no softmax gives this.
        TooFewInside: of the entries too few are in the shared vocabulary.
    """
    widths = {len(row) for row in heard.ids} | {len(row) for row in heard.log_probs}
    if len(widths) > 1 or not len(heard.ids) == len(heard.log_probs) == len(heard.labels) == len(positions):
        raise BadAnswer(f"positions have {sorted(widths)} log-probabilities")
    width = widths.pop() if widths else wanted or vocabulary
    try:
        ids = torch.tensor(heard.ids, dtype=torch.int64).reshape(-1, width)
    except (OverflowError, RuntimeError, ValueError):
        raise BadAnswer("a token id is out of any vocabulary") from None
    log_probs = torch.tensor(heard.log_probs, dtype=torch.float64).reshape(-1, width)
    labels = torch.tensor(heard.labels, dtype=torch.float64)
    _check_distribution(ids, log_probs, labels)
    inside = ids < vocabulary
    kept = vocabulary if wanted is None else wanted
    if len(ids) and int(inside.sum(-1).min()) < kept:
        raise TooFewInside
    dropped = log_probs.exp().masked_fill(inside, 0).sum(-1)
    labels = labels.clamp(max=0).float()
    log_probs = log_probs.clamp(max=0).float()
    if wanted is None:
        where = ids.masked_fill(~inside, vocabulary)  # one column more than the vocabulary, for what is outside
        dense = torch.full((len(ids), vocabulary + 1), -torch.inf).scatter_(1, where, log_probs)
        return Answer(positions, None, dense[:, :vocabulary].contiguous(), labels, dropped=dropped), int((~inside).sum())
    first = (~inside).long().argsort(stable=True, dim=-1)[:, :kept]  # ranks are kept among those inside
    answer = Answer(positions, ids.gather(1, first), log_probs.gather(1, first), labels, dropped=dropped)
    return answer, int((~inside).sum())


def _check_distribution(ids: Tensor, log_probs: Tensor, labels: Tensor) -> None:
    for values in (log_probs, labels):
        if values.isnan().any() or bool((values > _ABOVE_ZERO).any()):
            raise BadAnswer("a log-probability is NaN or above 0 (is the server's --logprobs-mode raw_logprobs?)")
    if bool((ids < 0).any()):
        raise BadAnswer("a token id is negative")
    ordered = ids.sort(-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise BadAnswer("a token comes twice at one position")
    if bool((log_probs[:, 1:] > log_probs[:, :-1] + _ABOVE_ZERO).any()):
        raise BadAnswer("ranks and log-probabilities disagree")
    total = log_probs.exp().sum(-1)
    most = total + _LARGEST_VOCABULARY * log_probs[:, -1:].exp().sum(-1)
    if bool((total > 1 + _ABOVE_ONE).any() | (most < 1 - _ABOVE_ONE).any()):
        raise BadAnswer(
            f"probabilities sum to {float(total.max()):.4g} (does the server run with --logprobs-mode raw_logprobs?)"
        )


def check_labels(heard: Heard, labels: Many[int]) -> None:
    """The token that follows is known twice where it is among the most probable, and below them where it is not.

    Raises:
        BadAnswer: the two disagree.
    """
    for ids, log_probs, label, own in zip(heard.ids, heard.log_probs, labels, heard.labels, strict=True):
        known = log_probs[ids.index(label)] if label in ids else None
        if known is not None and known != own and not math.isclose(known, own, rel_tol=0, abs_tol=_ABOVE_ONE):
            raise BadAnswer(f"token {label} has two log-probabilities, {known:.6g} and {own:.6g}")
        if known is None and log_probs and own > log_probs[-1] + _ABOVE_ZERO:
            raise BadAnswer(f"token {label} is among the most probable, but not listed there")


def drift(first: Answer, now: Answer) -> float:
    """How far two answers to one sequence are apart, in the mean over its positions: the larger of two distances.

    |Δ log p| of the token that follows, in nats; and Σ |Δp| over the tokens listed, at most Σ p |Δ log p|. A token that only
    one of them lists counts with what it must differ by, its p less the least p that the other lists, so that a tie at the
    end of the list counts nothing. Infinite where they are not about the same sequence.
    """
    if first.positions.shape != now.positions.shape or (first.token_ids is None) != (now.token_ids is None):
        return math.inf
    if not len(first.positions):
        return 0.0
    same = first.label_log_probs == now.label_log_probs  # also both −inf
    labels = torch.where(same, 0.0, (first.label_log_probs - now.label_log_probs).abs()).mean()
    return max(float(labels), float(_listed_distance(first, now).mean()))


def _listed_distance(first: Answer, now: Answer) -> Tensor:
    """[n] Σ |Δp| over the tokens that either lists."""
    p, q = first.log_probs.exp(), now.log_probs.exp()
    if first.token_ids is None or now.token_ids is None:
        return (p - q).abs().sum(-1)
    both = first.token_ids[:, :, None] == now.token_ids[:, None, :]
    shared = (both * (p[:, :, None] - q[:, None, :]).abs()).sum((-2, -1))
    only_first = (p - q[:, -1:]).clamp(min=0).masked_fill(both.any(-1), 0).sum(-1)
    only_now = (q - p[:, -1:]).clamp(min=0).masked_fill(both.any(-2), 0).sum(-1)
    return shared + only_first + only_now
