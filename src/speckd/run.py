"""`speckd train`: everything that can be wrong is looked for before a model is loaded; then load, measure, train, save."""

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, disable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, get_peft_config, get_quantization_config

from speckd.compatibility import require_same_tokens
from speckd.config import nearest
from speckd.data import is_conversational, load_data
from speckd.errors import ConfigError, DataError
from speckd.gates import Inverted, LabelInTopK, MatchedRandom, TopK, TwoSided
from speckd.model_card import CardFacts, model_card, versions
from speckd.settings import DEFAULT_RECIPE, METHOD_KEYS, Settings, load_settings
from speckd.trainer import SpecKDTrainer, load_teacher
from speckd.training_log import TrainingLog

logger = logging.getLogger(__name__)

_REPORTERS = {"wandb", "trackio", "tensorboard", "mlflow", "comet_ml", "clearml", "swanlab", "neptune"}

#: What a run leaves that failed before its first checkpoint: nothing to keep, so its folder may be used again.
_LEFT_BY_A_FAILED_RUN = {"config.yaml", "training_log.jsonl"}

#: The share of probability on ids that no tokenizer knows from which on it is worth a warning.
MASS_TO_MENTION = 1e-3

#: Settings that may differ when a run is resumed: they change what is said and kept, not what is learnt.
_FREE_ON_RESUME = {
    *(
        "resume_from_checkpoint",
        "allow_changed_config",
        "overwrite_output_dir",
        "output_dir",
        "report_to",
        "run_name",
        "recipe",
    ),
    *("disable_tqdm", "logging_steps", "save_steps", "save_strategy", "save_total_limit", "eval_steps", "eval_strategy"),
    *("loss_chunk_size", "per_device_eval_batch_size"),
}


def train(config: Path | None, recipe: str | None, flags: list[str]) -> Path:
    """Runs one distillation; returns the student's folder.

    Raises:
        SpeckdError: for whatever the user can mend; no output folder has been made then, unless training had begun.
    """
    settings = load_settings(config, recipe, flags)
    _say_things_once(settings)
    output = _output_folder(settings)
    _check_models_exist(settings)
    train_data, held_out = load_data(settings.run, settings.training.dataset_text_field)
    if held_out is None and settings.training.eval_strategy != "no":
        raise ConfigError(
            f"eval_strategy is {settings.training.eval_strategy.value}, but nothing is held out",
            "Give eval_dataset, or set eval_strategy: no",
        )
    _check_shapes(settings, train_data, held_out)
    tokenizers = _tokenizers(settings, is_conversational(train_data))
    checkpoint = _checkpoint(settings, output)
    _announce(settings, len(train_data), 0 if held_out is None else len(held_out))
    trainer = _trainer(settings, output, train_data, held_out, tokenizers)
    _describe(trainer)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            _forget_earlier_run(output)
        (output / "config.yaml").write_text(yaml.safe_dump(settings.given, sort_keys=True, allow_unicode=True))
    start = _start(trainer, output, resumed=checkpoint is not None)
    trainer.train(resume_from_checkpoint=checkpoint)
    _warn_of_padding(trainer)
    end = _measured(trainer)
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        _publish(settings, trainer, output, start, end)
    trainer.accelerator.wait_for_everyone()  # all leave together: none dies of a connection that another has closed
    trainer.accelerator.end_training()
    return output


def _check_shapes(settings: Settings, train_data: Dataset, held_out: Dataset | None) -> None:
    if settings.training.completion_only_loss and "completion" not in train_data.column_names:
        raise DataError(
            f"completion_only_loss: {settings.run.dataset_name} has no prompt and completion", "Remove it, or name the columns"
        )
    if held_out is not None and set(held_out.column_names) != set(train_data.column_names):
        logger.warning(
            "The held-out data has columns %s, the training data %s: what counts as supervised follows the training data.",
            ", ".join(held_out.column_names),
            ", ".join(train_data.column_names),
        )


def _say_things_once(settings: Settings) -> None:
    """Of several processes only the first speaks; `disable_tqdm` also silences the bars of loading and preparing."""
    first = settings.training.local_process_index == 0
    if not first:
        logging.getLogger("speckd").setLevel(logging.ERROR)
    if settings.training.disable_tqdm or not first:
        disable_progress_bars()
        transformers_logging.disable_progress_bar()


