"""`speckd train`: everything that can be wrong is looked for before a model is loaded; then load, measure, train, save."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, get_peft_config

from speckd.by_task import measure_by_task, tasks_of
from speckd.checks import (
    OWN_FILES,
    asked_teacher,
    check_models_exist,
    check_shapes,
    checkpoint_to_resume,
    load_tokenizers,
    loaded,
    output_folder,
    own_files,
    reason_of,
    several_teachers,
)
from speckd.data import is_conversational, load_data
from speckd.errors import CollapseError, ConfigError, TeacherLostError
from speckd.memory_report import foresee_memory
from speckd.model_card import CardFacts, model_card, versions
from speckd.recipe_book import DEFAULT_RECIPE
from speckd.settings import METHOD_KEYS, Settings, load_settings, student_options
from speckd.step_lines import BY_TASK, TOKENS
from speckd.teacher_sources import remember_servers, require_ready, source_elsewhere, source_named
from speckd.teachers.sharding import size as parameter_size
from speckd.token_record import TokenRecord
from speckd.trainer import SpecKDTrainer, load_teacher
from speckd.training_log import TrainingLog, read_log
from speckd.trl_internals import finish_from_checkpoint, save_checkpoint
from speckd.types import shown

logger = logging.getLogger(__name__)


#: The share of probability on ids that no tokenizer knows from which on it is worth a warning.
MASS_TO_MENTION = 1e-3


def train(config: Path | None, recipe: str | None, flags: list[str]) -> Path:
    """Runs one distillation; returns the student's folder.

    Raises:
        SpeckdError: for whatever the user can mend; no output folder has been made then, unless training had begun.
    """
    settings = load_settings(config, recipe, flags)
    say_things_once(settings)
    output = output_folder(settings)
    checkpoint = checkpoint_to_resume(settings, output)
    with closing(prepared_trainer(settings, output)) as trainer:
        if trainer.is_world_process_zero():
            output.mkdir(parents=True, exist_ok=True)
            if checkpoint is None:
                _forget_earlier_run(output)
            if config is None or config.resolve() != (output / "config.yaml").resolve():
                (output / "config.yaml").write_text(yaml.safe_dump(settings.given, sort_keys=True, allow_unicode=True))
            _remember_files(settings, output)
            remember_servers(trainer, output)
        _trained(settings, trainer, output, checkpoint)
    return output


def _trained(settings: Settings, trainer: SpecKDTrainer, output: Path, checkpoint: str | None) -> None:
    """Measures, trains, measures and saves."""
    tokens = TokenRecord(trainer, output, settings.run.token_view_samples)
    try:
        start = _start(trainer, output, resumed=checkpoint is not None)
        if checkpoint is None:
            measure_by_task(trainer, output)
            tokens.keep()
        # A run killed after its last step has nothing left to train.
        if checkpoint is None or not finish_from_checkpoint(trainer, checkpoint):
            trainer.train(resume_from_checkpoint=checkpoint)
        _warn_of_padding(trainer)
        end = _measured(trainer)
        measure_by_task(trainer, output)
        tokens.keep()
    except TeacherLostError as error:
        raise _saved(trainer, error) from error
    except CollapseError as error:
        folder = save_checkpoint(trainer)
        where = f"; step {trainer.state.global_step}, the last before the stop, is saved in {folder}" if folder else ""
        raise CollapseError(f"{error.what}{where}", error.fix) from error
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        _publish(settings, trainer, output, start, end)
    leave_together(trainer)


def _saved(trainer: SpecKDTrainer, error: TeacherLostError) -> TeacherLostError:
    """The same error, after a checkpoint, with how to go on."""
    folder = save_checkpoint(trainer)
    if folder is None:
        return error
    return TeacherLostError(
        f"{error.what}; step {trainer.state.global_step} is saved in {folder}",
        f"{error.fix}; then --resume_from_checkpoint true goes on from there",
    )


def prepared_trainer(settings: Settings, output: Path) -> SpecKDTrainer:
    """Models and data, checked before anything heavy is loaded, then loaded; ready to train.

    Raises:
        SpeckdError: for whatever the user can mend; no output folder has been made then.
    """
    check_models_exist(settings)
    train_data, held_out = load_data(settings.run, settings.training.dataset_text_field, settings.kept_columns)
    check_shapes(settings, train_data, held_out)
    tasks = tasks_of(train_data if held_out is None else held_out, settings.run.task_column)
    tokenizers = load_tokenizers(settings, is_conversational(train_data))
    _announce(settings, len(train_data), 0 if held_out is None else len(held_out))
    adapter = adapter_of(settings.model)
    foresee_memory(settings, adapter, (train_data, held_out), tokenizers)
    trainer = new_trainer(settings, output, train_data, held_out, tokenizers, adapter)
    trainer.tasks = tasks
    _describe(trainer)
    return trainer


def leave_together(trainer: SpecKDTrainer) -> None:
    """No process dies of a connection that another has closed."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def say_things_once(settings: Settings) -> None:
    """Of several processes only the first speaks; `disable_tqdm` also silences the bars of loading and preparing."""
    first = settings.training.local_process_index == 0
    if not first:
        logging.getLogger("speckd").setLevel(logging.ERROR)
    if settings.training.disable_tqdm or not first:
        disable_progress_bars()
        transformers_logging.disable_progress_bar()


