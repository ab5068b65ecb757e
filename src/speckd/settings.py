"""What the user asked for: recipe, then file, then flags, checked key by key before anything heavy happens."""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from trl import ModelConfig, get_quantization_config

from speckd.arguments import SpecKDConfig
from speckd.config import options_key_of
from speckd.errors import ConfigError
from speckd.recipe_book import DEFAULT_RECIPE, recipe_settings, spoken_of
from speckd.sequence_config import OF_SOURCES, OWN_WRITER
from speckd.strict_yaml import read_yaml

#: Of a file, what a recipe among the flags replaces even where it does not speak of it.
_CHOSEN_BY_RECIPES = spoken_of(("gate", "rejected", "label_loss_weight"))
METHOD_KEYS = {"gate", "rejected", "divergence", "label_loss_weight"}
_ANY_SEED = (0, 2**32 - 1)
#: Numbers that Transformers, TRL or PEFT take unseen, and that would train nothing or end in a traceback: lowest, highest.
_RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("seed", "data_seed", "gate_seed"), _ANY_SEED),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, math.inf)),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_rows", "starvation_patience", "lora_r"), (1, math.inf)),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm"), (0, math.inf)),
    "num_train_epochs": (1e-6, math.inf),
    **dict.fromkeys(("lora_dropout", "starvation_threshold"), (0, 1)),
    "max_length": (2, math.inf),
    "token_view_samples": (0, 64),
}


@dataclass
class RunArguments:
    """Data and housekeeping of a run: what neither TRL's model nor its training settings hold."""

    dataset_name: str | None = field(default=None, metadata={"help": "JSONL or Parquet file, folder with train.*, or hub id"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a hub dataset"})
    dataset_train_split: str = field(default="train", metadata={"help": "split of a hub dataset to train on"})
    dataset_test_split: str | None = field(default=None, metadata={"help": "split of a hub dataset to evaluate on"})
    dataset_prompt_column: str | None = field(default=None, metadata={"help": "the column to use as prompt"})
    dataset_completion_column: str | None = field(default=None, metadata={"help": "the column to use as completion"})
    eval_dataset: str | None = field(default=None, metadata={"help": "held-out JSONL or Parquet file"})
    eval_rows: int | None = field(default=None, metadata={"help": "evaluate on the first so many rows only"})
    task_column: str | None = field(
        default=None,
        metadata={"help": "the data's column that names each row's task: held-out measures are given for each, too"},
    )
    token_view_samples: int = field(
        default=4, metadata={"help": "samples kept token by token for 'speckd report' (tokens.jsonl); 0 keeps none"}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "write into an output folder that is not empty"})
    allow_changed_config: bool = field(default=False, metadata={"help": "resume although settings have changed"})


@dataclass(frozen=True)
class Settings:
    """One run. `given`: what the user (or the recipe) said, merged, as it is saved and compared on resuming; `given_by_user`:
    the keys that stood in the file or in the flags."""

    training: SpecKDConfig
    model: ModelConfig
    run: RunArguments
    given: dict[str, Any]
    recipe: str | None
    given_by_user: frozenset[str] = frozenset()

    @property
    def teacher_model(self) -> str | None:
        """The teacher that this process loads; None where its answers come from elsewhere, or where there is none."""
        return self.training.teacher_model_name_or_path if self.training.teacher == "model" else None

    @property
    def kept_columns(self) -> tuple[str | None, ...]:
        """Of the data, beside its text: who teaches a row, and what its task is."""
        return self.training.teacher_route_column, self.run.task_column

    @property
    def teacher_elsewhere(self) -> bool:
        return self.training.teacher in ("cache", "server")


def student_options(settings: Settings) -> dict[str, Any]:
    """For the student's `from_pretrained`."""
    model = settings.model
    options = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "quantization_config": get_quantization_config(model),
        "trust_remote_code": settings.training.trust_remote_code,
    }
    return {**options, **(settings.training.model_init_kwargs or {})}


