"""`speckd profile`: where the time of a training step goes. A few steps of `speckd train`, in a folder that is removed."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from speckd.run import leave_together, nothing_kept, prepared_trainer, say_things_once
from speckd.settings import load_settings
from speckd.spans import BACKWARD, OPTIMIZER, PREFIX, span, timing
from speckd.trainer import SpecKDTrainer

#: Steps before the first one that counts: they allocate, and build the optimizer's state.
WARM_UP = 2

#: A span by the names of those around it and its own, outermost first.
SpanPath = tuple[str, ...]
#: A moment: seconds of the host's clock, or an event in the stream of a CUDA device.
Mark = Any


def profile(config: Path | None, recipe: str | None, flags: list[str], steps: int) -> None:
    """Prints where a step's time goes; leaves nothing on disk.

    Args:
        config, recipe, flags: as for `speckd train`; what says where and when to save, log and evaluate is set aside.
        steps: how many are measured.

    Raises:
        SpeckdError: for whatever `speckd train` would refuse.
    """
    with TemporaryDirectory(prefix="speckd-profile-") as folder:
        settings = load_settings(config, recipe, [*flags, *nothing_kept(folder), "--max_steps", str(WARM_UP + steps)])
        settings.training.include_num_input_tokens_seen = "non_padding"  # the command line knows it as a truth value only
        say_things_once(settings)
        with closing(prepared_trainer(settings, Path(folder))) as trainer:
            found = measured(trainer)
            if trainer.is_world_process_zero():
                print(found.table())
            leave_together(trainer)


def measured(trainer: SpecKDTrainer) -> "StepProfile":
    """Trains to `max_steps` and tells where the time of the steps after the warm-up went."""
    stopwatch = Stopwatch(trainer.accelerator.device)
    meter = _Meter(stopwatch)
    for loud in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(loud)
    trainer.add_callback(meter)
    trainer.accelerator.backward = _spanned(BACKWARD, trainer.accelerator.backward)
    with timing(stopwatch):
        trainer.train()
    return StepProfile(stopwatch.laps(), meter.tokens[-1] - meter.tokens[0], meter.peak_bytes, stopwatch.device)


def _spanned(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with span(name):
            return function(*args, **kwargs)

    return call


# ---- measuring -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lap:
    """One step: its milliseconds, and those of every span in it, in the order in which they first began."""

    total: float
    spans: dict[SpanPath, float]


class Stopwatch:
    """Times spans lap by lap: on a CUDA device in its stream, without waiting for it; elsewhere by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._path: SpanPath = ()
        self._laps: list[tuple[Mark, Mark, list[tuple[SpanPath, Mark, Mark]]]] = []
        self._spans: list[tuple[SpanPath, Mark, Mark]] = []
        self._began: Mark = None

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        path = self._path = (*self._path, name)
        place, start = len(self._spans), self._mark()
        self._spans.append((path, start, start))
        try:
            yield
        finally:
            self._spans[place] = (path, start, self._mark())
            self._path = path[:-1]

    def begin(self) -> None:
        """Forgets what was before; the first lap starts here."""
        self._laps, self._spans, self._began = [], [], self._mark()

    def lap(self) -> None:
        """Ends a lap between two spans, and starts the next."""
        now = self._mark()
        self._laps.append((self._began, now, self._spans))
        self._began, self._spans = now, []

    def laps(self) -> list[Lap]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = []
        for began, ended, spans in self._laps:
            times: dict[SpanPath, float] = {}
            for path, start, end in spans:
                times[path] = times.get(path, 0.0) + self._milliseconds(start, end)
            found.append(Lap(self._milliseconds(began, ended), times))
        return found

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _milliseconds(self, start: Mark, end: Mark) -> float:
        return start.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - start)


class _Meter(TrainerCallback):
    """Laps at the ends of steps, the optimizer's span, and what the trainer knows of tokens and memory."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.tokens: list[int] = []  # seen at the end of the warm-up, and of each step after it
        self.peak_bytes = 0
        self._open = ExitStack()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._open.enter_context(span(OPTIMIZER))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._open.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < WARM_UP:
            return
        self.stopwatch.begin() if state.global_step == WARM_UP else self.stopwatch.lap()
        self.tokens.append(state.num_input_tokens_seen)
        self.peak_bytes = peak_bytes(self.stopwatch.device)


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on a CUDA device, elsewhere resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- reporting -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepProfile:
    """The measured steps, their non-padding tokens on all processes, and the peak memory of the whole run so far."""

    laps: Sequence[Lap]
    tokens: int
    peak_bytes: int
    device: torch.device

    @cached_property
    def parts(self) -> dict[SpanPath, float]:
        """Median milliseconds of each span, each behind the one that it lies within."""
        order = {path: place for place, path in enumerate(dict.fromkeys(path for lap in self.laps for path in lap.spans))}
        paths = sorted(order, key=lambda path: [order[path[: depth + 1]] for depth in range(len(path))])
        return {path: median(lap.spans.get(path, 0.0) for lap in self.laps) for path in paths}

    @cached_property
    def rest(self) -> float:
        """Median milliseconds outside of all spans."""
        return median(lap.total - _outermost(lap.spans) for lap in self.laps)

    @property
    def step(self) -> float:
        """Milliseconds: the sum of the medians of its parts."""
        return _outermost(self.parts) + self.rest

    @property
    def tokens_per_second(self) -> float:
        return 1000 * self.tokens / sum(lap.total for lap in self.laps)

    def table(self) -> str:
        """Markdown. A part that lies within another stands below it, behind a dot for each level."""
        rows = [("· " * (len(path) - 1) + path[-1].removeprefix(PREFIX), time) for path, time in self.parts.items()]
        rows += [("rest", self.rest), ("**step**", self.step)]
        width = max(len(name) for name, _ in rows)
        lines = [f"| {'part':<{width}} |       ms |  share |", f"| {'-' * width} | -------: | -----: |"]
        lines += [f"| {name:<{width}} | {time:8.1f} | {time / self.step:6.1%} |" for name, time in rows]
        whose = f"on {self.device}" if self.device.type == "cuda" else "of the process"
        facts = (
            f"Median of {len(self.laps)} steps after {WARM_UP} to warm up, by the clock of {self.device.type}: "
            f"{self.tokens_per_second:,.0f} tokens a second without padding; peak memory {whose}, loading included: "
            f"{self.peak_bytes / 2**20:,.0f} MiB."
        )
        return "\n".join([*lines, "", facts])


def _outermost(spans: dict[SpanPath, float]) -> float:
    return sum(time for path, time in spans.items() if len(path) == 1)
