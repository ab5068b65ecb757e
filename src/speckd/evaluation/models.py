"""The model that is evaluated, and its teacher: loaded as they are, and who they are in figures."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from speckd import fingerprints
from speckd.checks import loaded, require_model, stop_ids
from speckd.compatibility import SharedVocabulary, shared_vocabulary
from speckd.errors import ConfigError
from speckd.evaluation.options import Options
from speckd.round_trip import Rendering, template_end
from speckd.sources.writer import Completion
from speckd.teachers.sharding import size as parameter_size


@dataclass(frozen=True)
class Named:
    """A model that is there, and not loaded yet. `key`: the setting that names it."""

    key: str
    name: str
    revision: str
    options: Options

    @classmethod
    def of_model(cls, options: Options) -> "Named":
        assert options.model_name_or_path is not None
        return cls("model_name_or_path", options.model_name_or_path, options.model_revision, options)

    @classmethod
    def of_teacher(cls, options: Options) -> "Named | None":
        name = options.teacher_model_name_or_path
        return None if name is None else cls("teacher_model_name_or_path", name, options.teacher_model_revision, options)

    def require(self) -> None:
        """Refuses a model that is not there."""
        require_model(self.key, self.name, self.options.trust_remote_code)

    @cached_property
    def base(self) -> str | None:
        """Of an adapter, the model that it adapts."""
        folder = self.folder
        if folder is None or not (folder / "adapter_config.json").is_file():
            return None
        found = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        return None if found is None else str(found)

    @cached_property
    def folder(self) -> Path | None:
        """Where its files are on this machine; None where they are not."""
        if Path(self.name).is_dir():
            return Path(self.name)
        for file in ("config.json", "adapter_config.json"):
            with suppress(OSError):
                found = cached_file(self.name, file, revision=self.revision, local_files_only=True)
                if found is not None:
                    return Path(found).parent
        return None

    @cached_property
    def weights(self) -> str | None:
        """A digest of configuration and weights, an adapter's base included; of a hub id, the commit."""
        if self.folder is None:
            return None
        if not Path(self.name).is_dir():
            return self.folder.name  # the hub's cache calls its folders so
        own = fingerprints.of_model_folder(self.folder)
        if self.base is None or not Path(self.base).is_dir():
            return own
        return fingerprints.of_bytes([own.encode(), fingerprints.of_model_folder(Path(self.base)).encode()])

    @cached_property
    def tokenizer(self) -> Any:
        """The one saved with it; of an adapter that has none, its base's."""
        place = self.name
        if self.base is not None and self.folder is not None and not (self.folder / "tokenizer_config.json").is_file():
            place = self.base
        options = {"revision": self.revision, "trust_remote_code": self.options.trust_remote_code}
        found = loaded(self.key, place, lambda: AutoTokenizer.from_pretrained(place, **options))
        if found.eos_token is None:
            raise ConfigError(f"{self.key}: {self.name}: the tokenizer has no end token", "Set eos_token in its configuration")
        return found

    def stops(self, tokenizer: Any) -> frozenset[int]:
        """The tokens at which it ends a text: its tokenizer's end, those it is configured with, and an adapter's base, too."""
        base = set() if self.base is None else stop_ids(None, self.base, "main")
        return frozenset(stop_ids(tokenizer, self.name, self.revision) | base)

    def load(self, device: torch.device) -> Any:
        """The weights, frozen, in eval mode."""
        options = {
            "dtype": self.options.dtype if self.options.dtype == "auto" else getattr(torch, self.options.dtype),
            "revision": self.revision,
            "trust_remote_code": self.options.trust_remote_code,
        }
        model = loaded(self.key, self.name, lambda: AutoModelForCausalLM.from_pretrained(self.name, **options))
        return model.eval().requires_grad_(False).to(device)


@dataclass
class Models:
    """What the tasks ask: tokens at once, weights when there is something to do.

    `rendering`: how the model's tokenizer makes prompts; `device`: of both; `known`: the tokens of both tokenizers, where there
    is a teacher.
    """

    subject: Named
    teacher: Named | None
    rendering: Rendering
    device: torch.device
    known: SharedVocabulary | None = None

    @classmethod
    def of(cls, options: Options) -> "Models":
        """
        Raises:
            ConfigError: one is not there.
            VocabularyError: they do not name tokens the same way.
        """
        subject, teacher = Named.of_model(options), Named.of_teacher(options)
        for one in (subject, teacher):
            if one is not None:
                one.require()
        tokenizer, known = subject.tokenizer, None
        if teacher is not None:
            known = shared_vocabulary(tokenizer, teacher.tokenizer, len(tokenizer), len(teacher.tokenizer))
        return cls(subject, teacher, Rendering(tokenizer, subject.stops(tokenizer)), _device(options.device), known)

    @property
    def tokenizer(self) -> Any:
        return self.rendering.tokenizer

    @cached_property
    def model(self) -> Any:
        return self.subject.load(self.device)

    @cached_property
    def teacher_model(self) -> Any:
        assert self.teacher is not None
        return self.teacher.load(self.device)

    @cached_property
    def vocabulary(self) -> SharedVocabulary:
        """What model and teacher share."""
        assert self.teacher is not None
        return shared_vocabulary(self.tokenizer, self.teacher.tokenizer, width(self.model), width(self.teacher_model))

    def template_end(self, prompt: Any) -> frozenset[int]:
        """Of messages, the token by which the chat template ends an answer; of a text, none."""
        return template_end(self.tokenizer, {"prompt": prompt})

    def text(self, prompt_ids: Sequence[int], written: Completion) -> str:
        """What was written, without the tokens that end it and other special ones."""
        ids = written.token_ids.tolist()
        if ids and ids[-1] in self.rendering.stops:  # which need not be special to the tokenizer
            ids.pop()
        before, whole = (self._decoded([*prompt_ids, *more]) for more in ([], ids))
        return whole[len(before) :] if whole.startswith(before) else self._decoded(ids)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def width(model: Any) -> int:
    """Rows of the head."""
    return int(model.get_output_embeddings().weight.shape[0])


def positions(model: Any) -> int | None:
    """How many tokens a text may have; None: any number."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def facts(named: Named, model: Any) -> dict[str, Any]:
    """Of a loaded model, as in `evaluation.json`."""
    return {
        "path": named.name,
        "base": named.base,
        "weights": named.weights,
        "parameters": sum(parameter_size(p) for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _device(name: str | None) -> torch.device:
    """Where a tensor can be made, and holds numbers."""
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device: '{name}' is none ({str(error).splitlines()[0]:.80})", "Give cpu, cuda or cuda:1") from None
    try:
        torch.empty(1, device=found).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:  # AssertionError: torch was built without CUDA
        why = str(error).splitlines()[0]
        raise ConfigError(f"device: '{found}' is of no use here ({why:.80})", "Give cpu, or go where it is") from None
    return found
