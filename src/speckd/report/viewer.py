"""The token viewer: what is drawn of a sample, with nothing left to decide for the template."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from speckd.report.runs import Run, Token, TokenSample
from speckd.report.shown import number

#: Supervised tokens of one sample, and samples at a step.
_MOST_TOKENS, _MOST_SAMPLES = 300, 8


class Verdict(StrEnum):
    """How a token looks; the value is its class in the style sheet."""

    CONTEXT = "ctx"
    ACCEPTED = "acc"
    MOSTLY_ACCEPTED = "acc soft"
    MOSTLY_REJECTED = "rej soft"
    REJECTED = "rej"
    UNJUDGED = "non"


_WORDS = {
    Verdict.ACCEPTED: "accepted",
    Verdict.MOSTLY_ACCEPTED: "accepted in part",
    Verdict.MOSTLY_REJECTED: "rejected in part",
    Verdict.REJECTED: "rejected",
    Verdict.UNJUDGED: "not judged",
}


@dataclass(frozen=True)
class Row:
    """One line of a card: a token and both probabilities of it."""

    what: str
    token: str
    teacher: str
    student: str


@dataclass(frozen=True)
class Card:
    """What is known of one supervised token. `id`: unique in the page; `favourites`: the teacher's tokens and probabilities;
    `facts`: names and values."""

    id: str
    heading: str
    rows: tuple[Row, ...]
    favourites: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Piece:
    """A token of the text, or the whole text of several that are not supervised. `said`: what a screen reader adds."""

    text: str
    verdict: Verdict
    said: str
    card: Card | None


@dataclass(frozen=True)
class State:
    """A sample at one step. `summary`: how many were accepted; `left_out`: tokens for which there was no room."""

    title: str
    summary: str
    pieces: tuple[Piece, ...]
    left_out: int


@dataclass(frozen=True)
class View:
    """A sample at each step of which there is a record, the first one first."""

    title: str
    states: tuple[State, ...]


def views(run: Run, number_of_run: int) -> list[View]:
    """The first few samples. `number_of_run`: its place in the report, from which names in the page are made."""
    rows = list(dict.fromkeys((sample.data, sample.row, sample.task) for sample in run.samples))[:_MOST_SAMPLES]
    found = []
    for place, row in enumerate(rows):
        own = sorted((s for s in run.samples if (s.data, s.row, s.task) == row), key=lambda sample: sample.step)
        states = (_state(sample, f"t{number_of_run}-{place}-{number_of_state}") for number_of_state, sample in enumerate(own))
        data, number_of_row, task = row
        found.append(View(f"{data}, row {number(number_of_row)}{'' if task is None else f': {task}'}", tuple(states)))
    return found


def _state(sample: TokenSample, prefix: str) -> State:
    tokens, left_out = _within(sample.tokens)
    return State(f"Step {number(sample.step)}", _summary(sample), tuple(_pieces(tokens, sample, prefix)), left_out)


def _within(tokens: tuple[Token, ...]) -> tuple[tuple[Token, ...], int]:
    """Up to where there is room, and how many more are supervised."""
    seen = 0
    for place, token in enumerate(tokens):
        if token.supervised and seen == _MOST_TOKENS:
            return tokens[:place], sum(one.supervised for one in tokens[place:])
        seen += token.supervised
    return tokens, 0


def _summary(sample: TokenSample) -> str:
    known = [token.acceptance for token in sample.tokens if token.supervised and token.acceptance is not None]
    supervised = sum(token.supervised for token in sample.tokens)
    if not known:
        return f"{supervised} supervised tokens; the method has no gate to judge them"
    rule = f" by {sample.gate}" if sample.gate else ""
    ranked = f", ranked among these {sample.ranked_among} tokens alone" if sample.ranked_among is not None else ""
    return (
        f"{number(sum(known), 4)} of {len(known)} supervised tokens accepted (TAR {sum(known) / len(known):.2f}){rule}{ranked}"
    )


def _pieces(tokens: tuple[Token, ...], sample: TokenSample, prefix: str) -> Iterator[Piece]:
    context = ""
    for token in tokens:
        if not token.supervised:
            context += token.text
            continue
        if context:
            yield Piece(context, Verdict.CONTEXT, "", None)
            context = ""
        verdict = _verdict(token.acceptance)
        said = "" if verdict in (Verdict.ACCEPTED, Verdict.UNJUDGED) else f" ({_WORDS[verdict]})"
        yield Piece(token.text, verdict, said, _card(token, verdict, sample, f"{prefix}-{token.position}"))
    if context:
        yield Piece(context, Verdict.CONTEXT, "", None)


def _verdict(acceptance: float | None) -> Verdict:
    if acceptance is None:
        return Verdict.UNJUDGED
    if acceptance >= 1:
        return Verdict.ACCEPTED
    if acceptance <= 0:
        return Verdict.REJECTED
    return Verdict.MOSTLY_ACCEPTED if acceptance >= 0.5 else Verdict.MOSTLY_REJECTED


def _card(token: Token, verdict: Verdict, sample: TokenSample, card_id: str) -> Card:
    label = Row(
        "data’s token",
        quoted(token.text if token.alone is None else token.alone),
        probability(token.p_label),
        probability(token.q_label),
    )
    proposed = "the same" if token.proposal is not None and token.proposal == token.alone else quoted(token.proposal)
    outside = f"outside its top {sample.top_k}" if sample.top_k is not None and token.favourites else "–"
    proposal = Row(
        "student’s proposal",
        proposed,
        outside if token.p_proposal is None else probability(token.p_proposal),
        probability(token.q_proposal),
    )
    bound = "at least " if sample.top_k is not None else ""
    facts = [
        ("acceptance", number(token.acceptance, 3)),
        ("weight of the divergence", number(token.weight, 3)),
        ("weight of the fallback", number(token.fallback_weight, 3)),
        ("divergence (nats)", number(token.divergence, 3)),
        ("KL(teacher ‖ student) (nats)", f"{bound}{number(token.kl, 3)}"),
        ("teacher’s entropy (nats)", f"{bound}{number(token.entropy, 3)}"),
    ]
    return Card(
        card_id,
        f"{_WORDS[verdict]}, position {token.position}",
        (label, proposal),
        tuple((quoted(one.text), probability(one.probability)) for one in token.favourites),
        tuple((name, value) for name, value in facts if value not in ("–", "at least –")),
    )


def quoted(text: str | None) -> str:
    """A token on one line, its blanks to be seen."""
    return "–" if text is None else "“" + text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") + "”"


def probability(value: float | None) -> str:
    if value is None:
        return "–"
    if 0 < value < 0.0005:
        return "< 0.001"
    return "> 0.999" if 0.9995 < value < 1 else f"{value:.3f}"
