"""What is looked for before anything heavy is loaded: folders, models, tokenizers, shapes, what a resumed run may change."""

import importlib.util
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from speckd import fingerprints, own_parts
from speckd.arguments import SpecKDConfig
from speckd.collation import number_teachers
from speckd.compatibility import require_same_tokens
from speckd.config import mapping, nearest
from speckd.errors import ConfigError, DataError
from speckd.gates import Inverted, LabelInTopK, MatchedRandom, TopK, TwoSided
from speckd.settings import Settings
from speckd.student_servers import WEIGHTS

logger = logging.getLogger(__name__)

_REPORTERS = {"wandb", "trackio", "tensorboard", "mlflow", "comet_ml", "clearml", "swanlab", "neptune"}

#: In a run's folder: what its servers said of a fixed sequence.
CANARY = "teacher_canary.json"

#: In a run's folder: digests of the files that hold the user's own parts.
OWN_FILES = "own_parts.json"
#: Settings that may name such a part.
_OWN_PARTS = ("gate", "rejected", "divergence", "sequence_source", "student_text_divergence", "student_text_rejected")

#: What a run leaves that failed before its first checkpoint: nothing to keep, so its folder may be used again.
_LEFT_BY_A_FAILED_RUN = {"config.yaml", "training_log.jsonl", "runs", CANARY, WEIGHTS, OWN_FILES}

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
    *(
        "loss_memory_budget",
        "loss_chunk_size",
        "early_rejection",
        "per_device_eval_batch_size",
        "teacher_device",
        "teacher_sharding",
        "share_teacher_prompt",
    ),
    *(f"teacher_server_{name}" for name in ("urls", "concurrency", "tokens", "timeout_s", "patience_s")),
    *("student_server_urls", "student_server_model", "student_server_concurrency"),
    "teacher_prefetch",
}


def output_folder(settings: Settings) -> Path:
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
    if not output.exists() or settings.run.overwrite_output_dir:
        return output
    kept = {path.name for path in output.iterdir() if not path.name.startswith(".")} - _LEFT_BY_A_FAILED_RUN
    if kept and not resumes(settings.training):
        raise ConfigError(
            f"output_dir: {output} exists and is not empty",
            "Choose another, or --resume_from_checkpoint true, or --overwrite_output_dir true",
        )
    if kept and str(settings.training.resume_from_checkpoint).lower() == "true" and get_last_checkpoint(str(output)) is None:
        raise ConfigError(
            f"resume_from_checkpoint: {output} holds no checkpoint, but other files",
            "Choose another output_dir, or --overwrite_output_dir true to start anew there",
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
        **{f"the teacher {name}": path for name, path in several_teachers(settings).items()},
        "the data": settings.run.dataset_name,
        "the held-out data": settings.run.eval_dataset,
    }
    for what, name in used.items():
        if name is not None and os.path.exists(name) and Path(name).resolve().is_relative_to(output.resolve()):
            raise ConfigError(f"output_dir: {output} holds {what}, which would be overwritten", "Choose another folder")


def asked_teacher(settings: Settings, held_out: Dataset | None) -> str | None:
    """The teacher that this process loads, if anything asks it: the loss, or the measures on held-out rows."""
    asked = held_out is not None or settings.training.objective().needs_teacher
    return settings.teacher_model if asked else None


def own_files(settings: Settings) -> dict[str, str]:
    """Digests of the files that hold the user's own parts, by the settings' words for these."""
    training = settings.training
    names = {key: getattr(training, key) for key in _OWN_PARTS}
    for key, inner in (("gate_options", "gate"), ("divergence_options", "divergence")):
        names[key] = mapping(key, getattr(training, key)).get(inner)
    found = {}
    for key, name in names.items():
        path = own_parts.file_of(key, name) if isinstance(name, str) and ":" in name else None
        if path is not None:
            found[f"{key}: {name}"] = fingerprints.of_bytes([path.read_bytes()])
    return found


def several_teachers(settings: Settings) -> dict[str, str]:
    """Paths or hub ids by name, where there is more than one teacher."""
    return dict(settings.training.teachers or {})  # type: ignore[arg-type]


def check_models_exist(settings: Settings) -> None:
    require_student(settings)
    require_teacher(settings)
    require_reference(settings)


def require_student(settings: Settings) -> None:
    """Refuses a student that is not named or not there."""
    student = settings.model.model_name_or_path
    if student is None:
        raise ConfigError("model_name_or_path is not set: there is no student", "Give a path or hub id")
    require_model("model_name_or_path", student, settings.training.trust_remote_code)


