"""What a run will need, said before anything heavy is loaded: the plan, what is free, and the cure where it is too little."""

import logging
import math
import os
from dataclasses import dataclass, fields
from typing import Any

import psutil
import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import AutoConfig, PreTrainedTokenizerBase

from speckd.arguments import SpecKDConfig
from speckd.checks import asked_teacher, reason_of, several_teachers
from speckd.data import longest_row_of
from speckd.dry_run import BatchShape, ModelShape, RunShape, step_facts
from speckd.errors import ConfigError
from speckd.memory_plan import GIB, MIB, MemoryPlan, Parts, StepFacts, plan
from speckd.settings import Settings, student_options
from speckd.trainer import teacher_options

logger = logging.getLogger(__name__)

_NAMES = {
    "student": "student",
    "teacher": "teacher",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "teacher_at_work": "the teacher's forward",
    "loss": "loss",
    "process": "the program",
    "holes": "kept by malloc",
}


@dataclass(frozen=True)
class Foreseen:
    """A run's plan. `free`: bytes; `facts`: what the plan was made from."""

    plan: MemoryPlan
    run: RunShape
    free: int
    facts: StepFacts

    def __str__(self) -> str:
        peak, batch = self.plan.peak, self.run.batch
        unit, name, digits = (GIB, "GiB", 2 if peak.total < 10 * GIB else 1) if peak.total >= GIB else (MIB, "MiB", 0)

        def amount(size: int) -> str:
            return f"{size / unit:.{digits}f}"

        parts = [f"{_NAMES[part.name]} {amount(getattr(peak, part.name))}" for part in fields(Parts)]
        shown = ", ".join(part for part in parts if part.split()[-1] != amount(0))
        return (
            f"Memory: about {amount(peak.total)} {name} at the peak (in {self.plan.moment}): {shown}; "
            f"with {batch.rows} rows of up to {batch.tokens} tokens, and the loss in chunks of {self.run.chunk}. "
            f"{self.free / GIB:.1f} GiB are free."
        )

    def remedy(self) -> str | None:
        """What to do where too little is free; else None."""
        peak, rows = self.plan.peak, self.run.batch.rows
        if peak.total <= self.free:
            return None
        grows = peak.activations + peak.teacher_at_work
        fitting = rows * (self.free - peak.total + grows) // max(grows, 1)
        if fitting >= 1 and fitting < rows:
            cure = f"lower per_device_train_batch_size to {fitting} (and raise gradient_accumulation_steps)"
            return cure if self.run.checkpointing is not None else f"{cure}, or set gradient_checkpointing: true"
        if self.free > peak.total - grows:
            return "lower max_length"
        if self.run.adapter is None:
            return "train an adapter (use_peft: true), or take smaller models"
        return "take smaller models, or load them in bfloat16"


def foresee_memory(
    settings: Settings,
    adapter: PeftConfig | None,
    data: tuple[Dataset, Dataset | None],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None],
) -> None:
    """Says what the run will need; warns where that is more than there is. Of several processes only the first looks.

    Args:
        settings: of the run.
        adapter: PEFT's settings, if the student gets one.
        data: to train on and, or None, held out.
        tokenizers: the student's and, or None, the teacher's.

    Raises:
        ConfigError: `loss_memory_budget` is too small for the vocabulary.
    """
    if settings.training.local_process_index != 0:
        return
    foreseen = foresee(settings, adapter, data, tokenizers[0])
    if isinstance(foreseen, str):
        logger.info("Memory: not foreseen (%s).", foreseen)
        return
    logger.info("%s", foreseen)
    remedy = foreseen.remedy()
    if remedy is not None:
        logger.warning("Memory: this is more than is free and may end the run; %s.", remedy)


def foresee(
    settings: Settings,
    adapter: PeftConfig | None,
    data: tuple[Dataset, Dataset | None],
    tokenizer: PreTrainedTokenizerBase,
) -> Foreseen | str:
    """The plan, or in words why there is none.

    Raises:
        ConfigError: `loss_memory_budget` is too small for the vocabulary.
    """
    try:
        run = _run_shape(settings, adapter, data, tokenizer)
        facts = step_facts(run)
        return Foreseen(plan(facts), run, free_bytes(run.device), facts)
    except ConfigError:
        raise
    except Exception as error:  # a model's own code may do what tensors without numbers cannot
        return reason_of(error)


