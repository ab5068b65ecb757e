"""Data from a file, a folder or the hub, in TRL's shapes, checked row by row before anything heavy is loaded."""

import heapq
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from speckd.errors import DataError
from speckd.settings import RunArguments

SHAPES = "prompt and completion; messages; text"
_SPLIT_FILES = {"train": ("train",), "validation": ("validation", "dev", "eval", "test")}
_SUFFIXES = (".jsonl", ".json", ".parquet")
#: Rows that may be the longest in tokens: those with most characters.
_CANDIDATES = 16


def load_data(run: RunArguments, text_field: str, kept: str | None = None) -> tuple[Dataset, Dataset | None]:
    """Training data and, where there is some, held-out data. `kept`: a column to keep beside those of the shape.

    Raises:
        DataError: naming the file and the row.
    """
    if run.dataset_name is None:
        raise DataError(
            "dataset_name is not set: there is nothing to train on", "Give a JSONL or Parquet file, a folder or a hub id"
        )
    folder = Path(run.dataset_name)
    train = _one(run.dataset_name, "train", run)
    held_out = None
    if run.eval_dataset is not None:
        held_out = _one(run.eval_dataset, "validation", run)
    elif folder.is_dir():
        held_out = _from_folder(folder, "validation", required=False)
    elif not folder.exists() and run.dataset_test_split:
        held_out = _from_hub(run.dataset_name, run.dataset_config, run.dataset_test_split)
    train = _checked(train, run.dataset_name, run, text_field, kept)
    if held_out is not None:
        held_out = _checked(held_out, run.eval_dataset or f"{run.dataset_name} (held out)", run, text_field, kept)
        held_out = held_out.select(range(min(len(held_out), run.eval_rows or len(held_out))))
    return train, held_out


def load_prompts(run: RunArguments) -> Dataset:
    """What the training data asks, to be answered anew: `prompt` (text, or messages without the last answer), `tools` and
    `chat_template_kwargs` where they are. A file of prompts alone will do.

    Raises:
        DataError: naming the file and the row.
    """
    if run.dataset_name is None:
        raise DataError("dataset_name is not set: there are no prompts", "Give a JSONL or Parquet file, a folder or a hub id")
    name, data = run.dataset_name, _one(run.dataset_name, "train", run)
    if not len(data):
        raise DataError(f"{name}: no rows", "Give at least one")
    data = _renamed(data, name, {"prompt": run.dataset_prompt_column})
    if "prompt" in data.column_names:
        _require_prompts(data, name)
    elif "messages" in data.column_names:
        _require_messages(data, name)
        data = data.map(lambda row: {"prompt": _before_answer(row["messages"])}, desc="Taking the last answers away")
        for number, row in enumerate(data, 1):
            if not row["prompt"]:
                raise DataError(f"{name}: row {number}: nothing is asked before the answer", "Give a user's turn")
    else:
        raise DataError(
            f"{name}: columns {', '.join(sorted(data.column_names))} hold no prompts",
            "Give prompt (and completion) or messages, or name yours with dataset_prompt_column",
        )
    return data.select_columns([c for c in data.column_names if c in ("prompt", "tools", "chat_template_kwargs")])


def _require_prompts(data: Dataset, name: str) -> None:
    kind = type(data[0]["prompt"])
    for number, row in enumerate(data, 1):
        value = row["prompt"]
        if type(value) is not kind or not (_are_messages(value) if isinstance(value, list) else isinstance(value, str)):
            raise DataError(
                f"{name}: row {number}: prompt is {_brief(value)}", "Give text in every row, or messages in every row"
            )
        if not value:
            raise DataError(f"{name}: row {number}: the prompt is empty", "Give at least one word")


def _before_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _one(name: str, split: str, run: RunArguments) -> Dataset:
    path = Path(name)
    if path.is_dir():
        found = _from_folder(path, split, required=True)
        assert found is not None
        return found
    if path.is_file():
        return read_file(path)
    if (
        path.suffix in _SUFFIXES
        or name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or (path.parent.is_dir() and "/" in name)
    ):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = get_close_matches(path.name, siblings, n=1)
        raise DataError(
            f"{name}: there is no such file or folder", f"Did you mean {path.parent / close[0]}?" if close else "Check the path"
        )
    return _from_hub(name, run.dataset_config, run.dataset_train_split)


def _from_folder(folder: Path, split: str, required: bool) -> Dataset | None:
    for stem in _SPLIT_FILES[split]:
        for suffix in _SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return read_file(folder / f"{stem}{suffix}")
    if not required:
        return None
    raise DataError(
        f"{folder}: no {' or '.join(_SPLIT_FILES[split])} file in it", f"Name one so, with {' or '.join(_SUFFIXES)}"
    )