def require_teacher(settings: Settings) -> None:
    """Refuses teachers in this process that are not named though needed, not there, or the student itself."""
    student, teacher = str(settings.model.model_name_or_path), settings.teacher_model
    several = several_teachers(settings)
    nobody = teacher is None and not several and settings.training.teacher == "model"
    if nobody and settings.training.objective().needs_teacher:
        raise ConfigError(
            "teacher_model_name_or_path is not set: there is no teacher", "Give a path or hub id, or --recipe sft"
        )
    _require_packages(settings)
    of_several = [(f"teachers: {name}", path) for name, path in several.items()]
    for key, name in (("teacher_model_name_or_path", teacher), *of_several):
        if name is not None:
            require_model(key, name, settings.training.trust_remote_code)
    if teacher is None:
        return
    same_place = os.path.realpath(student) == os.path.realpath(teacher) if os.path.exists(student) else student == teacher
    same_revision = settings.model.model_revision == (settings.training.teacher_model_revision or "main")
    if same_place and same_revision and settings.training.objective().needs_teacher:
        raise ConfigError(f"teacher_model_name_or_path: {teacher} is the student itself", "Give another model as teacher")


def require_reference(settings: Settings) -> None:
    """Refuses a reference model that is not named though the gate needs it, not there, or asked by nobody."""
    name, wanted = settings.training.reference_model_name_or_path, settings.training.objective().needs_reference
    if wanted and name is None:
        raise ConfigError(
            f"reference_model_name_or_path is not set: {settings.training.gate} compares the student with a third model",
            "Give a path or hub id, such as of an earlier student",
        )
    if name is not None and not wanted:
        raise ConfigError(
            "reference_model_name_or_path is set, but the gate compares with no third model",
            "Remove it, or --gate excess_divergence",
        )
    if name is not None:
        require_model("reference_model_name_or_path", name, settings.training.trust_remote_code)


def _require_packages(settings: Settings) -> None:
    """What some teachers need, and a user installs or not."""
    if settings.training.teacher_sharding == "zero3" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("teacher_sharding: zero3 needs DeepSpeed, which is not installed", "pip install deepspeed, or fsdp2")
    quantised = settings.training.teacher_quantization
    by_bitsandbytes = isinstance(quantised, dict) and (quantised.get("load_in_4bit") or quantised.get("load_in_8bit"))
    if by_bitsandbytes and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "teacher_model_init_kwargs: a teacher in 4 or 8 bits needs bitsandbytes, which is not installed",
            "pip install bitsandbytes, or load the teacher in bfloat16",
        )


def require_model(key: str, name: str, trust_remote_code: bool) -> None:
    """Refuses a name that is neither a model's folder nor one of the hub's. `key`: the setting that gives it."""
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
            f"{key}: '{name}' is neither a folder here nor to be had from the hub ({reason_of(error)})", "Check it"
        ) from error


def check_shapes(settings: Settings, train_data: Dataset, held_out: Dataset | None) -> None:
    column = settings.training.teacher_route_column
    for data, path in ((train_data, settings.run.dataset_name), (held_out, settings.run.eval_dataset)):
        if column is not None and data is not None:
            number_teachers(data, column, list(several_teachers(settings)), path or f"{settings.run.dataset_name} (held out)")
    if held_out is None and settings.training.eval_strategy != "no":
        raise ConfigError(
            f"eval_strategy is {settings.training.eval_strategy.value}, but nothing is held out",
            "Give eval_dataset, or set eval_strategy: no",
        )
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


def load_tokenizers(settings: Settings, conversational: bool) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None]:
    own = student_tokenizer(settings)
    require_end_token(own)
    require_template(settings, own, conversational)
    require_k_below(settings, len(own))
    for name, path in several_teachers(settings).items():
        require_same_tokens(own, tokenizer_among_several(settings, name, path))
    if settings.teacher_model is None:
        return own, None
    theirs = teacher_tokenizer(settings, settings.teacher_model)
    require_same_tokens(own, theirs)
    if own.eos_token_id != theirs.eos_token_id:
        logger.warning(
            "The student ends with %r, the teacher with %r: where the data ends with one, the other never expects an end. Set "
            "eos_token (or chat_template_path), or use a teacher of the same kind.",
            own.eos_token,
            theirs.eos_token,
        )
    return own, theirs


def student_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """With the end token that the settings name; where it has no padding token, the end token pads."""
    own = _tokenizer("model_name_or_path", str(settings.model.model_name_or_path), settings.model.model_revision, settings)
    if settings.training.eos_token in own.get_vocab():  # what is in no vocabulary TRL refuses
        own.eos_token = settings.training.eos_token
    if own.pad_token is None:
        own.pad_token = own.eos_token
    return own


def teacher_tokenizer(settings: Settings, name: str) -> PreTrainedTokenizerBase:
    """The one saved with the teacher of that path or hub id."""
    return _tokenizer("teacher_model_name_or_path", name, settings.training.teacher_model_revision or "main", settings)


