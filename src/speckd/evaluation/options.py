"""What the user asked for: models, tasks and where the answers go, checked key by key before anything heavy happens."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speckd.config import nearest
from speckd.errors import ConfigError
from speckd.settings import read_flags
from speckd.strict_yaml import read_yaml


def _option(default: Any, text: str, least: float = -math.inf, most: float = math.inf) -> Any:
    return field(default=default, metadata={"help": text, "least": least, "most": most})


@dataclass(frozen=True)
class TaskOptions:
    """One task. Which options a kind of task hears of, its kind says (`kinds.py`)."""

    kind: str = _option("", "rouge, checks, math, code, likelihood or draft")
    data: str = _option("", "a .jsonl, .json, .csv or .parquet file")
    prompt_column: str | None = _option(None, "the column that asks, where it has another name than is known")
    reference_column: str | None = _option(None, "the column with the answer, likewise")
    prompt_template: str | None = _option(None, "the prompt, with columns in braces: 'Q: {question}\\nA:'")
    prompt_words: int | None = _option(None, "of rows of text: so many words are the prompt, the rest is the reference", 1)
    few_shot: int = _option(0, "solved examples before each prompt", 0)
    few_shot_data: str | None = _option(None, "the file with the solved examples: its first rows are taken")
    apply_chat_template: bool | None = _option(None, "as a user's turn (messages always are)")
    limit: int | None = _option(None, "only the first so many rows", 1)
    max_new_tokens: int | None = _option(None, "tokens of an answer at most", 1)
    max_length: int | None = _option(None, "tokens of a text at most: what is beyond is cut off", 2)
    samples: int = _option(1, "answers to each prompt", 1)
    pass_at: tuple[int, ...] = _option((1,), "k of pass@k, one or several", 1)
    sampling_temperature: float = _option(0.0, "0: the most probable token (greedy)", 0)
    sampling_top_k: int = _option(0, "0: off", 0)
    sampling_top_p: float = _option(1.0, "1: off", 1e-9, 1)
    stop: tuple[str, ...] = _option((), "texts at which an answer ends")
    draft_length: int = _option(5, "tokens that are drafted before the teacher is asked", 1)
    timed_prompts: int = _option(4, "on how many prompts the clock is held", 0)
    timed_repeats: int = _option(3, "how often each way of decoding is timed on each", 1)


@dataclass(frozen=True)
class Options:
    """One evaluation."""

    model_name_or_path: str | None = _option(None, "the model: a folder (an adapter's, too) or a hub id")
    model_revision: str = _option("main", "of a hub id")
    teacher_model_name_or_path: str | None = _option(None, "what it is compared with")
    teacher_model_revision: str = _option("main", "of a hub id")
    output_dir: str | None = _option(None, "where the answers and evaluation.json go")
    batch_size: int = _option(8, "texts side by side", 1)
    max_new_tokens: int = _option(256, "tokens of an answer at most", 1)
    limit: int | None = _option(None, "only the first so many rows of each task", 1)
    seed: int = _option(0, "of sampling and of the bootstrap", 0, 2**32 - 1)
    dtype: str = _option("auto", "auto (as saved), float32, bfloat16 or float16")
    device: str | None = _option(None, "such as cuda or cpu; by default a GPU where there is one")
    trust_remote_code: bool = _option(False, "run code that comes with the model")
    apply_chat_template: bool | None = _option(None, "for all tasks that do not say otherwise")
    i_accept_unsandboxed_code: bool = _option(False, "run the model's programs with your own rights where no box can be had")
    tasks: tuple[tuple[str, TaskOptions], ...] = ()

    def of_task(self, task: TaskOptions) -> TaskOptions:
        """With what stands above the tasks where a task says nothing."""
        return dataclasses.replace(
            task,
            limit=task.limit or self.limit,
            max_new_tokens=task.max_new_tokens or self.max_new_tokens,
            apply_chat_template=self.apply_chat_template if task.apply_chat_template is None else task.apply_chat_template,
        )


_ABOVE = {f.name: f for f in dataclasses.fields(Options) if f.name != "tasks"}
_OF_A_TASK = {f.name: f for f in dataclasses.fields(TaskOptions)}


def described() -> dict[str, str]:
    """Every setting of an evaluation, with what it does and its default; those of a task say so."""
    of_tasks = {name: f"of a task: {_described(f)}" for name, f in _OF_A_TASK.items() if name not in _ABOVE}
    return {name: _described(f) for name, f in _ABOVE.items()} | of_tasks


def _described(spec: Any) -> str:
    unset = spec.default in (None, "", ())
    return str(spec.metadata["help"]) + ("" if unset else f" [default: {spec.default}]")


_DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_options(config: Path | None, flags: list[str], kinds: Mapping[str, frozenset[str]]) -> Options:
    """File, then flags. A single task may be given by flags alone: `--task math --data rows.jsonl`.

    Args:
        kinds: by kind of task, the options that it hears of.

    Raises:
        ConfigError: naming the file or flag, the key, and the nearest valid one or the expected type.
    """
    given = {} if config is None else read_yaml(config)
    words = read_flags(flags, {name: f.type for name, f in {**_OF_A_TASK, **_ABOVE}.items()} | {"task": str})
    by_file, where = given.pop("tasks", None), str(config)
    _require_known(where, given, [*_ABOVE, "tasks"])
    named = words.pop("task", None)
    _require_known("the command line", words, [*_ABOVE, *_OF_A_TASK, "task", "compare"])
    of_task = {key: words.pop(key) for key in list(words) if key in _OF_A_TASK and key not in _ABOVE}
    above = {**_typed(_ABOVE, given, where), **_typed(_ABOVE, words, "the command line")}
    if by_file is not None and (named or of_task):
        key = "task" if named else next(iter(of_task))
        raise ConfigError(f"the command line: {key} is set, and {where} has tasks", "Write it there, below the task")
    if named is not None:
        by_file, where = {str(named): {"kind": named, **of_task}}, "the command line"
    elif of_task:
        raise ConfigError(f"the command line: {next(iter(of_task))} is an option of a task", f"Add --task {'|'.join(kinds)}")
    tasks = tuple((name, _task(name, values, where, kinds)) for name, values in _mapping(by_file, where).items())
    options = Options(**above, tasks=tasks)
    _require_sound(options)
    return options


def _mapping(tasks: Any, where: str) -> dict[str, Any]:
    example = "--task math --data rows.jsonl, or tasks: {gsm8k: {kind: math, data: rows.jsonl}} in a file"
    if not tasks:
        raise ConfigError("there is no task", f"Give one: {example}")
    if not isinstance(tasks, dict):
        raise ConfigError(f"{where}: tasks is not a mapping of names to tasks", f"Write {example}")
    for name in tasks:
        if not all(c.isalnum() or c in "-_." for c in str(name)) or str(name).startswith("."):
            raise ConfigError(f"{where}: tasks: '{name}' would name a file", "Use letters, digits, '-', '_' and '.'")
    return {str(name): values for name, values in tasks.items()}


def _task(name: str, values: Any, where: str, kinds: Mapping[str, frozenset[str]]) -> TaskOptions:
    where = f"{where}: tasks: {name}" if where != "the command line" else where
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: not a mapping", "Write {kind: math, data: rows.jsonl}")
    _require_known(where, values, list(_OF_A_TASK))
    kind = str(values.get("kind", ""))
    if kind not in kinds:
        raise ConfigError(f"{where}: kind is '{kind}'" if kind else f"{where}: kind is not set", nearest(kind, list(kinds)))
    if not values.get("data"):
        raise ConfigError(f"{where}: data is not set", "Give a .jsonl, .json, .csv or .parquet file")
    for key in values:
        if key not in kinds[kind] | {"kind", "data", "limit"}:
            raise ConfigError(f"{where}: {key} has no effect on a task of kind {kind}", "Remove it")
    task = TaskOptions(**_typed(_OF_A_TASK, values, where))
    if bool(task.few_shot) != bool(task.few_shot_data):
        raise ConfigError(f"{where}: few_shot and few_shot_data belong together", "Give both: how many, and of which file")
    if not task.pass_at:
        raise ConfigError(f"{where}: pass_at is empty", "Give one k or several")
    if not all(task.stop):
        raise ConfigError(f"{where}: stop: an empty text ends every answer at once", "Remove it")
    if max(task.pass_at) > task.samples:
        raise ConfigError(f"{where}: pass@{max(task.pass_at)} of {task.samples} samples", f"Set samples: {max(task.pass_at)}")
    if task.samples > 1 and not task.sampling_temperature:
        raise ConfigError(f"{where}: {task.samples} greedy samples would all be the same", "Set sampling_temperature")
    return task


def _require_sound(options: Options) -> None:
    if options.model_name_or_path is None:
        raise ConfigError("model_name_or_path is not set: there is no model", "Give a path or hub id")
    if options.output_dir is None:
        raise ConfigError("output_dir is not set", "Say where the answers go: --output_dir FOLDER")
    if options.dtype not in _DTYPES:
        raise ConfigError(f"dtype is '{options.dtype}'", nearest(options.dtype, list(_DTYPES)))
    if options.i_accept_unsandboxed_code and not any(task.kind == "code" for _, task in options.tasks):
        raise ConfigError("i_accept_unsandboxed_code is set, but there is no task of kind code", "Remove it")


def _require_known(where: str, values: Mapping[str, Any], known: list[str]) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: '{key}' is not a setting of an evaluation", nearest(str(key), known))


def _typed(fields: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {key: _of_type(fields[key], value, f"{where}: {key}") for key, value in values.items()}


def _of_type(spec: Any, value: Any, where: str) -> Any:
    """The value as the field's type, where it is one."""
    kinds = typing.get_args(spec.type) if isinstance(spec.type, types.UnionType) else (spec.type,)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if typing.get_origin(kind) is tuple:
        of_one = dataclasses.make_dataclass("One", [("type", Any), ("metadata", Any)])(typing.get_args(kind)[0], spec.metadata)
        return tuple(_of_type(of_one, each, where) for each in (value if isinstance(value, list) else [value]))
    if kind is int and isinstance(value, str) and value.isdecimal():  # one of several on the command line
        value = int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, str):  # YAML reads 1e-1 as a text
        with suppress(ValueError):
            value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        raise ConfigError(f"{where}: {value!r} does not fit", f"Give {names[kind]}")
    if kind in (int, float) and not spec.metadata["least"] <= value <= spec.metadata["most"]:
        raise ConfigError(f"{where} is {value}", f"Give {_range(spec.metadata['least'], spec.metadata['most'])}")
    return value


def _range(least: float, most: float) -> str:
    return f"at least {least:g}" if most == math.inf else f"a number from {least:g} to {most:g}"