def _trainer(
    settings: Settings, output: Path, train_data: Dataset, held_out: Dataset | None, tokenizers: tuple[Any, Any]
) -> SpecKDTrainer:
    """Loads both models and prepares the data; refused, it leaves no folder behind."""
    adapter = _adapter(settings.model)
    student_name, teacher_name = settings.model.model_name_or_path, settings.training.teacher_model_name_or_path
    student = _loaded("model_name_or_path", str(student_name), lambda: _student(settings))
    teacher = None
    if teacher_name is not None:
        teacher = _loaded(
            "teacher_model_name_or_path",
            teacher_name,
            lambda: load_teacher(teacher_name, settings.training, student.dtype),
        )
    with _nothing_left_behind(output):
        try:
            return SpecKDTrainer(
                model=student,
                teacher_model=teacher,
                args=settings.training,
                train_dataset=train_data,
                eval_dataset=held_out,
                processing_class=tokenizers[0],
                teacher_processing_class=tokenizers[1],
                peft_config=adapter,
                callbacks=[TrainingLog(output / "training_log.jsonl")],
            )
        except (ValueError, ImportError, OSError) as error:  # how TRL, PEFT and Transformers refuse a setting
            raise ConfigError(_reason(error), "Correct the setting named there") from error


def _adapter(model: ModelConfig) -> Any:
    """PEFT's settings, or None."""
    config = get_peft_config(model)
    if config is None:
        return None
    if config.use_dora:
        raise ConfigError("use_dora: AutoModelForCausalLM does not load DoRA's magnitudes", "Use plain LoRA")
    if isinstance(config.target_modules, str) and config.target_modules.isidentifier():
        config.target_modules = {config.target_modules}  # TRL unpacks a list of one name, which PEFT would read as a pattern
    return config


