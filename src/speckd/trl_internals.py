"""The one place that touches what TRL and Transformers do not promise to keep. Pinned: trl>=1.16,<2, transformers 5.17-5.23."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from trl import get_training_chat_template
from trl.chat_template_utils import has_generation_markers
from trl.data_utils import _tokenize, common_prefix_length
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from speckd.lookahead import Announced, Remembered

__all__ = [
    "DataCollatorForLanguageModeling",
    "announce_batches",
    "call_through",
    "common_prefix_length",
    "finish_from_checkpoint",
    "is_sharded_by_deepspeed_or_fsdp",
    "marks_assistant",
    "remember_order",
    "save_checkpoint",
    "token_ids",
]


def call_through(wrapper: torch.nn.Module, inner: torch.nn.Module, function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """Runs `function(**inputs)` where `inner.forward` would run, so that the wrapper's hooks (DDP, FSDP, PEFT) fire around it.

    A loss that read the weights outside the wrapped forward would leave gradients unsynchronised or meet sharded parameters.
    """
    if wrapper is inner:
        return function(**inputs)
    had = inner.__dict__.get("forward")

    def restore() -> None:
        if had is None:
            inner.__dict__.pop("forward", None)
        else:
            inner.forward = had

    def once(*_: Any, **kwargs: Any) -> Any:
        restore()  # the function itself may call the real forward
        return function(**{name: kwargs[name] for name in inputs})

    inner.forward = once
    try:
        return wrapper(**inputs)
    finally:
        restore()


def finish_from_checkpoint(trainer: Any, folder: str) -> bool:
    """Where a checkpoint is at `max_steps`, loads it and says so; the Trainer's own resume would train one step more."""
    state = TrainerState.load_from_json(str(Path(folder) / "trainer_state.json"))
    if not 0 < trainer.args.max_steps <= state.global_step:
        return False
    trainer._load_from_checkpoint(folder)
    trainer.state = state
    return True


def remember_order(loader: Any, begin: Callable[[list[int]], None]) -> None:
    """Has `begin` called with each epoch's order of rows, as the loader's own sampler, shared by all processes, draws it."""
    batches = loader.batch_sampler
    while not hasattr(batches, "sampler"):  # Accelerate's wrappers: a process's share
        batches = batches.batch_sampler
    batches.sampler = Remembered(batches.sampler, begin)


def announce_batches(loader: Any, said: Callable[[list[Any]], None]) -> None:
    """Has `said` called with the rows of each batch that is made: in Accelerate's wrapper, by the loader inside."""
    inside = getattr(loader, "base_dataloader", loader)
    inside.collate_fn = Announced(inside.collate_fn, said)


def save_checkpoint(trainer: Any) -> str | None:
    """A checkpoint of the last whole step, outside of the Trainer's own times; its folder, or None before the first step.

    Called by all processes, and none goes on before all have written: a launcher kills the others when one ends.
    """
    if not trainer.state.global_step:
        return None
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    there = folder.is_dir()
    trainer.accelerator.wait_for_everyone()  # nobody makes it before everybody has looked
    if not there:
        trainer._save_checkpoint(trainer.model, trial=None)
    trainer.accelerator.wait_for_everyone()
    return str(folder)


def token_ids(tokenizer: Any, said: str | list[dict[str, Any]], **template: Any) -> list[int]:
    """Text or messages as TRL's trainer cuts them into tokens; `template`: what goes to `apply_chat_template`."""
    return list(_tokenize(tokenizer, said, **template)["input_ids"])


def marks_assistant(tokenizer: Any) -> bool:
    """Does the chat template tell the assistant's turns apart, by itself or in the form that TRL has for it?"""
    if has_generation_markers(tokenizer.chat_template):
        return True
    try:
        return get_training_chat_template(tokenizer) is not None
    except ValueError:  # a template that TRL does not know
        return False


def is_sharded_by_deepspeed_or_fsdp(trainer: Any) -> bool:
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
