"""Where a cache's answers come from: what a capture writes down, and what a run that uses it must agree with, by name."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from speckd import fingerprints
from speckd.arguments import QUANTIZATION, SpecKDConfig
from speckd.checks import load_tokenizers
from speckd.compatibility import SharedVocabulary
from speckd.model_card import versions
from speckd.settings import Settings
from speckd.teachers.layout import Kind, Layout
from speckd.teachers.manifest import Provenance
from speckd.trainer import SpecKDTrainer

#: What in `teacher_model_init_kwargs` says where a teacher is loaded and how it computes, and not who it is.
_EXECUTION = {
    *("device_map", "max_memory", "low_cpu_mem_usage", "offload_folder", "offload_state_dict", "offload_buffers"),
    *("cache_dir", "force_download", "local_files_only", "proxies", "token", "trust_remote_code", "use_safetensors"),
    *("attn_implementation", "tp_plan", "tp_size"),
}
_OWN_FIELDS = {"dtype", "torch_dtype", "revision", *QUANTIZATION}


def libraries() -> dict[str, str]:
    """The versions by which answers may differ in their last digits."""
    return {name: version for name, version in versions().items() if name in ("speckd", "torch", "transformers")}


def other_libraries(then: Mapping[str, str]) -> str | None:
    """Those of a capture that are not the same now, in words."""
    now = libraries()
    changed = [f"{name} {version} (now {now[name]})" for name, version in then.items() if now.get(name, version) != version]
    return ", ".join(changed) or None


def of_capture(settings: Settings, trainer: SpecKDTrainer) -> dict[str, Any]:
    """Everything that the answers depend on."""
    # As a run finds it: the trainer may have changed its template.
    tokenizer, _ = load_tokenizers(settings, conversational=False)
    return {
        **_of_data(settings, tokenizer),
        **of_teacher(settings.training, trainer.teacher.dtype),
        "vocabulary": written(trainer.vocabulary),
        "temperature": 1.0,
    }


def of_writing(settings: Settings, tokenizer: Any, prompts: Iterable[Sequence[int]], samples: int) -> dict[str, Any]:
    """Everything that text written by the teacher depends on.

    Args:
        tokenizer: the student's, by whose template the prompts were made.
        prompts: token ids, in the data's order.
        samples: completions of each.
    """
    args = settings.training
    data = fingerprints.of_bytes(json.dumps(list(prompt)).encode() for prompt in prompts)
    return {
        **_of_data(settings, tokenizer),
        **of_teacher(args, torch.bfloat16 if args.bf16 else None),
        "teacher_place": args.teacher,
        "prompts": data,
        "samples_per_prompt": samples,
        "seed": args.seed,
        **{f"sampling_{key}": getattr(args, f"sampling_{key}") for key in ("temperature", "top_k", "top_p")},
        "max_completion_length": args.max_completion_length,
    }


def of_teacher(args: SpecKDConfig, dtype: Any) -> dict[str, Any]:
    """Who the teacher is, as far as that can be known here, and how it is loaded. `dtype`: of the loaded model, if it is."""
    if args.teacher == "server":
        return {"teacher": args.teacher_server_model}
    name, revision = str(args.teacher_model_name_or_path), _revision(args)
    folder, commit = _found(name, revision, args)
    base = None if folder is None else _base_of(folder)
    base_folder, base_commit = (None, None) if base is None else _found(base, revision, args)
    return {
        "teacher": name,
        "teacher_weights": _weights(folder),
        "teacher_revision": revision,
        "teacher_commit": commit,
        "teacher_base": base,
        "teacher_base_weights": _weights(base_folder),
        "teacher_base_commit": base_commit,
        "teacher_dtype": _given_dtype(args) or (None if dtype is None else str(dtype)),
        "teacher_quantization": args.teacher_quantization,
        "teacher_options": _options(args),
    }


def of_run(settings: Settings, tokenizer: Any, kept: Provenance, layout: Layout) -> dict[str, Any]:
    """What of it a run knows: from its student and data, from its teacher where that is here, and from what is set.

    Args:
        kept: the cache's provenance: what it could not know is not compared.
        layout: the cache's; its settings are compared where the run sets them, too.
    """
    args = settings.training
    known = {**_of_data(settings, tokenizer), **_of_named_teacher(args, kept)}
    if args.teacher_model_init_kwargs is not None:
        dtype = _given_dtype(args)
        known |= {"teacher_quantization": args.teacher_quantization, "teacher_options": _options(args)}
        known |= {} if dtype is None else {"teacher_dtype": dtype}
    asked = {key: getattr(args, key) for key in layout.settings if settings.given.get(key) is not None}
    if layout.kind is Kind.TOP_K and "teacher_top_k" in asked:
        asked["teacher_top_k"] = min(asked["teacher_top_k"], layout.vocabulary_size)
    return known | asked


def _of_data(settings: Settings, tokenizer: Any) -> dict[str, Any]:
    path, template = settings.training.chat_template_path, tokenizer.chat_template
    if path is not None and Path(path).is_file():
        template = Path(path).read_text()
    return {"tokenizer": fingerprints.of_tokenizer(tokenizer), "chat_template": fingerprints.of_text(template)}


# ---- the teacher -----------------------------------------------------------------------------------------------------------


def _of_named_teacher(args: SpecKDConfig, kept: Provenance) -> dict[str, Any]:
    """By its weights where its folder is here; else by name and revision, as far as the run sets them."""
    name, revision = args.teacher_model_name_or_path, _revision(args)
    if name is None:
        return {} if args.teacher_model_revision is None else _of_revision(revision, _commit(revision), kept)
    folder, commit = _found(name, revision, args)
    base = {} if folder is None else _of_base(folder, revision, args, kept)
    if Path(name).is_dir() and kept.get("teacher_weights") is not None:
        return {"teacher_weights": _weights(folder), **base}
    return {"teacher": name, **_of_revision(revision, commit, kept), **base}


def _of_revision(revision: str, commit: str | None, kept: Provenance) -> dict[str, Any]:
    """A branch moves: commits are compared where both are known."""
    if commit is not None and kept.get("teacher_commit") is not None:
        return {"teacher_commit": commit}
    return {"teacher_revision": revision}


def _of_base(adapter: Path, revision: str, args: SpecKDConfig, kept: Provenance) -> dict[str, Any]:
    base = _base_of(adapter)
    if base is None:
        return {}
    folder, commit = _found(base, revision, args)
    if Path(base).is_dir() and kept.get("teacher_base_weights") is not None:
        return {"teacher_base_weights": _weights(folder)}
    known = commit is not None and kept.get("teacher_base_commit") is not None
    return {"teacher_base_commit": commit} if known else {}


def _base_of(folder: Path) -> str | None:
    """The model that an adapter's folder is put on; None where the folder holds a whole model."""
    file = folder / "adapter_config.json"
    if not file.is_file() or (folder / "config.json").is_file():
        return None
    return str(json.loads(file.read_text())["base_model_name_or_path"])


