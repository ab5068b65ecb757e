"""Programs that the model writes, run in the box and judged by tests that stay outside of it: pass@k of MBPP's and HumanEval's
rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from speckd.box import judge, problem, unjudgeable
from speckd.box.judge import Runner
from speckd.errors import DataError
from speckd.evaluation.rows import Row
from speckd.evaluation.statistics import Metric

#: Where MBPP's answers end, as its prompt's [BEGIN] asks for it.
STOP = ("[DONE]",)


def metrics(ks: Sequence[int]) -> list[Metric]:
    """pass@k for each k."""
    return [
        Metric(f"pass@{k}", ("passed", "completions"), "problems that can be judged: unbiased estimate of their samples", k=k)
        for k in ks
    ]


def require(name: str, row: Row) -> None:
    """Refuses a row that is no problem, before anything is generated.

    Raises:
        DataError: naming the row.
    """
    try:
        problem(row.fields)
    except DataError as error:
        raise DataError(f"tasks: {name}: row {row.number + 1}: {error.what}", error.fix) from None


def score(box: Runner, row: Row, completion: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """As of `Generated`. A problem whose tests cannot be taken apart counts for nothing, and says why."""
    given = problem(row.fields)
    why = unjudgeable(given)
    if why is not None:
        return {}, {"verdict": f"not judgeable: {why}"}
    verdict = judge(given, completion, box)
    return {"passed": verdict.passed}, {"verdict": "passed" if verdict.passed else verdict.reason}


def counts(lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Problems that were judged, and that could not be."""
    judged = {line["index"] for line in lines if "passed" in line["scores"]}
    return {"judged": len(judged), "not_judgeable": len({line["index"] for line in lines} - judged)}