def free_bytes(device: torch.device) -> int:
    """What one process may still take: of the GPU's memory, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


# ---- settings to shapes ----------------------------------------------------------------------------------------------------


class _NotForeseen(Exception):
    """The settings ask for what a dry run does not show."""


def _run_shape(
    settings: Settings,
    adapter: PeftConfig | None,
    data: tuple[Dataset, Dataset | None],
    tokenizer: PreTrainedTokenizerBase,
) -> RunShape:
    training = settings.training
    student = _model_shape(str(settings.model.model_name_or_path), student_options(settings))
    if student_options(settings).get("device_map") is not None:
        raise _NotForeseen("the student has a device_map")
    names = [name for name in (asked_teacher(settings, data[1]), *several_teachers(settings).values()) if name is not None]
    teachers = [_model_shape(name, teacher_options(training, student.options["dtype"])) for name in names]
    distils = training.objective().needs_teacher
    rows_of_heads = [_vocabulary(shape) for shape in (student, *teachers)]
    vocabulary = min(len(tokenizer), *rows_of_heads) if distils else rows_of_heads[0]
    return RunShape(
        student=student,
        teacher=teachers[0] if teachers else None,
        batch=_with_written(training, _batch(settings, data[0], tokenizer, training.per_device_train_batch_size)),
        device=training.device,
        chunk=training.chunk_size(vocabulary),
        vocabulary=vocabulary,
        distils=distils,
        teacher_elsewhere=_elsewhere(settings),
        more_teachers=tuple(teachers[1:]),
        teacher_pieces=1 if training.teacher_sharding == "none" else training.world_size,
        base_teaches=training.teacher == "base",
        adapter=adapter,
        evaluation=None if data[1] is None else _batch(settings, data[1], tokenizer, training.per_device_eval_batch_size),
        autocast=torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None,
        checkpointing=_checkpointing(settings),
        optimizer=training.optim.value,
        accumulates=training.gradient_accumulation_steps > 1,
        distributed=training.world_size > 1,
    )


def _model_shape(name: str, options: dict[str, Any]) -> ModelShape:
    if options.get("quantization_config") is not None:
        raise _NotForeseen(f"{name} is quantised")
    source = {"revision": options.get("revision"), "trust_remote_code": options.get("trust_remote_code", False)}
    config = AutoConfig.from_pretrained(name, **source)
    if getattr(config, "quantization_config", None) is not None:
        raise _NotForeseen(f"{name} is quantised")
    dtype = options.get("dtype", "auto")
    if dtype in ("auto", None):
        dtype = config.dtype or torch.float32
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    built = {"dtype": dtype, "trust_remote_code": source["trust_remote_code"]}
    if options.get("attn_implementation") is not None:
        built["attn_implementation"] = options["attn_implementation"]
    return ModelShape(config, built)


def _elsewhere(settings: Settings) -> bool:
    """Has the teacher devices of its own?"""
    training = settings.training
    if training.teacher_device is None:
        return "device_map" in (training.teacher_model_init_kwargs or {})
    theirs, own = torch.device(training.teacher_device), training.device
    return theirs.type != own.type or theirs.index not in (None, own.index)


def _vocabulary(shape: ModelShape) -> int:
    return shape.config.get_text_config().vocab_size


def _batch(settings: Settings, data: Dataset, tokenizer: PreTrainedTokenizerBase, rows: int) -> BatchShape:
    """The largest that the data can make: all rows as long as the longest."""
    training, longest = settings.training, settings.training.max_length
    flat = training.padding_free or training.packing
    if not training.packing or longest is None:
        found = longest_row_of(data, tokenizer, training.dataset_text_field)
        longest = found if longest is None else min(found, longest)
    return BatchShape(min(rows, len(data)), _padded(training, longest), flat)


def _with_written(training: SpecKDConfig, batch: BatchShape) -> BatchShape:
    """With completions behind prompts that may be nearly all of the longest row, and beside the data's where both are kept."""
    if not training.writes:
        return batch
    rows = 2 * batch.rows if training.sequence_source == "paired" else batch.rows
    return BatchShape(rows, _padded(training, batch.tokens + training.max_completion_length), batch.flat)


def _padded(training: SpecKDConfig, tokens: int) -> int:
    unit = training.pad_to_multiple_of or 1
    return math.ceil(tokens / unit) * unit


def _checkpointing(settings: Settings) -> dict[str, Any] | None:
    if not settings.training.gradient_checkpointing:
        return None
    options = settings.training.gradient_checkpointing_kwargs or {}
    if options.keys() - {"use_reentrant"}:
        raise _NotForeseen(f"gradient_checkpointing_kwargs {options}")
    return options
