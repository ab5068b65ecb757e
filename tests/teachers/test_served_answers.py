"""No answer is believed that no softmax gives; what is dropped goes to the tail; what two answers differ by."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speckd.teachers.answers import Answer
from speckd.teachers.dialect import BadAnswer, Heard, TooFewInside, check_labels, checked, drift
from speckd.teachers.exchange import _after_s, _message
from tests.teachers.toy import VOCABULARY, Toy, same


def heard_of(answer: Answer) -> Heard:
    assert answer.token_ids is not None
    return Heard(None, None, answer.token_ids.tolist(), answer.log_probs.tolist(), answer.label_log_probs.tolist())


TOKENS = list(range(5, 25))
GOOD = Toy().answer(TOKENS, [3, 4, 7], 6)


def test_a_good_answer_is_itself() -> None:
    found, outside = checked(heard_of(GOOD), GOOD.positions, 6, VOCABULARY)
    assert same(found, GOOD) and outside == 0


def changed(**fields) -> Heard:
    """With some entries of the lists replaced: {field: {(row, column) or row: value}}."""
    heard = heard_of(GOOD)
    for name, changes in fields.items():
        for place, value in changes.items():
            row = getattr(heard, name)
            if isinstance(place, tuple):
                row[place[0]][place[1]] = value
            else:
                row[place] = value
    return heard


@pytest.mark.parametrize(
    "heard",
    [
        changed(log_probs={(1, 0): math.nan}),
        changed(log_probs={(1, 0): math.inf}),
        changed(log_probs={(1, 0): 0.01}),
        changed(labels={2: math.nan}),
        changed(labels={2: 0.01}),
        changed(log_probs={(0, 0): -3.0}),
        changed(log_probs={(0, 1): 0.0, (0, 0): 0.0}),
        changed(ids={(0, 1): heard_of(GOOD).ids[0][0]}),
        changed(ids={(0, 1): -1}),
        changed(ids={(0, 1): 2**70}),
        changed(ids={1: [1, 2]}, log_probs={1: [-1.0, -2.0]}),
        replace(heard_of(GOOD), labels=[-1.0]),
        replace(heard_of(GOOD), log_probs=[[value - 30 for value in row] for row in heard_of(GOOD).log_probs]),
    ],
)
def test_what_no_softmax_gives(heard: Heard) -> None:
    with pytest.raises(BadAnswer):
        checked(heard, GOOD.positions, 6, VOCABULARY)


def test_the_token_that_follows_is_told_twice_alike() -> None:
    heard = heard_of(Toy().answer(TOKENS, [3, 4, 7], VOCABULARY))
    labels = [TOKENS[position + 1] for position in (3, 4, 7)]
    check_labels(heard, labels)
    with pytest.raises(BadAnswer, match="two log-probabilities"):
        check_labels(replace(heard, labels=[value - 0.1 for value in heard.labels]), labels)
    best = replace(heard_of(GOOD), labels=[-0.01] * 3)
    with pytest.raises(BadAnswer):
        check_labels(best, labels)


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(8, VOCABULARY))
def test_what_is_outside_leaves_the_rest_as_it_is(seed: int, top_k: int, shared: int) -> None:
    tokens = [(seed + 3 * i) % VOCABULARY for i in range(6)]
    everything = Toy(seed).answer(tokens, [1, 2], VOCABULARY)
    kept = min(top_k, shared)
    found, outside = checked(heard_of(everything), everything.positions, kept, shared)
    assert same(found, Toy(seed).answer(tokens, [1, 2], kept, shared))
    assert outside == 2 * (VOCABULARY - shared)
    dense, _ = checked(heard_of(everything), everything.positions, None, shared)
    assert same(dense, Toy(seed).answer(tokens, [1, 2], None, shared))


def test_too_few_inside_is_no_answer() -> None:
    with pytest.raises(TooFewInside):
        checked(heard_of(GOOD), GOOD.positions, 6, int(GOOD.token_ids.max()))  # type: ignore[union-attr]


@given(st.floats(0, 0.5), st.sampled_from([3, None]))
def test_drift_is_that_of_the_tokens_that_follow_or_more(moved: float, top_k: int | None) -> None:
    one = Toy().answer(TOKENS, [3, 4, 7], top_k)
    other = replace(one, label_log_probs=one.label_log_probs - moved, log_probs=one.log_probs - moved)
    assert drift(one, one) == 0
    assert drift(one, other) == pytest.approx(moved, abs=1e-5)
    assert drift(other, one) == pytest.approx(moved, abs=1e-5)


def test_a_tie_at_the_end_of_the_list_is_no_drift_and_another_token_is() -> None:
    assert GOOD.token_ids is not None
    ids = GOOD.token_ids.clone()
    ids[:, -1] = 63
    end = (GOOD.log_probs[:, -1:].exp()).mean()
    assert drift(GOOD, replace(GOOD, token_ids=ids)) < end * 1e-3
    ids = GOOD.token_ids.clone()
    ids[:, 0] = 63
    assert drift(GOOD, replace(GOOD, token_ids=ids)) > 0.1
    assert drift(GOOD, Toy().answer(TOKENS, [3, 4], 6)) == math.inf


def test_impossible_tokens_stay_impossible() -> None:
    heard = Heard(None, None, [[3, 1, 2]], [[0.0, -math.inf, -math.inf]], [-math.inf])
    check_labels(heard, [1])
    found, _ = checked(heard, torch.tensor([0]), 3, 5)
    assert found.log_probs.tolist() == [[0.0, -math.inf, -math.inf]] and found.label_log_probs.tolist() == [-math.inf]
    assert drift(found, found) == 0


@pytest.mark.parametrize(
    ("header", "seconds"), [("3", 3), ("0.5", 0.5), ("-3", 0), ("inf", 0), ("nan", 0), ("soon", 0), ("", 0)]
)
def test_retry_after(header: str, seconds: float) -> None:
    assert _after_s(header) == seconds
    assert _after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _after_s("Wed, 21 Oct 2099 07:28:00 GMT") > 1e6


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"error": {"message": "too\\n  long"}}', ": too long"),
        (b'{"detail": "Not Found"}', ": Not Found"),
        (b'{"error": "no"}', ": no"),
        (b"<html>", ""),
        (b"[1]", ""),
        (b"null", ""),
        (b"", ""),
        (b'{"error": {"message": "' + b"x" * 999 + b'"}}', ": " + "x" * 200),
    ],
)
def test_a_servers_own_words(body: bytes, told: str) -> None:
    assert _message(body) == told
