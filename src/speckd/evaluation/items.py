"""Prompts as tokens, and what is kept of each answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from speckd import fingerprints
from speckd.errors import ConfigError, DataError, VocabularyError
from speckd.evaluation.models import Models
from speckd.evaluation.options import TaskOptions
from speckd.evaluation.rows import Row


@dataclass(frozen=True)
class Item:
    """One thing to be done: a row, for the how manieth time. `ids`: of the prompt (or of the whole text, where that is read);
    `supervised`: how many of the last of them are asked about."""

    row: Row
    turn: int
    ids: tuple[int, ...]
    supervised: int = 0

    @property
    def key(self) -> str:
        """The same for the same tokens, in whatever folder."""
        return fingerprints.of_bytes([str(list(self.ids)).encode()])


@dataclass(frozen=True)
class Record:
    """One line of a task's examples. `scores`: numbers, or lists of them, that add up over a row's answers."""

    item: Item
    completion: str
    tokens: int
    truncated: bool
    scores: Mapping[str, Any]
    more: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        row = self.item.row
        return {
            "index": row.number,
            "turn": self.item.turn,
            "key": self.item.key,
            "prompt": row.prompt,
            "completion": self.completion,
            "reference": row.reference,
            "scores": dict(self.scores),
            "truncated": self.truncated,
            "tokens": self.tokens,
            **self.more,
        }


def prompt_items(name: str, rows: Sequence[Row], task: TaskOptions, models: Models) -> list[Item]:
    """Each row's prompt, `task.samples` times.

    Raises:
        DataError, ConfigError: a prompt that is empty, or that no chat template turns into text, naming the row.
    """
    found = []
    for row in rows:
        ids = tuple(models.rendering.prompt_ids({"prompt": asked(name, row, task, models), **said_to_template(row)}))
        if not ids:
            raise DataError(f"tasks: {name}: row {row.number + 1}: the prompt has no token", "Give at least one word")
        found += [Item(row, turn, ids) for turn in range(task.samples)]
    return found


def require_known(name: str, items: Sequence[Item], models: Models) -> None:
    """Refuses a text that the teacher cannot read, before anything is answered.

    Raises:
        VocabularyError: a token is one that the teacher does not have, naming the row.
    """
    if models.known is None:
        return
    for item in items:
        unknown = models.known.unknown(torch.tensor(item.ids))
        if unknown.numel():
            token = models.tokenizer.convert_ids_to_tokens(int(unknown[0]))
            raise VocabularyError(
                f"tasks: {name}: row {item.row.number + 1}: token {int(unknown[0])} ({token!r}) is unknown to the teacher",
                "Remove it from the data or the chat template, or use a teacher that has it",
            )


def asked(name: str, row: Row, task: TaskOptions, models: Models) -> Any:
    """The prompt as text, or as messages where a chat template is to make text of them."""
    prompt = turns(row, task)
    if isinstance(prompt, list) and models.tokenizer.chat_template is None:
        if isinstance(row.prompt, str):
            raise ConfigError(f"tasks: {name}: apply_chat_template: the tokenizer has no chat template", "Remove it")
        raise DataError(
            f"tasks: {name}: row {row.number + 1}: messages, and the tokenizer has no chat template",
            "Give prompt and completion, or save a template with the tokenizer",
        )
    return prompt


def template_end(item: Item, task: TaskOptions, models: Models) -> frozenset[int]:
    """Where the chat template ends an answer to it, if it is messages: its own, whatever stands beside it in a batch."""
    return models.template_end(turns(item.row, task))


def by_stops(items: Sequence[Item], stops: Callable[[Item], frozenset[int]]) -> dict[frozenset[int], list[int]]:
    """Places of those that end at the same tokens."""
    found: dict[frozenset[int], list[int]] = {}
    for place, item in enumerate(items):
        found.setdefault(stops(item), []).append(place)
    return found


def said_to_template(row: Row) -> dict[str, Any]:
    """What a row gives its chat template beside the messages, as in training."""
    return {name: row.fields[name] for name in ("tools", "chat_template_kwargs") if row.fields.get(name)}


def turns(row: Row, task: TaskOptions) -> str | list[dict[str, Any]]:
    """The row's prompt, as a user's turn where that is wished; what has no prompt has no turn."""
    if isinstance(row.prompt, list) or not row.prompt or not task.apply_chat_template:
        return row.prompt
    return [{"role": "user", "content": row.prompt}]