def nothing_kept(folder: str) -> list[str]:
    """Flags for a trainer that is to leave nothing behind; they come last and so count: no checkpoint, evaluation, report."""
    values = {
        "output_dir": folder,
        "report_to": "none",
        **dict.fromkeys(("save_strategy", "eval_strategy", "logging_strategy"), "no"),
        **dict.fromkeys(("eval_on_start", "load_best_model_at_end", "push_to_hub"), "false"),
    }
    return [word for key, value in values.items() for word in (f"--{key}", value)]


def new_trainer(
    settings: Settings,
    output: Path,
    train_data: Dataset,
    held_out: Dataset | None,
    tokenizers: tuple[Any, Any],
    adapter: Any,
) -> SpecKDTrainer:
    """Loads both models and prepares the data; refused, it leaves no folder behind."""
    student_name, teacher_name = settings.model.model_name_or_path, asked_teacher(settings, held_out)
    if teacher_name != settings.teacher_model:
        logger.info("Teacher: not loaded, for the loss asks for none and nothing is held out to measure it on.")
    student = loaded("model_name_or_path", str(student_name), lambda: _student(settings))
    teacher: Any = None
    if settings.training.teachers is not None:
        teacher = {
            name: loaded(f"teachers: {name}", path, partial(load_teacher, path, settings.training, student.dtype))
            for name, path in several_teachers(settings).items()
        }
    if teacher_name is not None:
        teacher = loaded(
            "teacher_model_name_or_path",
            teacher_name,
            lambda: load_teacher(teacher_name, settings.training, student.dtype),
        )
    source = source_elsewhere(settings, tokenizers[0], student.get_output_embeddings().weight.shape[0])
    with _nothing_left_behind(output), ExitStack() as refused:
        if source is not None:
            refused.callback(source.close)
        try:
            trainer = SpecKDTrainer(
                model=student,
                teacher_model=teacher,
                args=settings.training,
                train_dataset=train_data,
                eval_dataset=held_out,
                processing_class=tokenizers[0],
                teacher_processing_class=tokenizers[1],
                peft_config=adapter,
                callbacks=[TrainingLog(output / "training_log.jsonl")],
                teacher_source=source,
            )
            refused.callback(trainer.close)
            require_ready(trainer, output)
            refused.pop_all()
            return trainer
        except (ValueError, ImportError, OSError) as error:  # how TRL, PEFT and Transformers refuse a setting
            raise ConfigError(reason_of(error), "Correct the setting named there") from error


def adapter_of(model: ModelConfig) -> Any:
    """PEFT's settings, or None."""
    config = get_peft_config(model)
    if config is None:
        return None
    if config.use_dora:
        raise ConfigError("use_dora: AutoModelForCausalLM does not load DoRA's magnitudes", "Use plain LoRA")
    if isinstance(config.target_modules, str) and config.target_modules.isidentifier():
        config.target_modules = {config.target_modules}  # TRL unpacks a list of one name, which PEFT would read as a pattern
    return config