def read_file(path: Path) -> Dataset:
    """The rows of a .jsonl, .json or .parquet file, as they are.

    Raises:
        DataError: naming the file, and of JSON lines the line.
    """
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path}: files that end in '{path.suffix}' are not read", f"Use {', '.join(_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty", "Give at least one row")
    if path.suffix == ".jsonl":
        _require_json_lines(path)
    try:
        if path.suffix == ".parquet":
            return Dataset.from_parquet(str(path))
        return Dataset.from_json(str(path))
    except Exception as error:  # the reader's errors are many and undocumented
        raise DataError(
            f"{path}: cannot be read ({_innermost(error)})", "Check that every row has the same fields and types"
        ) from None


def _require_json_lines(path: Path) -> None:
    rows = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            rows += 1
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 ({error.reason})", "Save the file as UTF-8") from None
            except (ValueError, RecursionError) as error:  # not JSON, or nested without end
                raise DataError(f"{path}:{number}: not JSON ({error})", "Write one JSON object a line") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: not a JSON object", 'Write {"prompt": ..., "completion": ...}')
            if not row:
                raise DataError(f"{path}:{number}: the object is empty", 'Write {"prompt": ..., "completion": ...}')
    if not rows:
        raise DataError(f"{path}: only blank lines", "Give at least one row")


def _from_hub(name: str, config: str | None, split: str) -> Dataset:
    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # network, missing, gated, wrong split: the hub's own words say which
        raise DataError(
            f"dataset_name: '{name}' is neither a file here nor to be had from the hub ({_innermost(error)})",
            "Check the name, dataset_config and dataset_train_split, or give a local file",
        ) from None


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _checked(data: Dataset, name: str, run: RunArguments, text_field: str, kept: str | None) -> Dataset:
    """The known columns, renamed as asked, every row of the type that its shape needs."""
    if not len(data):
        raise DataError(f"{name}: no rows", "Give at least one")
    data = _renamed(data, name, {"prompt": run.dataset_prompt_column, "completion": run.dataset_completion_column})
    columns = set(data.column_names)
    if {"prompt", "completion"} <= columns:
        _require_types(data, name, ("prompt", "completion"))
        used = {"prompt", "completion"}
    elif "messages" in columns:
        _require_messages(data, name)
        used = {"messages"}
    elif text_field in columns:
        _require_types(data, name, (text_field,))
        used = {text_field}
    elif "input_ids" in columns:
        _require_ids(data, name)
        used = {"input_ids"}
    else:
        raise DataError(
            f"{name}: columns {', '.join(sorted(columns))} are in no known shape ({SHAPES})",
            "Rename them, or name yours with dataset_prompt_column and dataset_completion_column (or dataset_text_field)",
        )
    extras = {"tools", "chat_template_kwargs", "labels", "completion_mask", kept}
    return data.select_columns([c for c in data.column_names if c in used | extras])


def _renamed(data: Dataset, name: str, wanted: dict[str, str | None]) -> Dataset:
    """The named columns as prompt and completion, both at once, so that two may also change places."""
    sources = {target: given for target, given in wanted.items() if given is not None}
    for target, given in sources.items():
        if given not in data.column_names:
            raise DataError(
                f"{name}: there is no column '{given}' (dataset_{target}_column)",
                f"There is: {', '.join(data.column_names)}",
            )
    if len(set(sources.values())) < len(sources):
        raise DataError(
            f"{name}: dataset_prompt_column and dataset_completion_column both name '{sources['prompt']}'", "Give two columns"
        )
    replaced = [target for target in sources if target in data.column_names and target not in sources.values()]
    names = {given: target for target, given in sources.items()}
    data = data.remove_columns(replaced)
    if not set(data.column_names) - names.keys() & set(names.values()):
        return data.rename_columns(names)
    raise DataError(f"{name}: '{', '.join(names)}' would be named twice", "Rename the columns in the file")


def _require_ids(data: Dataset, name: str) -> None:
    for number, row in enumerate(data, 1):
        ids = row["input_ids"]
        if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise DataError(f"{name}: row {number}: input_ids is {_brief(ids)}", "Give a list of token ids")
        for other in ("labels", "completion_mask"):
            if row.get(other) is not None and len(row[other]) != len(ids):
                raise DataError(
                    f"{name}: row {number}: {len(row[other])} {other} for {len(ids)} input_ids", "Give one for each token"
                )


def _require_types(data: Dataset, name: str, columns: tuple[str, ...]) -> None:
    kinds = (str, list) if columns != (columns[0],) else (str,)
    for number, row in enumerate(data, 1):
        for column in columns:
            value = row[column]
            if not isinstance(value, kinds) or (isinstance(value, list) and not _are_messages(value)):
                raise DataError(f"{name}: row {number}: {column} is {_brief(value)}", "Give text in every row")
        if len({type(row[column]) for column in columns}) > 1:
            raise DataError(
                f"{name}: row {number}: prompt and completion are not both text or both messages", "Give both alike"
            )


def _require_messages(data: Dataset, name: str) -> None:
    for number, row in enumerate(data, 1):
        messages = row["messages"]
        if not _are_messages(messages):
            raise DataError(
                f"{name}: row {number}: messages is {_brief(messages)}", 'Give a list of {"role": ..., "content": ...}'
            )


def _are_messages(value: Any) -> bool:
    """A list of turns, each with a role and something said (or a tool called)."""
    if not isinstance(value, list) or not value:
        return False
    turns = [turn if isinstance(turn, dict) else {} for turn in value]
    return all(isinstance(t.get("role"), str) and (t.get("content") is not None or t.get("tool_calls")) for t in turns)


def is_conversational(data: Dataset) -> bool:
    """Are its rows messages, which only a chat template turns into text?"""
    return "messages" in data.column_names or ("prompt" in data.column_names and isinstance(data[0]["prompt"], list))


def longest_row_of(data: Dataset, tokenizer: PreTrainedTokenizerBase, text_field: str) -> int:
    """Tokens of the longest row, about: those with most characters are cut into tokens, and no chat template is applied."""
    if "input_ids" in data.column_names:
        return max(map(len, data["input_ids"]))
    texts = heapq.nlargest(_CANDIDATES, (_text_of(row, text_field) for row in data), key=len)
    return 1 + max(len(tokenizer.encode(text)) for text in texts)  # the end token


def _text_of(row: dict[str, Any], text_field: str) -> str:
    said = [row[column] for column in ("prompt", "completion", "messages", text_field) if row.get(column)]
    return "".join(part if isinstance(part, str) else "".join(map(_turn, part)) for part in said)


def _turn(message: dict[str, Any]) -> str:
    """With its role on a line of its own, which takes about as many tokens as a template's marks."""
    return f"\n{message['role']}\n{message.get('content') or ''}\n"


def _brief(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]
