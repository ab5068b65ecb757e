"""Between the data's batches and the loss: the step's chosen rows get completions that the student has just written."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from speckd.collation import SAMPLE, TEACHER
from speckd.errors import DataError, SpeckdError
from speckd.sources.completions import COUNTS, CollapseWatch, counts, described
from speckd.sources.mixture import AdaptiveFraction, Mixture, Origin
from speckd.sources.replay import ReplayBuffer, Written
from speckd.sources.served_student import ServedStudent
from speckd.sources.writer import Draws, Prompt, Sampling, Writer
from speckd.types import IGNORED_LABEL

#: Of a batch's rows, [B] bool: did the student write the completion?
WRITTEN = "student_written"
_STATE = "sequence_source.json"


def longest_prompt(dataset: Dataset, name: str) -> int:
    """Tokens before the first supervised one, of the row with most of them.

    Raises:
        DataError: a row has nothing to continue, or is to be learnt in several places, as a talk of several turns is.
    """
    longest = 0
    for table in dataset.with_format("arrow").iter(10_000):
        for labels, samples in zip(table["labels"].to_pylist(), table[SAMPLE].to_pylist(), strict=True):
            supervised = np.asarray(labels) != IGNORED_LABEL
            first, row = int(supervised.argmax()), f"the {name} data: row {samples[0] + 1}"
            if not first:
                fix = "Give prompt and completion, or messages with assistant_only_loss: true"
                raise DataError(f"{row} has no prompt that the student could continue", fix)
            if int((supervised[1:] & ~supervised[:-1]).sum()) > 1:
                fix = "Cut it into one row for each turn, with the turns before as its prompt"
                raise DataError(f"{row} has several assistant turns to learn, of which only one can be written anew", fix)
            longest = max(longest, first)
    return longest


def first_prompt(dataset: Dataset) -> Prompt:
    """Of the first row that `longest_prompt` has found to have one."""
    row = dataset[0]
    labels = torch.tensor(row["labels"])
    return Prompt(torch.tensor(row["input_ids"])[: int((labels != IGNORED_LABEL).long().argmax())], row[SAMPLE][0])


@dataclass(frozen=True)
class Line:
    """One line of a batch without its padding. `token_ids`, `labels`: [T] int64 on the CPU."""

    token_ids: Tensor
    labels: Tensor
    sample: int
    teacher: int | None

    @property
    def supervised(self) -> bool:
        return bool((self.labels[1:] != IGNORED_LABEL).any())

    @property
    def prompt(self) -> Prompt:
        """What comes before the first supervised token."""
        return Prompt(self.token_ids[: int((self.labels != IGNORED_LABEL).long().argmax())], self.sample)

    def example(self) -> dict[str, Any]:
        """As the collator takes it."""
        length = len(self.token_ids)
        teachers = {} if self.teacher is None else {TEACHER: [self.teacher] * length}
        ids, labels = self.token_ids.tolist(), self.labels.tolist()
        return {"input_ids": ids, "labels": labels, SAMPLE: [self.sample] * length, **teachers}


def lines_of(batch: Mapping[str, Tensor]) -> list[Line]:
    """A batch padded on the right, taken apart."""
    ids, labels, samples = (batch[name].cpu() for name in ("input_ids", "labels", SAMPLE))
    teachers = batch[TEACHER].cpu() if TEACHER in batch else None
    lengths = batch["attention_mask"].sum(-1).tolist()
    return [
        Line(ids[i, :n], labels[i, :n], int(samples[i, 0]), None if teachers is None else int(teachers[i, 0]))
        for i, n in enumerate(lengths)
    ]


def rewritten(written: Written, sample: int) -> Line:
    """A row of a prompt and what was written: every written token is supervised.

    `sample`: whose row it stands in for. A batch's sequences are told apart by it, and the same replayed text may come twice.
    """
    prompt, completion = written.prompt, written.completion
    unlabelled = torch.full_like(prompt.token_ids, IGNORED_LABEL)
    labels = torch.cat([unlabelled, completion.token_ids])
    return Line(torch.cat([prompt.token_ids, completion.token_ids]), labels, sample, written.teacher)


def beside(sample: int) -> int:
    """The number of the written sequence that stands beside a sample's own: below −1, which is the padding's."""
    return -2 - sample


class StudentText:
    """Chooses, writes and remembers; counts, and stops when the text collapses.

    Args:
        writer: with the weights of the running step, unless it is `served`.
        sampling, mixture: how it writes, and how much.
        collate: examples -> a batch.
        gather: a list -> the lists of all processes, joined.
        watch: hears of each step's completions.
        replay: where DistiLLM's earlier text is kept, else None.
        paired: each chosen row stays beside its rewritten one.
        adaptive: moves the mixture's share, where it is not None.
        served: the writer, where its weights are on servers, and must be renewed there.
    """

    def __init__(
        self,
        writer: Writer,
        sampling: Sampling,
        mixture: Mixture,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        gather: Callable[[list[Any]], list[Any]],
        watch: CollapseWatch,
        replay: ReplayBuffer | None = None,
        paired: bool = False,
        adaptive: AdaptiveFraction | None = None,
        served: ServedStudent | None = None,
    ) -> None:
        self._served = served
        self._writer, self._sampling, self._mixture, self._collate = writer, sampling, mixture, collate
        self._gather, self._watch, self._replay, self._paired, self.adaptive = gather, watch, replay, paired, adaptive
        self._pending: list[Written] = []  # of the running step, of all processes
        self._pending_counts = torch.zeros(COUNTS, dtype=torch.float64)
        self._window = _Window()
        self.last: Written | None = None  # to show

    # ---- one step --------------------------------------------------------------------------------------------------------

    def rewrite(
        self, batches: Sequence[Mapping[str, Tensor]], step: int, steps: int
    ) -> tuple[list[dict[str, Any]], SpeckdError | None]:
        """A step's micro-batches with the student's completions, and what kept the writer from writing, which all processes
        must hear of; then nothing is rewritten."""
        began = time.perf_counter()
        apart = [lines_of(batch) for batch in batches]
        rows = [row for some in apart for row in some]
        origins = self._origins(rows, step, steps)
        try:
            if self._served is not None:
                self._served.sync(step)
            fresh, error = self._fresh([r for r, o in zip(rows, origins, strict=True) if o == Origin.STUDENT], step), None
        except SpeckdError as lost:
            fresh, error = [], lost
        self._pending = self._gather(fresh) if self._replay is not None else []
        self._window.generation += time.perf_counter() - began
        self._window.counts += counts([each.completion for each in fresh])
        if error is not None:
            return [{**batch} for batch in batches], error
        replacing = self._replacing(rows, origins, fresh, step)
        places = iter(range(len(rows)))
        return [self._batch([(row, replacing.get(next(places))) for row in some], step) for some in apart], None

    def _origins(self, rows: Sequence[Line], step: int, steps: int) -> list[Origin]:
        samples = torch.tensor([row.sample for row in rows], dtype=torch.int64)
        share = self._mixture.fraction_at(step, steps) if self.adaptive is None else self.adaptive.fraction
        fresh = None
        if self._replay is not None:
            # As in DistiLLM: ever less is written anew, but everything until the buffer is full.
            fresh = share * (1 - step / max(steps, 1)) if self._replay.full else share
        found = self._mixture.origins(samples, step, share, fresh).tolist()
        # Rows that only fill up an epoch's end stay as they are.
        return [Origin(o) if row.supervised else Origin.DATA for o, row in zip(found, rows, strict=True)]

    def _fresh(self, rows: Sequence[Line], step: int) -> list[Written]:
        if not rows:
            return []
        prompts = [row.prompt for row in rows]
        completions = self._writer.write(prompts, self._sampling, Draws(self._mixture.seed, step))
        of = step if self._served is None else self._served.weights_step
        assert of is not None
        found = [Written(p, c, of, r.teacher) for p, c, r in zip(prompts, completions, rows, strict=True)]
        self.last = found[0]
        return found

    def _replacing(
        self, rows: Sequence[Line], origins: Sequence[Origin], fresh: Sequence[Written], step: int
    ) -> dict[int, Written]:
        """By the rows' places."""
        written = [place for place, origin in enumerate(origins) if origin == Origin.STUDENT]
        found = dict(zip(written, fresh, strict=True))
        again = [place for place, origin in enumerate(origins) if origin == Origin.REPLAY]
        if again and self._replay is not None:
            samples = torch.tensor([rows[place].sample for place in again])
            found |= zip(again, self._replay.drawn(self._mixture.seed, step, samples), strict=True)
        return found

    def _batch(self, rows: Sequence[tuple[Line, Written | None]], step: int) -> dict[str, Any]:
        examples, marks = [], []
        for row, written in rows:
            if written is None or self._paired:
                examples.append(row.example())
                marks.append(False)
            if written is not None:
                sample = beside(row.sample) if self._paired else row.sample
                examples.append(rewritten(written, sample).example())
                marks.append(True)
                self._window.staleness += step - written.step
        self._window.rows += torch.tensor([sum(marks), len(marks)])
        return {**self._collate(examples), WRITTEN: torch.tensor(marks)}

    @property
    def step_counts(self) -> Tensor:
        """[6]: of this process, in the running step, for the sum over all of them."""
        return self._window.counts - self._window.before

    def judge(self, everyones: Tensor) -> None:
        """[6] counts of the running step, of all processes, before it is trained on.

        Raises:
            CollapseError: the text has collapsed; on all processes alike.
        """
        self._pending_counts = everyones
        self._watch.judge(everyones)

    def commit(self) -> None:
        """The step has been made: what was written in it is remembered, and not before, so that a checkpoint of the step
        before does not hold it."""
        if self._replay is not None:
            self._replay.add(self._pending)
        self._watch.remember(self._pending_counts)
        self._pending, self._pending_counts = [], torch.zeros(COUNTS, dtype=torch.float64)
        self._window.before = self._window.counts.clone()

    # ---- what is said, and kept --------------------------------------------------------------------------------------------

    def window_sums(self, seconds: float) -> Tensor:
        """[11] float64, of this process since the last call, to be added up over processes; `seconds`: of all steps in it."""
        window, self._window = self._window, _Window()
        return torch.cat([window.counts, window.rows.double(), torch.tensor([window.staleness, window.generation, seconds])])

    @staticmethod
    def metrics(sums: Tensor) -> dict[str, float]:
        """Of added-up `window_sums`. `on_policy/staleness`: optimizer steps between the weights that wrote and those that are
        trained, on average."""
        written, rows, staleness, generation, seconds = sums[COUNTS:].tolist()
        found = described(sums[:COUNTS])
        found |= {"on_policy/fraction": written / rows} if rows else {}
        found |= {"on_policy/staleness": staleness / written} if written else {}
        return found | ({"generation_share": generation / seconds} if seconds else {})

    def save(self, folder: Path) -> None:
        state = {
            "watch": self._watch.state(),
            "replay": None if self._replay is None else self._replay.state(),
            "adaptive": None if self.adaptive is None else self.adaptive.state(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _STATE).write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Goes on as when it was saved; from a checkpoint without it, from the beginning."""
        if not (folder / _STATE).is_file():
            return
        state = json.loads((folder / _STATE).read_text())
        self._watch.restore(state["watch"])
        if self._replay is not None and state["replay"] is not None:
            self._replay.restore(state["replay"])
        if self.adaptive is not None and state["adaptive"] is not None:
            self.adaptive.restore(state["adaptive"])


class _Window:
    """Sums since the last log."""

    def __init__(self) -> None:
        self.counts = torch.zeros(COUNTS, dtype=torch.float64)
        self.before = torch.zeros(COUNTS, dtype=torch.float64)  # the counts when the running step began
        self.rows = torch.zeros(2, dtype=torch.int64)  # written, all
        self.staleness = self.generation = 0.0


class StepClock(TrainerCallback):
    """Seconds of the optimizer steps alone, without evaluation and checkpoints; and tells when each has been made."""

    def __init__(self, made: Callable[[], None]) -> None:
        self._made, self._began, self._seconds = made, 0.0, 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seconds += time.perf_counter() - self._began
        self._made()

    def taken(self) -> float:
        """Since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