def _found(name: str, revision: str, args: SpecKDConfig) -> tuple[Path | None, str | None]:
    """A model's files on this machine and, of one from the hub, its commit, as far as that can be known without asking it."""
    if Path(name).is_dir():
        return Path(name), None
    cache = _given(args).get("cache_dir")
    for file in ("config.json", "adapter_config.json"):
        try:
            found = cached_file(name, file, revision=revision, cache_dir=cache, local_files_only=True)
        except OSError:  # not here, or no name of the hub's
            continue
        if found is not None:
            return Path(found).parent, _commit(Path(found).parent.name)
    return None, _commit(revision)


def _commit(revision: str) -> str | None:
    return revision if re.fullmatch("[0-9a-f]{40}", revision) else None


def _weights(folder: Path | None) -> str | None:
    return None if folder is None else fingerprints.of_model_folder(folder)


# ---- how it is loaded ------------------------------------------------------------------------------------------------------


def _given(args: SpecKDConfig) -> dict[str, Any]:
    given: Any = args.teacher_model_init_kwargs or {}
    return dict(given)


def _revision(args: SpecKDConfig) -> str:
    return str(_given(args).get("revision") or args.teacher_model_revision or "main")


def _given_dtype(args: SpecKDConfig) -> Any:
    """As PyTorch writes it: 'half' is 'torch.float16'; None where the model's files or the run's own precision decide."""
    given = _given(args).get("dtype", _given(args).get("torch_dtype"))
    if given in (None, "auto"):
        return None
    return str(getattr(torch, given.removeprefix("torch."), given)) if isinstance(given, str) else given


def _options(args: SpecKDConfig) -> dict[str, Any]:
    """What else changes the teacher, such as an attribute of its configuration."""
    return {key: value for key, value in _given(args).items() if key not in _EXECUTION | _OWN_FIELDS}


# ---- the shared vocabulary -------------------------------------------------------------------------------------------------


def written(vocabulary: SharedVocabulary) -> dict[str, Any]:
    """As JSON."""
    ids = None if vocabulary.ids is None else vocabulary.ids.tolist()
    return {"size": vocabulary.size, "ids": ids, "teacher_only": list(vocabulary.teacher_only)}


def read(values: Mapping[str, Any]) -> SharedVocabulary:
    ids = values["ids"]
    return SharedVocabulary(values["size"], None if ids is None else torch.tensor(ids), tuple(values["teacher_only"]))
