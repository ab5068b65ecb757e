"""Rows of a file as prompts with references: the shapes of the known data sets are understood as they are."""

import csv
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Any

from speckd.box import problem_prompt
from speckd.data import read_file
from speckd.errors import ConfigError, DataError
from speckd.evaluation.options import TaskOptions

#: Stanford Alpaca's templates, with and without a context.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_QUESTION = "Question: {question}\nAnswer:"
_REFERENCES = ("completion", "reference", "output", "response", "answer")


@dataclass(frozen=True)
class Row:
    """One row. `number`: in the file, from 0; `prompt`: text, or messages; `reference`: the answer, where there is one;
    `fields`: the row itself."""

    number: int
    prompt: str | list[dict[str, Any]]
    reference: str | None
    fields: Mapping[str, Any]

    def answered(self) -> str:
        """Prompt and reference as one text, with a space between them where neither has one."""
        assert isinstance(self.prompt, str)
        return self.prompt + self.completion

    @property
    def completion(self) -> str:
        """The reference as it stands behind the prompt."""
        assert self.reference is not None
        glued = not isinstance(self.prompt, str) or not self.prompt or self.prompt[-1].isspace() or "prompt" in self.fields
        return self.reference if glued or self.reference[:1].isspace() else f" {self.reference}"


@dataclass(frozen=True)
class File:
    """Where rows come from, as it stands in `evaluation.json`."""

    path: Path
    sha256: str
    rows: int


def read_rows(name: str, task: TaskOptions) -> tuple[File, list[Row]]:
    """The task's rows, with its solved examples before each.

    Args:
        name: what to call the task in an error.

    Raises:
        DataError, ConfigError: naming the task, the file and the row.
    """
    file, raw = _read(name, "data", task.data)
    rows = [_row(f"tasks: {name}: {task.data}", number, fields, task) for number, fields in enumerate(raw[: task.limit])]
    if task.few_shot_data is None:
        return file, rows
    _, solved = _read(name, "few_shot_data", task.few_shot_data)
    if len(solved) < task.few_shot:
        raise DataError(f"tasks: {name}: {task.few_shot_data} has {len(solved)} rows", f"few_shot is {task.few_shot}: lower it")
    where = f"tasks: {name}: {task.few_shot_data}"
    shots = [_row(where, number, fields, task) for number, fields in enumerate(solved[: task.few_shot])]
    for shot in shots:
        if shot.reference is None:
            raise DataError(f"{where}: row {shot.number + 1}: no answer", "Name its column with reference_column")
    return file, [_with_shots(row, shots) for row in rows]


def _read(name: str, key: str, path: str) -> tuple[File, list[dict[str, Any]]]:
    file = Path(path)
    if not file.is_file():
        raise DataError(f"tasks: {name}: {key}: there is no file {path}", "Check the path")
    if file.suffix == ".csv":
        rows = _read_csv(file)
    else:
        rows = [{key: value for key, value in row.items() if value is not None} for row in read_file(file)]
    if not rows:
        raise DataError(f"tasks: {name}: {path}: no rows", "Give at least one")
    return File(file, hashlib.sha256(file.read_bytes()).hexdigest(), len(rows)), rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Every cell as the text that stands there: a reader that guesses types makes 504.0 of 504."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})", "Save it as comma-separated UTF-8 with a line of names") from None
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise DataError(f"{path}:{number}: not as many cells as the first line has names", "Mend that line")
    return rows


def _row(where: str, number: int, fields: Mapping[str, Any], task: TaskOptions) -> Row:
    where = f"{where}: row {number + 1}"
    fields = _filled(fields)
    for key in ("prompt_column", "reference_column"):
        wanted = getattr(task, key)
        if wanted is not None and wanted not in fields:
            raise DataError(f"{where}: no column '{wanted}' ({key})", f"There is: {', '.join(fields)}")
    try:
        prompt, reference = _shape(fields)
    except DataError as error:
        raise DataError(f"{where}: {error.what}", error.fix) from None
    if task.prompt_words is not None:
        prompt, reference = _begun(where, fields, task.prompt_words)
    if task.prompt_template is not None:
        prompt = formatted(task.prompt_template, fields, where)
    elif task.prompt_column is not None:
        prompt = fields[task.prompt_column]
    if task.reference_column is not None:
        reference = fields[task.reference_column]
    if prompt is None:
        raise DataError(
            f"{where}: columns {', '.join(sorted(fields))} are in no known shape",
            "Name yours with prompt_column and reference_column, or write a prompt_template",
        )
    _require_prompt(where, prompt)
    if reference is not None and not isinstance(reference, str):
        reference = str(reference)
    return Row(number, prompt, reference, fields)


