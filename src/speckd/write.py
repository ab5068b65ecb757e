"""`speckd write`: text by the teacher, once, as a data set that `speckd train` takes as it is.

Trained on with cross-entropy this is sequence-level distillation (Kim & Rush 2016, "Sequence-Level Knowledge Distillation",
section 3.2) with samples in the place of the beam's best sequence.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from speckd import provenance
from speckd.checks import (
    load_tokenizers,
    loaded,
    require_student,
    require_teacher,
    several_teachers,
    stop_ids,
    teacher_tokenizer,
)
from speckd.data import load_prompts
from speckd.errors import ConfigError, DataError
from speckd.parts import Parts, manifest_of
from speckd.round_trip import Rendering, with_template
from speckd.run import say_things_once
from speckd.settings import Settings, load_settings
from speckd.sources.completions import repeats
from speckd.sources.model_writer import ModelWriter
from speckd.sources.server_writer import ServerWriter
from speckd.sources.writer import Completion, Draws, Prompt, Sampling, Writer
from speckd.teachers.client import Load
from speckd.teachers.exchange import Timeouts
from speckd.trainer import load_teacher

logger = logging.getLogger(__name__)

#: Completions in a part: what is lost when a run is killed, and what one process works on.
PART_COMPLETIONS = 256


@dataclass(frozen=True)
class Writing:
    """What is asked beside the run's settings. `samples`: completions of each prompt; `keep_truncated`: those, too, that were
    cut off at `max_completion_length`, behind which training will put an end that the teacher did not write."""

    output: Path
    samples: int = 1
    keep_truncated: bool = False


@dataclass(frozen=True)
class Job:
    """One completion to be written: of which row, with which token ids, the how manieth of it."""

    row: int
    prompt_ids: list[int]
    turn: int


def write(config: Path | None, recipe: str | None, flags: list[str], writing: Writing) -> Path:
    """Writes the data set, and beside it how it was made. Killed and started again, it goes on, to the same bytes.

    Raises:
        SpeckdError: for whatever the user can mend.
    """
    _require_sound(writing)
    with TemporaryDirectory(prefix="speckd-write-") as unused:  # the settings of a run name a folder
        settings = load_settings(config, recipe, [*flags, "--output_dir", unused])
        say_things_once(settings)
        _require_writing_teacher(settings)
        rows = load_prompts(settings.run)
        rendering, jobs = _jobs(settings, rows, writing)
        with closing(_Lazy(settings, rendering, max(len(job.prompt_ids) for job in jobs))) as writer:
            _fill(settings, writing, rendering, rows, jobs, writer)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return writing.output


def _require_sound(writing: Writing) -> None:
    if writing.samples < 1:
        raise ConfigError(f"samples_per_prompt is {writing.samples}", "Give at least 1")
    if writing.output.suffix != ".jsonl":
        raise ConfigError(f"output: {writing.output} does not end in .jsonl", "JSON lines are written: name it so")
    if not writing.output.parent.is_dir():
        raise ConfigError(f"output: there is no folder {writing.output.parent}", "Make it, or choose another")
    if writing.output.is_dir():
        raise ConfigError(f"output: {writing.output} is a folder", "Choose a file")


def _require_writing_teacher(settings: Settings) -> None:
    args = settings.training
    if args.teacher not in ("model", "server") or several_teachers(settings):
        where = "teachers" if several_teachers(settings) else f"teacher: {args.teacher}"
        raise ConfigError(f"{where} cannot write text", "Use one teacher: --teacher model with a path, or --teacher server")
    if args.teacher == "server" and args.teacher_server_api != "vllm":
        raise ConfigError("teacher_server_api: only vLLM's servers are asked for text", "Use vllm, or --teacher model")
    if args.teacher == "model" and args.teacher_model_name_or_path is None:
        raise ConfigError("teacher_model_name_or_path is not set: nobody writes", "Give a path or hub id")
    require_student(settings)
    require_teacher(settings)


def _jobs(settings: Settings, rows: Any, writing: Writing) -> tuple[Rendering, list[Job]]:
    conversational = isinstance(rows[0]["prompt"], list)
    own, theirs = load_tokenizers(settings, conversational)
    path = settings.training.chat_template_path
    own = with_template(own, path, lambda name: teacher_tokenizer(settings, name))
    if conversational and theirs is not None and theirs.chat_template not in (None, own.chat_template):
        logger.warning("The teacher has another chat template than the student, and is asked by the student's.")
    teacher = settings.teacher_model
    stops = {own.eos_token_id} | (
        set() if teacher is None else stop_ids(theirs, teacher, settings.training.teacher_model_revision or "main")
    )
    rendering = Rendering(own, frozenset(stops)).with_template_end(_present(rows[0]))
    jobs = []
    for number in range(len(rows)):
        ids = rendering.prompt_ids(_present(rows[number]))
        if not ids:
            raise DataError(f"{settings.run.dataset_name}: row {number + 1}: the prompt has no token", "Give at least one word")
        jobs += [Job(number, ids, turn) for turn in range(writing.samples)]
    return rendering, jobs


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arrow gives every row every column."""
    return {name: value for name, value in row.items() if value is not None}


