"""Tasks whose answers are generated and then scored, one by one, by a function of the text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speckd.errors import DataError
from speckd.evaluation.answers import Answerer
from speckd.evaluation.items import Item, Record, prompt_items
from speckd.evaluation.models import Models
from speckd.evaluation.options import TaskOptions
from speckd.evaluation.rows import Row
from speckd.evaluation.statistics import Metric


@dataclass
class Generated:
    """
    Args:
        name, options, seed: of the task.
        score: (row, completion) -> what is recorded of it: numbers, and under other names what explains them.
        measures: the metrics.
        require: raises where a row cannot be judged, before anything is generated.
        also: counts beside those of all answers.
    """

    name: str
    options: TaskOptions
    seed: int
    score: Callable[[Row, str], tuple[dict[str, Any], dict[str, Any]]]
    measures: Sequence[Metric]
    require: Callable[[Row], None]
    also: Callable[[Sequence[Mapping[str, Any]]], dict[str, int]] = lambda lines: {}
    needs_teacher: bool = False
    _answerer: Answerer | None = None

    def items(self, rows: Sequence[Row], models: Models) -> list[Item]:
        """See `Task`."""
        for row in rows:
            self.require(row)
        return prompt_items(self.name, rows, self.options, models)

    def records(self, items: Sequence[Item], models: Models) -> list[Record]:
        """See `Task`."""
        self._answerer = self._answerer or Answerer(models, self.options, self.seed)
        found = []
        for item, answer in zip(items, self._answerer.answers(items), strict=True):
            scores, more = self.score(item.row, answer.text)
            found.append(Record(item, answer.text, answer.tokens, answer.truncated, scores, more))
        return found

    def metrics(self, lines: Sequence[Mapping[str, Any]]) -> Sequence[Metric]:
        """See `Task`."""
        return self.measures

    def counts(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Answers that were cut off at the limit, that say nothing, and whose prompt fills all of the model's positions."""
        return {
            "completions": len(lines),
            "tokens": sum(line["tokens"] for line in lines),
            "truncated": sum(line["truncated"] for line in lines),
            "empty": sum(not line["completion"].strip() for line in lines),
            "without_room": sum(not line["tokens"] for line in lines),
            **self.also(lines),
        }


def require_reference(name: str, row: Row) -> None:
    """Refuses a row without an answer to compare with."""
    if row.reference is None or not row.reference.strip():
        raise DataError(f"tasks: {name}: row {row.number + 1}: there is no reference", "Name its column with reference_column")
