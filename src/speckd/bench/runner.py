"""Runs what a plan asks for and is not there yet, by several processes; a killed benchmark goes on where it was."""

import fcntl
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from threading import Thread
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from speckd.bench import makers, worker
from speckd.bench.plan import TUNED_BY, Block, Cell, Plan, Run, Teacher
from speckd.errors import ConfigError, SpeckdError
from speckd.quickstart.models import quiet_loading


@dataclass(frozen=True)
class Found:
    """A run's cell, seed and what came of it. `learning_rate`: the one that tuning chose."""

    cell: Cell
    seed: int
    learning_rate: float
    steps: int
    outcome: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """`found`: in the plan's order; `failed`: which runs there are no figures of, and why."""

    found: list[Found]
    failed: list[str]


def run_all(plan: Plan, folder: Path, workers: int, console: Console) -> Outcome:
    """Everything that the plan asks for.

    Raises:
        SpeckdError: what runs begin with, or the choice of a learning rate, failed; all else is kept.
    """
    for method in plan.methods.values():
        worker.objective_of(method)  # refuses a wrong setting before anything is trained
    _require_labels_of_others(plan)
    _require_device(plan.world.device)
    cells = list(plan.cells())
    made = folder / "made"
    tuning = _tuning(plan, cells)
    with _Pool(folder, workers, console) as pool:
        pool.all("clean teacher", [Run(plan.world, 0, 0)], made)  # all others begin with it
        pool.all("other teachers", _made_first(plan, cells), made)
        seeded = [*_seeds(cells), *((b, c, seed) for c, b in tuning.items() for seed in plan.tuning_seeds)]
        pool.all("starts", _starts([plan.run(b, c, seed, 0.0) for b, c, seed in seeded]), made)
        rates = _tune(plan, tuning, pool, made)
        wanted = {(c, s): plan.run(b, c, s, _rate(plan, b, c, rates)) for b, c, s in _seeds(cells)}
        done, failed = pool.some("runs", list(wanted.values()), made)
    there = [(cell, seed, run) for (cell, seed), run in wanted.items() if run.key in done]
    return Outcome([Found(cell, seed, run.learning_rate, run.steps, done[run.key]) for cell, seed, run in there], failed)


def _require_labels_of_others(plan: Plan) -> None:
    """Refuses who learns from, or judges by, the labels of text that the student wrote: they are its own words."""
    for block in plan.blocks:
        for name in block.methods if "student text" in block.data else ():
            if not plan.methods[name].untrained and worker.asks_for_labels(worker.objective_of(plan.methods[name])):
                raise ConfigError(
                    f"blocks: {block.name}: on student text, {name} would take the student's own words for labels",
                    "Give that data a block of its own, with methods that ask for no label",
                )


def _require_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # AssertionError: torch was built without CUDA
        raise ConfigError(f"world: device '{device}' is not there", "Set device: cpu, or run it where the device is") from None


def _seeds(cells: Sequence[tuple[Block, Cell]]) -> Iterable[tuple[Block, Cell, int]]:
    """Seed by seed: a benchmark that is stopped has whole seeds."""
    for seed in range(max(block.seeds for block, _ in cells)):
        for block, cell in cells:
            if seed < block.seeds:
                yield block, cell, seed


def _tuned(plan: Plan, cell: Cell) -> Cell:
    """The cell that a learning rate is chosen for: whatever block asks."""
    return replace(plan.tuning_cell(cell), block="")


def _tuning(plan: Plan, cells: Sequence[tuple[Block, Cell]]) -> dict[Cell, Block]:
    """Whose rate is chosen, with the first block that asks for it."""
    found: dict[Cell, Block] = {}
    for block, cell in cells:
        if plan.tuned(block, cell):
            found.setdefault(_tuned(plan, cell), block)
    return found


def _tune(plan: Plan, tuning: Mapping[Cell, Block], pool: "_Pool", made: Path) -> dict[Cell, float]:
    """For each cell the rate that is best on the validation tasks, in the measure of the method's aim.

    A cell whose best rate is the outermost so far tries the next one on the plan's ladder; a rate that failed, as where the
    loss runs away, is the worst.

    Raises:
        SpeckdError: all rates of a cell failed.
    """
    scores: dict[Cell, dict[float, float]] = {cell: {} for cell in tuning}
    asked: dict[Cell, Sequence[float]] = dict.fromkeys(tuning, plan.learning_rates)
    while asked:
        runs = {
            (cell, rate, seed): plan.run(tuning[cell], cell, seed, rate, split="validation")
            for cell, rates in asked.items()
            for rate in rates
            for seed in plan.tuning_seeds
        }
        done, failed = pool.some("learning rates", list(runs.values()), made)
        for cell, rates in asked.items():
            name, more = TUNED_BY[plan.methods[cell.method].aim]
            for rate in rates:
                tried = [runs[cell, rate, seed].key for seed in plan.tuning_seeds]
                found = [done[key]["measures"][name] for key in tried if key in done]
                scores[cell][rate] = mean(found) if len(found) == len(tried) else -math.inf if more else math.inf
            if not any(map(math.isfinite, scores[cell].values())):
                raise SpeckdError(f"no learning rate of {cell.method} could be tried: {failed[0]}", "Change learning_rates")
        asked = {cell: beyond for cell in asked if (beyond := next_rates(plan.ladder, scores[cell], _best(plan, cell, scores)))}
    return {cell: _best(plan, cell, scores) for cell in tuning}


