"""What a kind of task is: which items it makes of rows, what it records of each, and which metrics come of that."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from speckd.evaluation.items import Item, Record
from speckd.evaluation.models import Models
from speckd.evaluation.rows import Row
from speckd.evaluation.statistics import Metric

#: Options of whoever makes a prompt of a row.
PROMPT_OPTIONS = frozenset(
    {
        *("prompt_column", "reference_column", "prompt_template", "prompt_words"),
        *("few_shot", "few_shot_data", "apply_chat_template"),
    }
)
#: And of whoever has it answered.
ANSWER_OPTIONS = PROMPT_OPTIONS | {
    *("max_new_tokens", "samples", "sampling_temperature", "sampling_top_k", "sampling_top_p", "stop")
}


class Task(Protocol):
    """One task of an evaluation."""

    needs_teacher: bool

    def items(self, rows: Sequence[Row], models: Models) -> list[Item]:
        """What there is to do.

        Raises:
            SpeckdError: naming the row that cannot be asked or judged.
        """
        ...

    def records(self, items: Sequence[Item], models: Models) -> list[Record]:
        """Of one batch, one each, in order."""
        ...

    def metrics(self, lines: Sequence[Mapping[str, Any]]) -> Sequence[Metric]:
        """Those that there are, from all lines that were kept."""
        ...

    def counts(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """What else is worth knowing of them."""
        ...
