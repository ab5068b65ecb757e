"""`speckd evaluate`: everything that can be wrong is looked for before a model is loaded; then task by task, batch by batch."""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from speckd import fingerprints
from speckd.errors import ConfigError, StoreError
from speckd.evaluation.alike import unlike_plans
from speckd.evaluation.items import Item
from speckd.evaluation.journal import answered, batches, replace
from speckd.evaluation.kinds import KINDS
from speckd.evaluation.models import Models, Named, facts
from speckd.evaluation.options import Options, TaskOptions, load_options
from speckd.evaluation.rows import File, read_rows
from speckd.evaluation.statistics import summary
from speckd.evaluation.sums import columns
from speckd.evaluation.table import show
from speckd.evaluation.task import Task
from speckd.model_card import versions
from speckd.teachers.files import named
from speckd.teachers.manifest import as_json

logger = logging.getLogger(__name__)

RESULTS, PLAN = "evaluation.json", "plan.json"
#: Settings that answers do not depend on, but for rounding.
_FREE = {"output_dir", "batch_size", "device", "tasks"} | {
    f"{whose}{what}" for whose in ("", "teacher_") for what in ("model_name_or_path", "model_revision")
}


@dataclass(frozen=True)
class Work:
    """One task with all that it is to do."""

    name: str
    options: TaskOptions
    task: Task
    file: File
    items: Sequence[Item]


def evaluate(config: Path | None, flags: list[str]) -> Path:
    """Makes what is missing of an evaluation; returns `evaluation.json`.

    Raises:
        SpeckdError: for whatever the user can mend; nothing has been written then, unless answers had begun.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # it warns of texts that are longer than a model, which are counted here
    disable_progress_bars()
    options = load_options(config, flags, {name: kind.options for name, kind in KINDS.items()})
    output = _folder(options)
    options = _without_idle_teacher(options)
    models = Models.of(options)
    work = [_prepared(name, options.of_task(task), options, models) for name, task in options.tasks]
    plan = as_json(_plan(options, models, work))
    with _alone(output):
        _begin(output, plan)
        lines = {each.name: _worked(output, each, models, options.batch_size) for each in work}
        results = _results(options, models, work, lines)
        replace(output / RESULTS, iter([_document(results)]))
    show(results)
    logger.info("%s; the answers are in %s.", output / RESULTS, output / "examples")
    return output / RESULTS


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Nobody else answers into that folder meanwhile."""
    with named(output):
        output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".lock")
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        raise ConfigError(f"output_dir: another process evaluates into {output}", "Wait for it, or choose another") from None
    try:
        yield
    finally:
        (output / ".lock").unlink(missing_ok=True)
        lock.release()


def _without_idle_teacher(options: Options) -> Options:
    """A teacher whom no task asks would be loaded, and digested, for nothing."""
    if options.teacher_model_name_or_path is None or any(KINDS[task.kind].asks_teacher for _, task in options.tasks):
        return options
    asking = " or ".join(name for name, kind in KINDS.items() if kind.asks_teacher)
    logger.warning("No task asks the teacher (kind %s): it is not loaded.", asking)
    return dataclasses.replace(options, teacher_model_name_or_path=None)