def _best(plan: Plan, cell: Cell, scores: Mapping[Cell, Mapping[float, float]]) -> float:
    _, more = TUNED_BY[plan.methods[cell.method].aim]
    return (max if more else min)(scores[cell], key=scores[cell].__getitem__)


def next_rates(ladder: Sequence[float], tried: Iterable[float], best: float) -> list[float]:
    """What lies just beyond the best rate, if that is the first or the last of those tried."""
    tried = sorted(tried)
    place = ladder.index(best)
    beside = {tried[0]: place - 1, tried[-1]: place + 1} if len(tried) > 1 else {}
    return [ladder[beside[best]]] if best in beside and 0 <= beside[best] < len(ladder) else []


def _rate(plan: Plan, block: Block, cell: Cell, tuned: Mapping[Cell, float]) -> float:
    if plan.methods[cell.method].untrained:
        return 0.0
    if plan.tuned(block, cell):
        return tuned[_tuned(plan, cell)]
    return block.learning_rate or plan.learning_rates[0]


def _made_first(plan: Plan, cells: Sequence[tuple[Block, Cell]]) -> list[Run]:
    """One run for each thing that several need, with no method: the teachers' models and answers."""
    needed = {(plan.teachers[cell.teacher].base, cell.data) for _, cell in cells} - {(Teacher(), "dataset")}
    return [Run(plan.world, 0, 0, None, teacher, data) for teacher, data in needed]


def _starts(runs: Iterable[Run]) -> list[Run]:
    found = {(run.seed, run.start_steps): Run(run.world, run.seed, run.start_steps) for run in runs if run.start_steps}
    return list(found.values())


# ---- in a worker -------------------------------------------------------------------------------------------------------------


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    quiet_loading()


def _end_with(parent: int) -> None:
    """A parent that was killed tells nobody: what its workers still had to do would go on behind its back."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(stage: str, run: Run, made: Path, path: Path) -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    if stage in ("clean teacher", "other teachers"):
        makers.teacher_model(run.world, run.teacher, made)
        makers.teacher_texts(run.world, run.split, made)
        if run.data != "student text":
            makers.stored_answers(run.world, run.teacher, run.data == "teacher text", made)
    elif stage == "starts":
        makers.starting_student(run, made)
    else:
        outcome = worker.train_and_measure(run, made)
    _keep(path, outcome)
    return outcome


def _keep(path: Path, outcome: dict[str, Any]) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(outcome))
    unfinished.rename(path)


# ---- the parent --------------------------------------------------------------------------------------------------------------


#: That a stage says, where it has no bar.
_LINES = 20


class _Pool:
    """Worker processes, and the folder in which each run's outcome is kept under its key."""

    def __init__(self, folder: Path, workers: int, console: Console) -> None:
        self.kept, self.console, self.workers = folder / "runs", console, workers

    def __enter__(self) -> "_Pool":
        """
        Raises:
            ConfigError: another benchmark is at work in the folder.
        """
        folder = self.kept.parent
        if folder.is_dir() and any(folder.iterdir()) and not self.kept.is_dir():
            raise ConfigError(f"{folder} is not empty, and holds no benchmark", "Name a new folder with --output_dir")
        self.kept.mkdir(parents=True, exist_ok=True)
        self.lock = (self.kept.parent / ".lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone, and gone with it
        except OSError:
            raise ConfigError(f"another benchmark is at work in {self.kept.parent}", "Name another folder") from None
        for left in self.kept.parent.glob("*/*.unfinished"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        self.pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), _begin, (os.getpid(),))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            for process in multiprocessing.active_children():
                process.kill()  # what they made counts only when it is renamed
        self.lock.close()

    def all(self, stage: str, runs: Sequence[Run], made: Path) -> dict[str, dict[str, Any]]:
        """
        Raises:
            SpeckdError: the first failure, after all others have been run.
        """
        found, failed = self.some(stage, runs, made)
        if failed:
            raise SpeckdError(f"{len(failed)} of {stage} failed, first {failed[0]}", "The same command tries them again")
        return found

    def some(self, stage: str, runs: Sequence[Run], made: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Outcomes by key, those that are there read and not run; and what failed, in words."""
        paths = {run.key: self.kept / f"{'' if stage in ('runs', 'learning rates') else 'made-'}{run.key}.json" for run in runs}
        missing = {run.key: run for run in runs if not paths[run.key].exists()}
        failed: list[str] = []
        began, had = time.monotonic(), len(paths) - len(missing)
        with self._progress() as progress:
            bar = progress.add_task(stage, total=len(paths), completed=had)
            waiting = {self.pool.submit(_work, stage, run, made, paths[key]): run for key, run in missing.items()}
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    run = waiting.pop(future)
                    error = future.exception()
                    if error is not None:
                        failed.append(
                            f"{run.method}, {run.teacher}, {run.data}, seed {run.seed}: {type(error).__name__}: {error}"
                        )
                        self.console.print(f"failed: {failed[-1]}", markup=False)
                    progress.advance(bar)
                    self._say(stage, len(paths) - len(waiting), len(paths), had, began)
        return {key: json.loads(path.read_text()) for key, path in paths.items() if path.exists()}, failed

    def _say(self, stage: str, done: int, of: int, had: int, began: float) -> None:
        """Where no bar is seen, such as in a file: a line now and then."""
        if self.console.is_terminal or done * _LINES // of == (done - 1) * _LINES // of:
            return
        left = (time.monotonic() - began) / (done - had) * (of - done)
        self.console.print(f"{stage}: {done} of {of}, about {left / 60:.0f} min left")

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=self.console)