def load_settings(config: Path | None, recipe: str | None, flags: list[str]) -> Settings:
    """Merges recipe < file < flags and builds the typed settings; a recipe among the flags replaces the file's method.

    Raises:
        ConfigError: naming the file or flag, the key, and the nearest valid key or the expected type.
    """
    from_file = read_yaml(config) if config else {}
    from_flags = read_flags(flags, _kinds())
    in_file, in_flags = from_file.pop("recipe", None), from_flags.pop("recipe", None)
    chosen = recipe or in_flags or in_file
    if chosen is None and not METHOD_KEYS & (from_file.keys() | from_flags.keys()):
        chosen = DEFAULT_RECIPE
    of_recipe = recipe_settings(chosen) if chosen else {}
    if recipe or in_flags:
        replaced = _CHOSEN_BY_RECIPES | spoken_of(of_recipe)
        from_file = {key: value for key, value in from_file.items() if key not in replaced}
    by_user = spoken_of(from_file | from_flags)
    of_recipe = {key: value for key, value in of_recipe.items() if key not in by_user}
    sources = [(f"recipe {chosen}", of_recipe), (str(config), from_file), ("the command line", from_flags)]
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, values in sources:
        _require_known(name, values)
        merged |= values
        origin |= dict.fromkeys(values, name)
    for key in ("fsdp", "fsdp_config", "deepspeed", "parallelism_config"):
        if merged.get(key):
            raise ConfigError(
                f"{origin[key]}: {key}: sharded training is not supported yet", "Use DDP: torchrun -m speckd train"
            )
    training, model, run = _typed(merged, origin)
    _require_ranges(training, model, run, origin)
    given_by_user = frozenset(from_file) | frozenset(from_flags)
    _refuse_what_has_no_effect(training, model, merged)
    _refuse_unheard(training, given_by_user)
    return Settings(training, model, run, merged, chosen, given_by_user)


def _refuse_unheard(training: SpecKDConfig, given_by_user: frozenset[str]) -> None:
    """What the user said of the method, and what nothing in this method asks for."""
    for key in sorted(OF_SOURCES.keys() & given_by_user):
        if training.sequence_source in OF_SOURCES[key] or (training.own_writer and OWN_WRITER in OF_SOURCES[key]):
            continue
        raise ConfigError(
            f"{key} is set, but has no effect with sequence_source: {training.sequence_source}",
            f"Set sequence_source: {' or '.join(OF_SOURCES[key])}, or remove {key}",
        )
    if "gate" in given_by_user and training.gate != "none" and not training.objective().needs_teacher:
        raise ConfigError(
            f"gate: {training.gate} has no effect: label_loss_weight: 1 (SFT) learns every label and asks no teacher",
            "Remove it, or take seqkd+speckd, where the gate weighs the cross-entropy, or a label_loss_weight below 1",
        )


def _refuse_what_has_no_effect(training: SpecKDConfig, model: ModelConfig, merged: dict[str, Any]) -> None:
    adapter = [key for key in merged if key.startswith("lora_") or key in ("use_dora", "use_rslora")]
    if adapter and not model.use_peft and "use_peft" not in merged:
        raise ConfigError(f"{adapter[0]} is set, but the student gets no adapter", "Add use_peft: true, or remove it")
    for key in ("teacher_route_column", "teacher_mixture"):
        if getattr(training, key) is not None and training.teachers is None:
            raise ConfigError(f"{key} is set, but there are no teachers to choose from", "Set teachers: {name: path, ...}")
    if training.teacher == "base" and not model.use_peft:
        raise ConfigError(
            "teacher: base needs a student with an adapter, whose base it is", "Add use_peft: true, or name another teacher"
        )
    if training.fp16 and training.device.type == "cpu":
        raise ConfigError("fp16 needs a GPU", "Train in float32, or in bfloat16 with bf16: true")


def all_keys() -> dict[str, str]:
    """Every key that a run understands, and its help."""
    found: dict[str, str] = {}
    for group in (RunArguments, SpecKDConfig, ModelConfig):
        found |= {f.name: f"{f.metadata.get('help', '')}{_default(f)}" for f in dataclasses.fields(group)}
    return found


def _default(field: dataclasses.Field) -> str:
    return (
        "" if field.default in (dataclasses.MISSING, None) else f" [default: {getattr(field.default, 'value', field.default)}]"
    )