@contextmanager
def _nothing_left_behind(output: Path) -> Iterator[None]:
    """Removes the output folder that the Trainer makes early, if it was not there before and what follows is refused."""
    was_there = output.exists()
    try:
        yield
    except BaseException:
        if not was_there and output.is_dir() and not any(output.iterdir()):
            output.rmdir()
        raise


def _remember_files(settings: Settings, output: Path) -> None:
    """What the user's own parts say as the run begins, or goes on with them changed knowingly."""
    files = own_files(settings)
    if files:
        (output / OWN_FILES).write_text(json.dumps(files, indent=2) + "\n")


def _forget_earlier_run(output: Path) -> None:
    """What a run that starts anew in an old folder must not leave there: a resume would go on from it, a load pick it up."""
    for pattern in (
        "training_log.jsonl",
        TOKENS,
        BY_TASK,
        OWN_FILES,
        "results.json",
        "README.md",
        "adapter_*",
        "model*.safetensors*",
        "pytorch_model*",
    ):
        for path in output.glob(pattern):
            path.unlink()
    for path in output.glob("checkpoint-*"):
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit():
            shutil.rmtree(path)


# ---- what is said and saved ------------------------------------------------------------------------------------------------


def describe_method(settings: Settings) -> str:
    """The composition in one line, parameters included."""
    objective = settings.training.objective()
    if not objective.needs_teacher:
        return "SFT: cross-entropy on the data, no distillation"
    gate, rejected, divergence = (shown(piece) for piece in (objective.gate, objective.rejected, objective.divergence))
    moving = "".join(f"; {each.name} moves {each.mover.notation}" for each in settings.training.moving_objective().moved)
    mixed = f" + {objective.label_loss_weight:g} cross-entropy" if objective.label_loss_weight else ""
    hot = f" at T = {objective.divergence_temperature:g}" if objective.divergence_temperature != 1 else ""
    text = f"; {settings.training.described_source}" if settings.training.writes else ""
    own = settings.training.student_text_objective(objective) if settings.training.writes else objective
    if own.divergence != objective.divergence or own.rejected != objective.rejected:
        text += f", there rejected tokens {shown(own.rejected)} → {shown(own.divergence)}"
    return (
        f"gate {gate} → rejected tokens {rejected} → {divergence}{hot}{mixed}, divided by {objective.normalizer}{moving}{text}"
    )


def all_settings(settings: Settings) -> dict[str, Any]:
    """Every setting of a run with its resolved value, secrets masked by Transformers, empty ones left out."""
    everything = {**settings.training.to_dict(), **asdict(settings.model), **asdict(settings.run)}
    return {key: value for key, value in sorted(everything.items()) if value not in (None, [], {})}


def _announce(settings: Settings, rows: int, held_out: int) -> None:
    changed = ", changed" if settings.recipe and METHOD_KEYS & settings.given_by_user else ""
    named = f"recipe {settings.recipe}{changed}" if settings.recipe else "your own composition"
    default = settings.recipe == DEFAULT_RECIPE and "recipe" not in settings.given
    hint = " (the default where nothing is said; 'speckd recipes' lists the others)" if default else ""
    logger.info("Method: %s%s: %s.", named, hint, describe_method(settings))
    logger.info("Data: %s rows to train on, %s held out.", f"{rows:,}", f"{held_out:,}" if held_out else "none")


def _describe(trainer: SpecKDTrainer) -> None:
    for line in described(trainer):
        logger.info("%s", line)


def described(trainer: SpecKDTrainer) -> Iterator[str]:
    """Models and teachers as they are loaded, a line each."""
    several = [(model, f"Teacher {name}") for name, model in trainer.teachers.items()]
    for model, name in ((trainer.model, "Student"), (trainer.teacher, "Teacher"), *several):
        if model is not None:
            size = sum(parameter_size(p) for p in model.parameters())
            learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
            trained = f", {learning:,} of them trained" if 0 < learning < size else ""
            kind = f"{model.dtype}, quantised" if getattr(model, "is_quantized", False) else model.dtype
            yield f"{name}: {size:,} parameters{trained}, {kind}, on {model.device}."
    for shards in trainer.shards:
        yield f"Teacher: {shards} ({trainer.args.teacher_sharding})."
    mixture = trainer.args.teacher_mixture
    if mixture:
        total = sum(mixture.values())
        shares = ", ".join(f"{weight / total:.3g} {name}" for name, weight in mixture.items())
        yield f"Teachers are mixed: each token's probabilities are the sum of {shares}."
    if trainer.args.teacher == "base":
        yield "Teacher: the student's own base, its adapter switched off; no second copy of the weights."


