"""ROUGE-L is the reference package's, and its settings are those that were meant."""

import pytest
from rouge_score.rouge_scorer import RougeScorer

from speckd.evaluation.rouge import rouge_l, score
from speckd.evaluation.rows import Row

PAIRS = [
    ("the cat sat on the mat", "the cat sat on the mat"),
    ("The cats were sitting.", "a cat is sitting"),
    ("police killed the gunman", "the gunman police killed"),
    ("One line.\nAnother line.", "Another line. One line."),
    ("numbers 1,234 and 5", "1 234 5 numbers"),
    ("naïve café", "naive cafe"),
    ("answer", ""),
    ("...", "..."),
]


@pytest.mark.parametrize(("reference", "completion"), PAIRS)
def test_it_is_the_reference_packages(reference: str, completion: str) -> None:
    own = RougeScorer(["rougeL"], use_stemmer=True).score(reference, completion)["rougeL"]
    assert rouge_l(reference, completion) == (own.fmeasure, own.precision, own.recall)
    scores, _ = score(Row(0, "?", reference, {}), completion)
    assert scores["rouge_l"] == own.fmeasure


@pytest.mark.parametrize(
    ("reference", "completion", "f"),
    [
        ("police killed the gunman", "police kill the gunman", 1.0),  # stems: Lin 2004's example otherwise has 3 of 4
        ("police killed the gunman", "the gunman kill police", 0.5),  # "the gunman" in order
        ("police killed the gunman", "police the gunman", 2 * 0.75 / 1.75),
        ("a b c d", "A, B! c-d", 1.0),  # case and punctuation are no words
        ("a b", "a\nb", 1.0),  # lines are no sentences here, as rougeLsum would have it
        ("", "a", 0.0),
    ],
)
def test_by_hand(reference: str, completion: str, f: float) -> None:
    assert rouge_l(reference, completion)[0] == pytest.approx(f)