def _begun(where: str, fields: Mapping[str, Any], words: int) -> tuple[str, str]:
    text = fields.get("text")
    begin = None if not isinstance(text, str) else re.match(rf"\s*\S+(?:\s+\S+){{{words - 1}}}(?=\s)", text)
    if begin is None:
        raise DataError(f"{where}: no text of more than {words} words (prompt_words)", "Lower it, or remove that row")
    return begin[0], begin.string[begin.end() :]


def _require_prompt(where: str, prompt: Any) -> None:
    turns = isinstance(prompt, list) and prompt and all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in prompt)
    if not turns and not isinstance(prompt, str):
        raise DataError(f"{where}: the prompt is {prompt!r:.60}", "Give text, or messages with role and content")


def _shape(fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """Prompt and reference by the names of the known data sets; None where they are not there."""
    if "messages" in fields and isinstance(fields["messages"], list):
        turns = fields["messages"]
        if turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
            return turns[:-1], turns[-1].get("content")
        return turns, None
    reference = next((fields[name] for name in _REFERENCES if name in fields), None)
    if isinstance(reference, list) and reference and isinstance(reference[-1], dict):
        reference = reference[-1].get("content")
    if "test_list" in fields:  # MBPP
        return problem_prompt(fields), str(fields.get("code", "")).replace("\r\n", "\n") + "\n[DONE]"
    if {"prompt", "entry_point", "test"} <= fields.keys():  # HumanEval
        return fields["prompt"], fields.get("canonical_solution")
    if "prompt" in fields:
        return fields["prompt"], reference
    if "question" in fields:
        return _QUESTION.format(question=fields["question"]), reference
    if "Question" in fields:  # MAWPS
        return _QUESTION.format(question=fields["Question"]), _plain(str(fields.get("Answer")))
    if "instruction" in fields:
        return (_ALPACA_INPUT if fields.get("input") else _ALPACA).format_map({"input": "", **fields}), reference
    return ("", fields["text"]) if "text" in fields else (None, reference)


def _filled(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """MAWPS leaves its numbers out of the question: `number0` is the first of the column Numbers."""
    if not {"Question", "Numbers"} <= fields.keys():
        return fields
    numbers = str(fields["Numbers"]).split()

    def number(found: re.Match[str]) -> str:
        place = int(found[1])
        return _plain(numbers[place]) if place < len(numbers) else found[0]

    return {**fields, "Question": re.sub(r"\bnumber(\d+)\b", number, str(fields["Question"]))}


def _plain(number: str) -> str:
    return number.removesuffix(".0")


def formatted(template: str, fields: Mapping[str, Any], where: str) -> str:
    """The template with columns in the place of their names in braces; nothing else of a format is understood.

    Raises:
        ConfigError, DataError: it is none, or asks for a column that is not there.
    """
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"prompt_template: {error}", "Write columns in braces; a brace itself is written twice") from None
    found = []
    for text, name, form, conversion in pieces:
        found.append(text)
        if name is None:
            continue
        if form or conversion:
            raise ConfigError(f"prompt_template: '{{{name}}}' has a format", "Write the name of a column alone in braces")
        if name not in fields:
            raise DataError(f"{where}: no column '{name}' (prompt_template)", f"There is: {', '.join(fields)}")
        found.append(str(fields[name]))
    return "".join(found)


def _with_shots(row: Row, shots: Sequence[Row]) -> Row:
    if isinstance(row.prompt, str):
        return replace(row, prompt="".join(f"{shot.answered()}\n\n" for shot in shots) + row.prompt)
    turns: list[dict[str, Any]] = []
    for shot in shots:
        turns += [*shot.prompt, {"role": "assistant", "content": shot.reference}]
    return replace(row, prompt=[*turns, *row.prompt])