def _teacher_name(settings: Settings) -> str | None:
    if settings.training.teacher == "base":
        return settings.model.model_name_or_path
    return ", ".join(several_teachers(settings).values()) or settings.training.teacher_model_name_or_path


def _student(settings: Settings) -> Any:
    name = settings.model.model_name_or_path
    assert name is not None
    # An adapter remembers its base model by this name: absolute, it is found from any folder.
    name = os.path.abspath(name) if os.path.isdir(name) else name
    return AutoModelForCausalLM.from_pretrained(name, **student_options(settings))


def _start(trainer: SpecKDTrainer, output: Path, resumed: bool) -> dict[str, float]:
    """Held-out measures before the first step; of a resumed run, those in its log."""
    if not resumed or trainer.eval_dataset is None:
        return _measured(trainer)
    for entry in read_log(output / "training_log.jsonl"):
        if entry["step"] == 0 and "eval_nll" in entry:
            return {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
    return {}


def _measured(trainer: SpecKDTrainer) -> dict[str, float]:
    if trainer.eval_dataset is None:
        return {}
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


def _warn_of_padding(trainer: SpecKDTrainer) -> None:
    """What lies outside the shared vocabulary is not trained: a fresh student may still believe in its head's padding."""
    if trainer.source is None:
        return
    width = trainer.student.get_output_embeddings().weight.shape[0]
    outside = trainer.mass(trainer.student, trainer.vocabulary.outside(width))
    if outside > MASS_TO_MENTION:
        logger.warning(
            "The student gives %.1f %% of its probability to ids that the teacher lacks, such as padding of its head, and may "
            "generate them: give it a head of the tokenizer's size, or generate with suppress_tokens.",
            100 * outside,
        )


def _publish(settings: Settings, trainer: SpecKDTrainer, output: Path, start: dict[str, float], end: dict[str, float]) -> None:
    """Tokenizer, card, and last of all the results: who finds results.json finds a finished run."""
    trainer.processing_class.save_pretrained(output)
    dropped = trainer.dropped_rows["train"]
    data = {"train": settings.run.dataset_name, "rows": dropped.total, "rows dropped for length": len(dropped.rows)}
    if (held_out := trainer.dropped_rows.get("eval")) is not None:
        name = settings.run.eval_dataset or f"{settings.run.dataset_name} (held-out split)"
        data |= {"held out": name, "held-out rows": held_out.total, "held-out rows dropped": len(held_out.rows)}
    teacher, answers = source_named(trainer.source) or (_teacher_name(settings), None)
    facts = CardFacts(
        student=str(settings.model.model_name_or_path),
        teacher=teacher,
        answers=answers,
        method=describe_method(settings),
        given=settings.given,
        everything=all_settings(settings),
        start=start,
        end=end,
        data=data,
        seed=settings.training.seed,
        steps=trainer.state.global_step,
        adapter=settings.model.use_peft,
        distilled=settings.training.objective().needs_teacher,
        folder=str(output),
        warnings=trainer.warnings,
    )
    (output / "README.md").write_text(model_card(facts))
    results = {
        "start": start,
        "end": end,
        "steps": trainer.state.global_step,
        "processes": trainer.accelerator.num_processes,
        "data": data,
        "settings": settings.given,
        "warnings": trainer.warnings,
        "versions": versions(),
    }
    unfinished = output / "results.json.tmp"
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    unfinished.rename(output / "results.json")
    what = f"The adapter of {settings.model.model_name_or_path}" if settings.model.use_peft else "The student"
    logger.info("%s is in %s: AutoModelForCausalLM.from_pretrained(%r) loads it.", what, output, str(output))
    for name in ("nll", "kl", "agreement", "tar"):
        if name in end:
            logger.info("Held out, %s: %.4f before, %.4f after.", name, start.get(name, float("nan")), end[name])