def _fill(settings: Settings, writing: Writing, rendering: Rendering, rows: Any, jobs: list[Job], writer: "_Lazy") -> None:
    args, state = settings.training, PartialState()
    prompts = (job.prompt_ids for job in jobs if job.turn == 0)
    made_from = provenance.of_writing(settings, rendering.tokenizer, prompts, writing.samples)
    made_from |= {"keep_truncated": writing.keep_truncated, "stops": sorted(rendering.stops), **writer.known()}
    cut = [jobs[start : start + PART_COMPLETIONS] for start in range(0, len(jobs), PART_COMPLETIONS)]
    parts = Parts.open(writing.output, made_from, provenance.libraries(), len(cut))
    if parts.finished:
        logger.info("%s is there already, written just so.", writing.output)
        return
    share = range(args.process_index, len(cut), args.world_size)
    own = parts.missing(share)
    state.wait_for_everyone()  # nobody writes before everybody has looked
    if len(own) < len(share):
        logger.info("%d of %d parts are there already.", len(share) - len(own), len(share))
    batch = max(1, args.per_device_train_batch_size)
    silent = args.disable_tqdm or args.process_index > 0
    with tqdm(total=sum(len(cut[number]) for number in own), unit=" texts", desc="Writing", disable=silent) as bar:
        for number in own:
            parts.write(number, _part(rendering, rows, cut[number], writer, batch, args, bar))
    state.wait_for_everyone()
    if args.process_index == 0:
        _publish(parts, writing)
    state.wait_for_everyone()


def _part(
    rendering: Rendering, rows: Any, jobs: Sequence[Job], writer: "_Lazy", batch: int, args: Any, bar: Any
) -> list[dict[str, Any]]:
    """The records of some jobs, in their order; asked in batches of about equal length, cut the same way at any resume."""
    found: dict[int, dict[str, Any]] = {}
    for turn, places in _batches(jobs, writer.at_once(batch)):
        prompts = [Prompt(torch.tensor(jobs[place].prompt_ids), jobs[place].row) for place in places]
        written = writer.write(prompts, args.sampling, Draws(args.seed, turn))
        for place, one in zip(places, written, strict=True):
            found[place] = _record(rendering, _present(rows[jobs[place].row]), jobs[place], one)
        bar.update(len(places))
    return [found[place] for place in range(len(jobs))]


def _batches(jobs: Sequence[Job], size: int) -> Iterator[tuple[int, list[int]]]:
    for turn in sorted({job.turn for job in jobs}):
        own = [place for place, job in enumerate(jobs) if job.turn == turn]
        own.sort(key=lambda place: (-len(jobs[place].prompt_ids), place))
        for start in range(0, len(own), size):
            yield turn, own[start : start + size]


def _record(rendering: Rendering, asked: dict[str, Any], job: Job, written: Completion) -> dict[str, Any]:
    row, ids = rendering.row(asked, job.prompt_ids, written), written.token_ids.tolist()
    said = ids[:-1] if written.finished else ids
    return {
        "row": row,
        "prompt": job.row,
        "tokens": len(ids),
        "truncated": not written.finished,
        "empty": not said,
        "repeating": repeats(written.token_ids),
        "changed": not rendering.survives(row, job.prompt_ids, written),
    }


# ---- what is kept and said -------------------------------------------------------------------------------------------------


