"""Task examples as padded tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speckd.tasks import Example
from speckd.tokens import TokenBatch
from speckd.types import IGNORED_LABEL


@dataclass(frozen=True)
class Encoded:
    """One example: ids of prompt, completion and end token; how many belong to the prompt; its number in the data."""

    ids: list[int]
    prompt_length: int
    sample: int


def encode(examples: Sequence[Example], tokenizer: Any) -> list[Encoded]:
    encoded = []
    for i, example in enumerate(examples):
        prompt = tokenizer(example.prompt).input_ids
        completion = tokenizer(example.completion).input_ids
        encoded.append(Encoded([*prompt, *completion, tokenizer.eos_token_id], len(prompt), i))
    return encoded


def collate(chosen: Sequence[Encoded], pad: int) -> tuple[TokenBatch, Tensor]:
    """Right-padded batch with completion-only labels, and its attention mask, [B, L]."""
    length = max(len(e.ids) for e in chosen)
    ids = torch.full((len(chosen), length), pad)
    labels, mask = torch.full_like(ids, IGNORED_LABEL), torch.zeros_like(ids)
    for row, e in enumerate(chosen):
        n = len(e.ids)
        ids[row, :n], mask[row, :n] = torch.tensor(e.ids), 1
        labels[row, e.prompt_length : n] = ids[row, e.prompt_length : n]
    samples = torch.tensor([e.sample for e in chosen])[:, None].expand_as(ids)
    return TokenBatch(ids, labels, samples, torch.arange(length).expand_as(ids)), mask


def batches(rows: int, batch_size: int, seed: int, steps: int) -> Iterator[list[int]]:
    """The same rows in the same order for every method of one seed."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < batch_size:
            order += torch.randperm(rows, generator=generator).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        yield chosen