def stop_ids(tokenizer: Any, name: str, revision: str) -> set[int]:
    """At which tokens a model stops: its tokenizer's end (if given), and those of its generation configuration."""
    own = [] if tokenizer is None else [tokenizer.eos_token_id]
    try:
        configured = GenerationConfig.from_pretrained(name, revision=revision).eos_token_id
    except (OSError, ValueError):  # there need not be one
        configured = None
    return {i for i in (*own, *(configured if isinstance(configured, list) else [configured])) if i is not None}


def tokenizer_among_several(settings: Settings, name: str, path: str) -> PreTrainedTokenizerBase:
    """That of one of several teachers, by its name."""
    return _tokenizer(f"teachers: {name}", path, "main", settings)


def require_end_token(own: PreTrainedTokenizerBase) -> None:
    if own.eos_token is None:
        raise DataError("the student's tokenizer has no end token: a student could not learn to stop", "Set eos_token")


def require_template(settings: Settings, own: PreTrainedTokenizerBase, conversational: bool) -> None:
    """Refuses a template's file that is not there, and messages without a template."""
    template = settings.training.chat_template_path
    if template is not None and template.endswith((".jinja", ".j2")) and not Path(template).is_file():
        raise ConfigError(f"chat_template_path: there is no file {template}", "Check the path")
    if conversational and own.chat_template is None and template is None:
        raise DataError(
            "the data holds messages, but the student's tokenizer has no chat template",
            "Give chat_template_path, or data in prompt and completion",
        )


def require_k_below(settings: Settings, tokens: int) -> None:
    """Refuses a rank among the whole vocabulary or more."""
    moving = settings.training.moving_objective()
    aims = [moving.start] if settings.training.gate_controller else moving.extremes()  # a controller's bound is no aim
    for objective in aims:
        gate: Any = objective.gate
        gate = gate.gate if isinstance(gate, (Inverted, MatchedRandom)) else gate
        if isinstance(gate, (TopK, TwoSided, LabelInTopK)) and gate.verify_top_k >= tokens:
            raise ConfigError(
                f"gate_options: verify_top_k is {gate.verify_top_k}, but the vocabulary has {tokens} tokens: nothing is "
                "rejected",
                "Lower it, or --recipe ungated",
            )


def _tokenizer(key: str, name: str, revision: str, settings: Settings) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=settings.training.trust_remote_code)
    except Exception as error:  # as above
        raise ConfigError(
            f"{key}: no tokenizer can be loaded from {name} ({reason_of(error)})", "Save one beside the model"
        ) from error


def resumes(args: SpecKDConfig) -> bool:
    """A file's false is a truth value, the command line's a text."""
    return str(args.resume_from_checkpoint).lower() not in ("none", "false", "no")


def checkpoint_to_resume(settings: Settings, output: Path) -> str | None:
    """The checkpoint to go on from: the one named, or the last; refused where the settings have changed."""
    wanted = settings.training.resume_from_checkpoint
    if not resumes(settings.training):
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
    if not (Path(found) / "trainer_state.json").is_file():
        raise ConfigError(
            f"resume_from_checkpoint: {found} is no checkpoint of a run", "Give a folder named checkpoint-N, or true"
        )
    saved = yaml.safe_load((output / "config.yaml").read_text()) if (output / "config.yaml").exists() else settings.given
    for key in sorted((saved.keys() | settings.given.keys()) - _FREE_ON_RESUME):
        was, now = saved.get(key), settings.given.get(key)
        if not _same(was, now) and not settings.run.allow_changed_config:
            raise ConfigError(
                f"resume: {key} was {was!r} and is {now!r} now", "Undo the change, or --allow_changed_config true"
            )
    if not settings.run.allow_changed_config:
        _require_same_files(settings, output / OWN_FILES)
    return found


def _require_same_files(settings: Settings, kept: Path) -> None:
    """Refuses parts of the user's own that were written otherwise when the run began; an older run did not keep that."""
    before = json.loads(kept.read_text()) if kept.is_file() else {}
    for name, digest in own_files(settings).items():
        if before.get(name, digest) != digest:
            raise ConfigError(
                f"resume: {name}: what the file says has changed since the run began",
                "Undo the change, or --allow_changed_config true",
            )


def _same(was: Any, now: Any) -> bool:
    """1e-4 is a text to YAML, and 0.0001 to the command line."""
    try:
        return float(was) == float(now)
    except (TypeError, ValueError):
        return str(was) == str(now)


def loaded(key: str, name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # missing, cut short, of an unknown kind, a setting it does not take: all look different
        raise ConfigError(f"{key}: {name} cannot be loaded ({reason_of(error)})", "Check its files and settings") from error


def reason_of(error: BaseException) -> str:
    """What a library says, in one line."""
    return " ".join(str(error).split())[:240].rstrip(". ") or type(error).__name__