def _loaded(key: str, name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # missing, cut short, of an unknown kind, a setting it does not take: all look different
        raise ConfigError(f"{key}: {name} cannot be loaded ({_reason(error)})", "Check its files and settings") from error


def _reason(error: BaseException) -> str:
    """What a library says, in one line."""
    return " ".join(str(error).split())[:240].rstrip(". ") or type(error).__name__


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


# ---- checks before anything is loaded --------------------------------------------------------------------------------------


def _output_folder(settings: Settings) -> Path:
    if settings.given.get("output_dir") is None:  # Transformers would write into ./trainer_output
        raise ConfigError("output_dir is not set", "Say where the student goes: --output_dir FOLDER")
    output = Path(str(settings.training.output_dir))
    blocking = next((p for p in output.parents if p.exists() and not p.is_dir()), None)
    if blocking is not None:
        raise ConfigError(f"output_dir: {blocking} is a file, so there can be no {output}", "Choose another folder")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir: {output} is a file", "Choose a folder")
    _refuse_overwriting_inputs(settings, output)
    _require_reporters(settings)
    free = settings.run.overwrite_output_dir or _resumes(settings)
    if output.exists() and not free and {path.name for path in output.iterdir()} - _LEFT_BY_A_FAILED_RUN:
        raise ConfigError(
            f"output_dir: {output} exists and is not empty",
            "Choose another, or --resume_from_checkpoint true, or --overwrite_output_dir true",
        )
    return output


def _require_reporters(settings: Settings) -> None:
    """Reports go through packages of the same name, which a user installs or not."""
    for name in settings.training.report_to or ():
        if name in _REPORTERS and importlib.util.find_spec(name) is None:
            raise ConfigError(f"report_to: {name} is not installed", f"pip install {name}, or report_to: none")


def _refuse_overwriting_inputs(settings: Settings, output: Path) -> None:
    used = {
        "the student": settings.model.model_name_or_path,
        "the teacher": settings.training.teacher_model_name_or_path,
        "the data": settings.run.dataset_name,
        "the held-out data": settings.run.eval_dataset,
    }
    for what, name in used.items():
        if name is not None and os.path.exists(name) and os.path.realpath(name) == os.path.realpath(output):
            raise ConfigError(f"output_dir: {output} holds {what}, which would be overwritten", "Choose another folder")


def _forget_earlier_run(output: Path) -> None:
    """What a run that starts anew in an old folder must not leave there: a later resume would go on from it."""
    for name in ("training_log.jsonl", "results.json", "README.md"):
        (output / name).unlink(missing_ok=True)
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _check_models_exist(settings: Settings) -> None:
    student, teacher = settings.model.model_name_or_path, settings.training.teacher_model_name_or_path
    if student is None:
        raise ConfigError("model_name_or_path is not set: there is no student", "Give a path or hub id")
    if teacher is None and settings.training.objective().needs_teacher:
        raise ConfigError(
            "teacher_model_name_or_path is not set: there is no teacher", "Give a path or hub id, or --recipe sft"
        )
    for key, name in (("model_name_or_path", student), ("teacher_model_name_or_path", teacher)):
        if name is not None:
            _require_model(key, name, settings.training.trust_remote_code)
    if teacher is None:
        return
    same_place = os.path.realpath(student) == os.path.realpath(teacher) if os.path.exists(student) else student == teacher
    same_revision = settings.model.model_revision == (settings.training.teacher_model_revision or "main")
    if same_place and same_revision and settings.training.objective().needs_teacher:
        raise ConfigError(f"teacher_model_name_or_path: {teacher} is the student itself", "Give another model as teacher")


def _require_model(key: str, name: str, trust_remote_code: bool) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise ConfigError(f"{key}: {name} holds no config.json", "Give a folder that save_pretrained wrote")
        return
    if path.is_file():
        raise ConfigError(f"{key}: {name} is a file", "Give the folder that holds it")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or (path.parent.is_dir() and path.parent != Path()):
        known = [str(path.parent / p.name) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise ConfigError(f"{key}: there is no folder {name}", nearest(name, known) if known else "Check the path")
    try:
        AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # offline, missing and gated all look different
        raise ConfigError(
            f"{key}: '{name}' is neither a folder here nor to be had from the hub ({_reason(error)})", "Check it"
        ) from error


def _tokenizers(settings: Settings, conversational: bool) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None]:
    student, teacher = settings.model.model_name_or_path, settings.training.teacher_model_name_or_path
    assert student is not None
    own = _tokenizer("model_name_or_path", student, settings.model.model_revision, settings)
    if own.pad_token is None:
        own.pad_token = own.eos_token
    if own.eos_token is None:
        raise DataError("the student's tokenizer has no end token: a student could not learn to stop", "Set its eos_token")
    template = settings.training.chat_template_path
    if template is not None and template.endswith((".jinja", ".j2")) and not Path(template).is_file():
        raise ConfigError(f"chat_template_path: there is no file {template}", "Check the path")
    if conversational and own.chat_template is None and template is None:
        raise DataError(
            "the data holds messages, but the student's tokenizer has no chat template",
            "Give chat_template_path, or data in prompt and completion",
        )
    _require_k_below(settings, len(own))
    if teacher is None:
        return own, None
    theirs = _tokenizer("teacher_model_name_or_path", teacher, settings.training.teacher_model_revision or "main", settings)
    require_same_tokens(own, theirs)
    if own.eos_token_id != theirs.eos_token_id:
        logger.warning(
            "The student ends with %r, the teacher with %r: where the data ends with one, the other never expects an end. Set "
            "eos_token (or chat_template_path), or use a teacher of the same kind.",
            own.eos_token,
            theirs.eos_token,
        )
    return own, theirs


def _require_k_below(settings: Settings, tokens: int) -> None:
    gate: Any = settings.training.objective().gate
    gate = gate.gate if isinstance(gate, (Inverted, MatchedRandom)) else gate
    if isinstance(gate, (TopK, TwoSided, LabelInTopK)) and gate.verify_top_k >= tokens:
        raise ConfigError(
            f"gate_options: verify_top_k is {gate.verify_top_k}, but the vocabulary has {tokens} tokens: nothing is rejected",
            "Lower it, or --recipe ungated",
        )


def _tokenizer(key: str, name: str, revision: str, settings: Settings) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=settings.training.trust_remote_code)
    except Exception as error:  # as above
        raise ConfigError(
            f"{key}: no tokenizer can be loaded from {name} ({_reason(error)})", "Save one beside the model"
        ) from error