def _publish(parts: Parts, writing: Writing) -> None:
    counts: Counter[str] = Counter()
    kept: list[dict[str, Any]] = []
    seen: set[tuple[int, str]] = set()
    for record in parts.records():
        counts.update({"completions": 1, "tokens": record["tokens"]})
        counts.update({name: int(record[name]) for name in ("truncated", "empty", "repeating", "changed")})
        once = (record["prompt"], str(record["row"]["completion"]))
        counts["repeated"] += once in seen
        seen.add(once)
        if writing.keep_truncated or not record["truncated"]:
            kept.append(record["row"])
    counts["rows"] = len(kept)
    if not kept:
        parts.discard()  # by other settings they would be refused
        raise DataError(
            f"all {counts['completions']} completions were cut off at max_completion_length, and none is kept",
            "Raise max_completion_length, or give --keep_truncated",
        )
    _say(counts, writing)
    parts.publish(kept, dict(sorted(counts.items())))
    logger.info("%s: %s rows; how they were made is in %s.", writing.output, f"{len(kept):,}", manifest_of(writing.output).name)


def _say(counts: Mapping[str, int], writing: Writing) -> None:
    logger.info("Written: %s completions, %s tokens.", f"{counts['completions']:,}", f"{counts['tokens']:,}")
    fate = "kept: training puts an end behind them that the teacher did not write" if writing.keep_truncated else "left out"
    said = {
        "truncated": f"cut off at max_completion_length ({fate})",
        "empty": "empty: the teacher ended at once",
        "repeating": "say the same over and over",
        "repeated": "the same as another of their prompt",
        "changed": "read back as other tokens than the teacher wrote",
    }
    for name, what in said.items():
        if counts[name]:
            logger.warning("%d of %d completions: %s.", counts[name], counts["completions"], what)


# ---- who writes ------------------------------------------------------------------------------------------------------------


@dataclass
class _Lazy:
    """The settings' teacher as a writer, loaded when there is something to write. `longest`: tokens of the longest prompt."""

    settings: Settings
    rendering: Rendering
    longest: int
    _open: Writer | None = None

    def known(self) -> dict[str, Any]:
        """What the writer alone knows of its provenance."""
        if self.settings.training.teacher != "server":
            return {}
        writer = self._opened()
        assert isinstance(writer, ServerWriter)
        return {"teacher": writer.model}

    def at_once(self, batch: int) -> int:
        """Completions asked in one call: servers make their own batches."""
        return PART_COMPLETIONS if self.settings.training.teacher == "server" else batch

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, draws: Draws) -> list[Completion]:
        return self._opened().write(prompts, sampling, draws)

    def close(self) -> None:
        if isinstance(self._open, ServerWriter):
            self._open.close()

    def _opened(self) -> Writer:
        if self._open is None:
            served = self.settings.training.teacher == "server"
            self._open = self._server() if served else self._model()
        return self._open

    def _server(self) -> ServerWriter:
        args = self.settings.training
        wait = args.teacher_server_timeout_s
        writer = ServerWriter(
            args.teacher_server_urls or (),
            stops=self.rendering.stops,
            vocabulary=len(self.rendering.tokenizer),
            model=args.teacher_server_model,
            timeouts=Timeouts(
                read_s=wait,
                request_s=wait,
                ready_s=min(Timeouts.ready_s, args.teacher_server_patience_s),
                patience_s=args.teacher_server_patience_s,
            ),
            load=Load(concurrency=args.teacher_server_concurrency),
        )
        writer.probe(self.longest + args.max_completion_length)
        return writer

    def _model(self) -> ModelWriter:
        args, name = self.settings.training, str(self.settings.teacher_model)
        model = (
            loaded("teacher_model_name_or_path", name, lambda: load_teacher(name, args, "auto")).eval().requires_grad_(False)
        )
        if not getattr(model, "hf_device_map", None) and not getattr(model, "is_quantized", False):
            model.to(args.teacher_device or args.device)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and self.longest + args.max_completion_length > positions:
            raise ConfigError(
                f"max_completion_length: the longest prompt has {self.longest} tokens, the teacher was made for {positions}",
                f"Set max_completion_length to at most {positions - self.longest}, or shorten the prompts",
            )
        width = model.get_output_embeddings().weight.shape[0]
        unknown = torch.arange(len(self.rendering.tokenizer), width)  # ids that no tokenizer knows
        return ModelWriter(model, sorted(self.rendering.stops), unknown)
