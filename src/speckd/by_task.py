"""Held-out measures of each task by itself, where a column of the data names the tasks."""

from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset

from speckd.collation import SAMPLE
from speckd.errors import DataError
from speckd.step_lines import BY_TASK, write_of_step
from speckd.trainer import SpecKDTrainer


def tasks_of(data: Dataset, column: str | None) -> list[str] | None:
    """Of each row, by its number.

    Raises:
        DataError: there is no such column.
    """
    if column is None:
        return None
    if column not in data.column_names:
        raise DataError(f"there is no column '{column}' (task_column)", f"There is: {', '.join(data.column_names)}")
    return [str(value) for value in data[column]]


def measure_by_task(trainer: SpecKDTrainer, folder: Path) -> None:
    """Writes the held-out measures of each task at this step: one more pass over the held-out data.

    A line: `task`, `sequences` (those with a supervised token), and the measures of `speckd.evaluate`, over its tokens.
    """
    tasks = trainer.tasks
    if tasks is None or not isinstance(trainer.eval_dataset, Dataset):
        return
    own: dict[str, list[int]] = {}
    for place, samples in enumerate(trainer.eval_dataset[SAMPLE]):
        own.setdefault(tasks[samples[0]], []).append(place)
    found = [{"task": task, **_measured(trainer, trainer.eval_dataset.select(places))} for task, places in sorted(own.items())]
    if trainer.is_world_process_zero():
        write_of_step(folder / BY_TASK, trainer.state.global_step, found)


def _measured(trainer: SpecKDTrainer, data: Dataset) -> Mapping[str, float]:
    sums, _ = trainer.held_out(data)
    known = None if trainer.source is None else trainer.source.capabilities
    return {"sequences": len(data), **sums.result(known)}