def _resumes(settings: Settings) -> bool:
    return str(settings.training.resume_from_checkpoint).lower() not in ("none", "false", "no")


def _checkpoint(settings: Settings, output: Path) -> str | None:
    """The checkpoint to go on from: the one named, or the last; refused where the settings have changed."""
    wanted = settings.training.resume_from_checkpoint
    if not _resumes(settings):
        return None
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    found = last if str(wanted).lower() == "true" else str(wanted)
    if found is None:
        logger.warning("There is no checkpoint in %s yet: starting from the beginning.", output)
        return None
    if not Path(found).is_dir():
        raise ConfigError(
            f"resume_from_checkpoint: there is no folder {found}", "Give a checkpoint folder, or true for the last"
        )
    saved = yaml.safe_load((output / "config.yaml").read_text()) if (output / "config.yaml").exists() else settings.given
    for key in sorted((saved.keys() | settings.given.keys()) - _FREE_ON_RESUME):
        was, now = saved.get(key), settings.given.get(key)
        if str(was) != str(now) and not settings.run.allow_changed_config:
            raise ConfigError(
                f"resume: {key} was {was!r} and is {now!r} now", "Undo the change, or --allow_changed_config true"
            )
    return found


# ---- what is said and saved ------------------------------------------------------------------------------------------------


def describe_method(settings: Settings) -> str:
    """The composition in one line, parameters included."""
    objective = settings.training.objective()
    if not objective.needs_teacher:
        return "SFT: cross-entropy on the data, no distillation"
    gate, rejected, divergence = (_shown(piece) for piece in (objective.gate, objective.rejected, objective.divergence))
    mixed = f" + {objective.label_loss_weight:g} cross-entropy" if objective.label_loss_weight else ""
    hot = f" at T = {objective.divergence_temperature:g}" if objective.divergence_temperature != 1 else ""
    return f"gate {gate} → rejected tokens {rejected} → {divergence}{hot}{mixed}, divided by {objective.normalizer}"


def _shown(piece: Any) -> str:
    """`TopK(verify_top_k=5)` as it is, a function by its name."""
    return getattr(piece, "__name__", repr(piece))


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
    for model, name in ((trainer.model, "Student"), (trainer.teacher, "Teacher")):
        if model is not None:
            size = sum(p.numel() for p in model.parameters())
            learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
            trained = f", {learning:,} of them trained" if 0 < learning < size else ""
            logger.info("%s: %s parameters%s, %s, on %s.", name, f"{size:,}", trained, model.dtype, model.device)


def _student(settings: Settings) -> Any:
    model, name = settings.model, settings.model.model_name_or_path
    assert name is not None
    options = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "quantization_config": get_quantization_config(model),
        "trust_remote_code": settings.training.trust_remote_code,
    }
    # An adapter remembers its base model by this name: absolute, it is found from any folder.
    name = os.path.abspath(name) if os.path.isdir(name) else name
    return AutoModelForCausalLM.from_pretrained(name, **{**options, **(settings.training.model_init_kwargs or {})})


def _start(trainer: SpecKDTrainer, output: Path, resumed: bool) -> dict[str, float]:
    """Held-out measures before the first step; of a resumed run, those in its log."""
    if not resumed or not (output / "training_log.jsonl").exists():
        return _measured(trainer)
    for line in (output / "training_log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["step"] == 0 and "eval_nll" in entry:
            return {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
    return {}


def _measured(trainer: SpecKDTrainer) -> dict[str, float]:
    if trainer.eval_dataset is None:
        return {}
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


def _warn_of_padding(trainer: SpecKDTrainer) -> None:
    """What lies outside the shared vocabulary is not trained: a fresh student may still believe in its head's padding."""
    if trainer.teacher is None:
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
    facts = CardFacts(
        student=str(settings.model.model_name_or_path),
        teacher=settings.training.teacher_model_name_or_path,
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
