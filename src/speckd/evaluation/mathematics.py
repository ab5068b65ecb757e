"""Exact match of a number, as GSM8K is scored: the extraction and the normalisation are those of lm-eval's task `gsm8k`
(version 3), strict-match and flexible-extract."""

import re
from typing import Any

from speckd.errors import DataError
from speckd.evaluation.generated import require_reference
from speckd.evaluation.rows import Row
from speckd.evaluation.statistics import Metric

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
#: What an extracted number may be once it is normalised: no other reference is ever matched.
_MATCHABLE = re.compile(r"-?[0-9.]*[0-9][0-9.]*")
#: What neither side is compared by: thousands' commas, dollars, all before the mark, one dot at the end.
_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")

#: Where an answer ends, as there: a model that goes on with a question of its own would be judged by that.
STOP = ("Question:",)

METRICS = (
    Metric("strict_match", ("strict", "completions"), "completions"),
    Metric("flexible_match", ("flexible", "completions"), "completions"),
)


def strict_answer(text: str) -> str | None:
    """The number behind the first `#### `; None where there is none."""
    found = _STRICT.search(text)
    return None if found is None else normalized(found[1])


def flexible_answer(text: str) -> str | None:
    """The last number of the text; None where there is none."""
    found = _FLEXIBLE.findall(text)
    if not found:
        return None
    return normalized(next(group for group in found[-1] if group).strip())


def normalized(text: str) -> str:
    """As it is compared, as a text: 18.00 is not 18."""
    for pattern in _IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()


def require(name: str, row: Row) -> None:
    """Refuses a row whose reference no answer can match, before anything is generated.

    Raises:
        DataError: naming the row.
    """
    require_reference(name, row)
    assert row.reference is not None
    if not _MATCHABLE.fullmatch(_wanted(row.reference)):
        raise DataError(
            f"tasks: {name}: row {row.number + 1}: the reference {row.reference!r:.60} is no number that an answer could match",
            "Write the number alone, or at the end behind '#### '",
        )


def _wanted(reference: str) -> str:
    return normalized(reference.strip())


def score(row: Row, completion: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """As of `Generated`; what was extracted stands beside it."""
    assert row.reference is not None
    wanted, strict, flexible = _wanted(row.reference), strict_answer(completion), flexible_answer(completion)
    return {"strict": strict == wanted, "flexible": flexible == wanted}, {"extracted": {"strict": strict, "flexible": flexible}}