def read_flags(flags: list[str], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--key a b c` (a list), `--key` (true) and `--key null` (none).

    Args:
        kinds: the keys' types: what is a text stays as it is written.
    """
    found: dict[str, Any] = {}
    key = None
    for word in flags:
        if word.startswith("--"):
            key, _, value = word[2:].partition("=")
            key = key.replace("-", "_")
            found[key] = [value] if value else []
        elif key is None:
            raise ConfigError(f"the command line: '{word}' belongs to no option", "Write --key value")
        else:
            found[key].append(word)
    return {
        key: words if len(words) > 1 else _scalar(kinds.get(key), words[0]) if words else True for key, words in found.items()
    }


def _scalar(kind: Any, word: str) -> Any:
    """What a word on the command line stands for: null, a truth value, a number, or itself, as it always is for a text."""
    named = {"null": None, "true": True, "false": False}
    if word.lower() in named:
        return named[word.lower()]
    if kind in (str, str | None):
        return word
    for number in (int, float):
        try:
            return number(word) if any(c.isdigit() for c in word) else word
        except ValueError:
            continue
    return word


def _require_known(source: str, values: dict[str, Any]) -> None:
    known = list(all_keys())
    for key in values:
        if key not in known:
            close = get_close_matches(key, known, n=1, cutoff=0.5)
            fix = f"Did you mean '{close[0]}'?" if close else "Remove it"
            if (options := options_key_of(key)) is not None:
                fix = f"Write {options}: {{{key}: ...}}"
            raise ConfigError(f"{source}: '{key}' is not a setting", f"{fix} (speckd options lists all)")


def _require_ranges(training: SpecKDConfig, model: ModelConfig, run: RunArguments, origin: dict[str, str]) -> None:
    for key, source in origin.items():
        value = next(getattr(group, key) for group in (run, training, model) if hasattr(group, key))
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        lowest, highest = _RANGES.get(key, (-math.inf, math.inf))
        if key == "max_steps" and (value == 0 or value < -1):
            raise ConfigError(f"{source}: max_steps is {value}", "Give at least 1, or leave it out to train num_train_epochs")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{source}: {key} is {value}", "Give a finite number")
        if not lowest <= value <= highest:
            limits = f"at least {lowest:g}" if highest == math.inf else f"between {lowest:g} and {highest:g}"
            raise ConfigError(f"{source}: {key} is {value}", f"Give a number {limits}")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def _typed(merged: dict[str, Any], origin: dict[str, str]) -> tuple[SpecKDConfig, ModelConfig, RunArguments]:
    words: list[str] = []
    shared = {f.name for f in dataclasses.fields(SpecKDConfig)} & {f.name for f in dataclasses.fields(ModelConfig)}
    for key, value in merged.items():
        if value is None:
            continue
        if key in SpecKDConfig._VALID_DICT_FIELDS and isinstance(value, str) and value.lstrip().startswith("{"):
            _require_json(key, value, origin[key])
        if isinstance(value, dict):
            words += [f"--{key}", json.dumps(value, default=str)]
        elif isinstance(value, (list, tuple)):
            words += [f"--{key}", *map(str, value)]
        elif value is False and not _is_flag(key):
            words += [f"--{key}", "no"]  # YAML reads 'save_strategy: no' as false
        else:
            words += [f"--{key}", str(value)]
    try:
        parser = _Parser([SpecKDConfig, RunArguments], allow_abbrev=False)
        model_parser = _Parser(ModelConfig, allow_abbrev=False)
        for one in (parser, model_parser):  # a null takes a default away
            one.set_defaults(**{a.dest: None for a in one._actions if a.dest in merged and merged[a.dest] is None})
        model_namespace, rest = model_parser.parse_known_args(words)
        for key in shared:  # asked by both, such as trust_remote_code
            if key in merged:
                rest += [f"--{key}", str(merged[key])]
        _require_single_values(merged, origin, [a for one in (parser, model_parser) for a in one._actions])
        training, run = parser.parse_args_into_dataclasses(rest)
        return training, ModelConfig(**vars(model_namespace)), run
    except argparse.ArgumentError as error:
        raise _type_error(str(error), merged, origin) from None
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error).strip().splitlines()[0].rstrip("."), "Correct the settings named there") from None


def _require_json(key: str, text: str, source: str) -> None:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        fix = f"Write for example --{key} '{{\"name\": 5}}', or a mapping in the file"
        raise ConfigError(f"{source}: {key}: {text!r} is not JSON ({error})", fix) from None


def _require_single_values(merged: dict[str, Any], origin: dict[str, str], actions: list[argparse.Action]) -> None:
    many = {action.dest for action in actions if action.nargs == "+"}
    for key, value in merged.items():
        if isinstance(value, list) and len(value) > 1 and key not in many:
            raise ConfigError(f"{origin[key]}: {key}: {value!r} does not fit (one value expected)", "Give a single value")


def _kinds() -> dict[str, Any]:
    return {f.name: f.type for group in (RunArguments, SpecKDConfig, ModelConfig) for f in dataclasses.fields(group)}


def _is_flag(key: str) -> bool:
    return "bool" in str(_kinds()[key])


def _type_error(message: str, merged: dict[str, Any], origin: dict[str, str]) -> ConfigError:
    for key in sorted(merged, key=len, reverse=True):
        if f"--{key}" in message:
            reason = message.split(": ", 1)[-1].rstrip(".")
            return ConfigError(f"{origin[key]}: {key}: {merged[key]!r} does not fit ({reason})", "Give a value of that type")
    return ConfigError(message, "Correct the settings named there")
