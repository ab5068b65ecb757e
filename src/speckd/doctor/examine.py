"""All examinations, in their order: what needs something that failed is left out, and nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

from speckd.doctor import after, before, data_tokens, ends, room
from speckd.doctor.findings import About, Attempts, Examination, Found, note
from speckd.memory_report import Foreseen
from speckd.run import adapter_of, leave_together, new_trainer, nothing_kept, say_things_once
from speckd.settings import Settings, load_settings
from speckd.trainer import SpecKDTrainer

#: The same run as plain fine-tuning: the data can be looked at where the teacher is what fails.
_WITHOUT_TEACHER = (
    ("teacher", "model"),
    ("label_loss_weight", "1"),
    *((key, "null") for key in ("teacher_model_name_or_path", "teachers", "teacher_route_column", "teacher_mixture")),
)
#: Seconds that servers may be down meanwhile.
_PATIENCE_S = 20
_WITHOUT_MASK = (("assistant_only_loss", "false"),)


def examined(config: Path | None, recipe: str | None, flags: list[str], thorough: bool) -> Iterator[Found]:
    """What is found in a run's configuration, as it is found.

    Args:
        config, recipe, flags: as for `speckd train`.
        thorough: read every byte of a cache, however large.
    """
    attempts = Attempts()
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with TemporaryDirectory(prefix="speckd-doctor-") as folder:  # a Trainer makes its output folder
            yield from _examined(attempts, config, recipe, flags, thorough, folder)
    finally:
        transformers_logging.set_verbosity(verbosity)


@dataclass(frozen=True)
class _Seen:
    """What was found before a model was loaded; None where it could not be had.

    `own`: the student's tokenizer, with an end token; `whole`: the run's own trainer can be made; `masked`: the data says what
    is supervised, None where it cannot be rendered.
    """

    settings: Settings
    own: Any
    given: before.Data | None
    foreseen: Foreseen | None
    whole: bool
    masked: bool | None


def _before(
    attempts: Attempts, config: Path | None, recipe: str | None, flags: list[str], thorough: bool
) -> Examination[_Seen | None]:
    settings = yield from attempts.of(About.SETTINGS, before.settings_of(config, recipe, flags))
    if settings is None:
        return None
    yield from attempts.of(About.SETTINGS, before.output(settings))
    own = yield from attempts.of(About.MODELS, before.student(settings))
    sound = [(yield from attempts.of(About.MODELS, before.teacher(settings)))]
    taught_by = None
    if sound[0]:
        taught_by = yield from attempts.of(About.MODELS, before.teachers(settings))
        sound.append(taught_by is not None)
    for teacher in (taught_by or ()) if own is not None else ():
        sound.append((yield from attempts.of(About.MODELS, before.vocabulary(settings, own, teacher))))
    given = yield from attempts.of(About.DATA, before.data(settings))
    if own is None:
        return _Seen(settings, None, given, None, whole=False, masked=None)
    stops = yield from attempts.of(About.ENDS, ends.end_tokens(settings, own, taught_by or ()))
    masked = None
    if given is not None:
        masked = yield from attempts.of(About.ENDS, ends.template(settings, own, taught_by or (), given[0]))
    yield from attempts.of(About.ELSEWHERE, before.cache_to_be(settings, own))
    if settings.teacher_elsewhere:
        sound.append((yield from attempts.of(About.ELSEWHERE, before.elsewhere(settings, own, thorough))))
    foreseen = yield from attempts.of(About.MEMORY, room.memory(settings, given, own)) if given is not None else _nothing()
    return _Seen(settings, own if stops else None, given, foreseen, all(sound) and bool(masked), masked)


def _nothing() -> Examination[None]:
    yield from ()


def _why_not_loaded(seen: _Seen) -> str | None:
    if seen.own is None:
        return "the student's tokenizer comes first"
    if seen.masked is None:
        return "the chat template comes first"
    if seen.foreseen is not None and not room.can_be_loaded(seen.foreseen):
        return "there is no room for the models"
    return None


def _examined(
    attempts: Attempts, config: Path | None, recipe: str | None, flags: list[str], thorough: bool, folder: str
) -> Iterator[Found]:
    seen = yield from _before(attempts, config, recipe, flags, thorough)
    if seen is None or seen.given is None:
        return
    if seen.foreseen is not None:
        yield from attempts.of(
            About.DISK, room.disk(seen.settings, room.saved_bytes_foreseen(seen.foreseen), len(seen.given[0]))
        )
    fits, reason = (yield from attempts.of(About.DATA, before.shapes(seen.settings, seen.given))), _why_not_loaded(seen)
    if reason is not None or not fits:
        yield from attempts.of(About.DATA, before.rows(seen.given))
        yield note(About.DATA, f"its tokens, a sample and the start are not examined: {reason or 'see what failed above'}")
        return
    trainer = None
    if seen.whole:
        trainer = yield from attempts.of(About.LOADED, _built(config, recipe, flags, folder, seen.given))
    teaches = trainer is not None
    if trainer is None:
        changes = _WITHOUT_TEACHER if seen.masked else (*_WITHOUT_TEACHER, *_WITHOUT_MASK)
        trainer = yield from attempts.of(About.LOADED, _built(config, recipe, flags, folder, seen.given, changes))
    if trainer is None:
        yield from attempts.of(About.DATA, before.rows(seen.given))
    else:
        yield from _with_models(attempts, seen, seen.given, trainer, teaches)


def _built(
    config: Path | None,
    recipe: str | None,
    flags: list[str],
    folder: str,
    given: before.Data,
    changes: tuple[tuple[str, str], ...] = (),
) -> Examination[SpecKDTrainer]:
    """The run's trainer, but for what it would keep and ask ahead."""
    quiet = [*nothing_kept(folder), "--teacher_prefetch", "0", "--disable_tqdm", "true"]
    quiet += ["--teacher_server_patience_s", str(_PATIENCE_S)]
    changed = [word for key, value in changes for word in (f"--{key}", value)]
    settings = load_settings(config, recipe, [*flags, *quiet, *changed])
    say_things_once(settings)
    trainer = new_trainer(settings, Path(folder), *given, _tokenizers(settings), adapter_of(settings.model))
    yield from ()
    return trainer


