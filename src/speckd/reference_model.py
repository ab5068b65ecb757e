"""A third, frozen model that some gates compare the student with: an earlier student, or one trained on chosen data."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from speckd.arguments import SpecKDConfig
from speckd.compatibility import SharedVocabulary, shared_vocabulary
from speckd.errors import ConfigError, VocabularyError
from speckd.teachers.model import ModelSource


def reference_source(
    reference: str | PreTrainedModel, args: SpecKDConfig, tokenizer: Any, axis: SharedVocabulary, student: Any
) -> ModelSource:
    """What it says of the tokens that student and teacher share.

    Args:
        reference: by path or hub id, in bfloat16 with `bf16` and else in the student's precision; or a model.
        args: of the run.
        tokenizer: the student's.
        axis: the training's.
        student: whose device and precision are taken.

    Raises:
        ConfigError: it cannot be loaded.
        VocabularyError: it names tokens differently, or lacks some of the axis.
    """
    model: Any = _loaded(reference, args, student.dtype) if isinstance(reference, str) else reference
    model.eval().requires_grad_(False).to(args.device)
    _require_axis(model, args, tokenizer, axis, student.get_output_embeddings().weight.shape[0])
    return ModelSource(model, axis, args.device)


def _loaded(name: str, args: SpecKDConfig, dtype: torch.dtype) -> Any:
    dtype = torch.bfloat16 if args.bf16 else dtype
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:240].rstrip(". ")
        raise ConfigError(f"reference_model_name_or_path: {name} cannot be loaded ({reason})", "Check its files") from error


def _require_axis(model: Any, args: SpecKDConfig, tokenizer: Any, axis: SharedVocabulary, width: int) -> None:
    own = tokenizer
    if model.name_or_path:
        own = AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=args.trust_remote_code)
    shared = shared_vocabulary(tokenizer, own, width, model.get_output_embeddings().weight.shape[0])
    asked = torch.arange(axis.size) if axis.ids is None else axis.ids
    missing = shared.unknown(asked)
    if len(missing):
        raise VocabularyError(
            f"reference_model_name_or_path: it lacks {len(missing):,} of the {axis.size:,} tokens in use, "
            f"first id {int(missing[0])}",
            "Use a reference with the student's tokenizer",
        )