def _folder(options: Options) -> Path:
    output = Path(str(options.output_dir))
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir: {output} is a file", "Choose a folder")
    for used in (options.model_name_or_path, options.teacher_model_name_or_path):
        if used is not None and Path(used).exists() and Path(used).resolve() == output.resolve():
            raise ConfigError(f"output_dir: {output} is a model's own folder", "Choose another, such as one inside of it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("an evaluation is one process's work, and this is one of several", "Start it without torchrun")
    if output.is_dir() and any(path.name != ".lock" for path in output.iterdir()) and not (output / PLAN).is_file():
        raise ConfigError(f"output_dir: {output} is not empty, and holds no evaluation", "Choose another folder")
    return output


def _prepared(name: str, task: TaskOptions, options: Options, models: Models) -> Work:
    made = KINDS[task.kind].make(name, task, options)
    if made.needs_teacher and models.teacher is None:
        raise ConfigError(
            f"tasks: {name}: a task of kind {task.kind} needs a teacher", "Give --teacher_model_name_or_path, or remove it"
        )
    file, rows = read_rows(name, task)
    return Work(name, task, made, file, made.items(rows, models))


# ---- what is made, and what it was made of ---------------------------------------------------------------------------------


def _plan(options: Options, models: Models, work: Sequence[Work]) -> dict[str, Any]:
    """Everything that the answers depend on."""
    given = {key: value for key, value in dataclasses.asdict(options).items() if key not in _FREE}
    return {
        "model": _who(models.subject, models.tokenizer),
        "teacher": None if models.teacher is None else _who(models.teacher, models.teacher.tokenizer),
        "settings": given,
        "tasks": {each.name: _what(each) for each in work},
    }


def _who(named: Named, tokenizer: Any) -> dict[str, Any]:
    """A folder may have moved; what cannot be looked into is known by its name."""
    own = {"weights": named.weights} if named.weights is not None else {"name": named.name, "revision": named.revision}
    return {**own, "stops": sorted(named.stops(tokenizer))}


def _what(work: Work) -> dict[str, Any]:
    """Files by what they hold, solved examples included, not by where they lie."""
    spoken = {key: value for key, value in _spoken(work.options).items() if key not in ("data", "few_shot_data")}
    prompts = fingerprints.of_bytes(item.key.encode() for item in work.items)
    return {**spoken, "data": work.file.sha256, "prompts": prompts}


def _spoken(task: TaskOptions) -> dict[str, Any]:
    heard = KINDS[task.kind].options | {"kind", "data", "limit"}
    return {key: value for key, value in dataclasses.asdict(task).items() if key in heard}


def _begin(output: Path, plan: Mapping[str, Any]) -> None:
    """The folder of this plan, or one in which nothing was answered yet."""
    path = output / PLAN
    if path.is_file() and _holds_answers(output):
        wrong = list(unlike_plans(_read(path), plan))
        if wrong:
            raise ConfigError(
                f"output_dir: {output} is another evaluation's: {'; '.join(wrong)}", "Set it as it was, or choose another"
            )
        logger.info("%s was begun before: what is there is kept.", output)
        return
    replace(path, iter([_document(plan)]))


def _holds_answers(output: Path) -> bool:
    if (output / RESULTS).is_file():
        return True
    for path in (output / "examples").glob("*.jsonl"):
        with named(path), path.open("rb") as file:
            if file.readline().endswith(b"\n"):
                return True
    return False


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise StoreError(f"{path}: cannot be read ({error})", "Remove the folder to evaluate anew") from None
    return dict(found)


def _document(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _worked(output: Path, work: Work, models: Models, batch_size: int) -> list[dict[str, Any]]:
    path = output / "examples" / f"{work.name}.jsonl"
    cut = batches(work.items, batch_size)
    with tqdm(total=len(work.items), desc=work.name, unit=" answers") as bar:
        return answered(path, cut, lambda batch: work.task.records(batch, models), bar.update)


def _results(
    options: Options, models: Models, work: Sequence[Work], lines: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    given = {key: value for key, value in dataclasses.asdict(options).items() if key not in ("tasks", "output_dir")}
    return {
        "speckd": versions()["speckd"],
        "model": facts(models.subject, models.model),
        "teacher": None if models.teacher is None else facts(models.teacher, models.teacher_model),
        "settings": given,
        "environment": {
            **{name: versions()[name] for name in ("python", "torch", "transformers")},
            "device": _device(models.device),
        },
        "tasks": {each.name: _result(each, lines[each.name], options.seed) for each in work},
    }


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _result(work: Work, lines: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    examples = list(columns(lines).values())
    counts = work.task.counts(lines)
    if counts.get("without_room"):
        logger.warning("%s: %d prompts fill all positions of the model: no answer.", work.name, counts["without_room"])
    return {
        "kind": work.options.kind,
        "data": {"file": str(work.file.path), "sha256": work.file.sha256, "rows": work.file.rows},
        "options": _spoken(work.options),
        "n": len(examples),
        "metrics": {metric.name: summary(metric, examples, seed) for metric in work.task.metrics(lines)},
        "counts": counts,
    }
