"""ROUGE-L against references (Lin 2004), by Google's rouge-score: what Dolly and other instruction sets are reported with."""

from functools import cache
from typing import Any

from rouge_score import rouge_scorer

from speckd.evaluation.rows import Row
from speckd.evaluation.statistics import Metric

METRICS = (
    Metric("rouge_l", ("rouge_l", "completions"), "completions"),
    Metric("rouge_l_precision", ("precision", "completions"), "completions"),
    Metric("rouge_l_recall", ("recall", "completions"), "completions"),
)


@cache
def _scorer() -> Any:
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(reference: str, completion: str) -> tuple[float, float, float]:
    """F-measure, precision and recall of the longest common subsequence of words: lower case, letters and digits only, Porter's
    stems of words above three letters, whole texts (not sentence by sentence)."""
    found = _scorer().score(reference, completion)["rougeL"]
    return float(found.fmeasure), float(found.precision), float(found.recall)


def score(row: Row, completion: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """As of `Generated`."""
    assert row.reference is not None
    f, precision, recall = rouge_l(row.reference, completion)
    return {"rouge_l": f, "precision": precision, "recall": recall}, {}