def _tokenizers(settings: Settings) -> tuple[Any, Any]:
    name = settings.teacher_model
    return before.student_tokenizer(settings), None if name is None else before.teacher_tokenizer(settings, name)


def _with_models(attempts: Attempts, seen: _Seen, given: before.Data, trainer: SpecKDTrainer, teaches: bool) -> Iterator[Found]:
    settings = seen.settings
    try:
        yield from attempts.of(About.LOADED, after.models(trainer))
        yield from attempts.of(About.LOADED, after.best_checkpoint(trainer, settings))
        yield from attempts.of(About.DATA, before.rows(given))
        if seen.masked:
            yield from attempts.of(About.DATA, data_tokens.tokens(trainer, settings))
            yield from attempts.of(About.SAMPLE, after.first_sample(trainer))
        yield from attempts.of(About.START, after.likelihood(trainer))
        yield from attempts.of(About.START, after.ends_expected(trainer, settings))
        seconds = yield from attempts.of(About.START, after.first_step(trainer))
        if not teaches:
            yield note(About.START, "what gate and teacher do was not examined: see what failed above")
        elif seconds is not None:
            yield from attempts.of(About.PARITY, after.parity(trainer, settings))
            yield from attempts.of(About.TIME, after.duration(trainer, seconds))
        if seen.foreseen is None:
            yield from attempts.of(About.DISK, room.disk(settings, room.saved_bytes(trainer), len(given[0])))
        yield from attempts.of(About.DISK, room.room_for_cache(trainer, settings))
    finally:
        trainer.close()
        leave_together(trainer)
