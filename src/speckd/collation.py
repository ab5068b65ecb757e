"""Which sample every token belongs to, carried from the data set through truncation, packing and padding to the loss."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import pack_dataset

from speckd.errors import CapabilityError, DataError
from speckd.tokens import TokenBatch
from speckd.trl_internals import DataCollatorForLanguageModeling
from speckd.types import IGNORED_LABEL

logger = logging.getLogger(__name__)

SAMPLE = "sample_ids"


@dataclass(frozen=True)
class DroppedRows:
    """Rows that lost every supervised token when cut to `max_length`. `rows`: their numbers, from 1; `total`: of how many."""

    rows: list[int]
    total: int

    def __str__(self) -> str:
        first = ", ".join(map(str, self.rows[:5])) + (", …" if len(self.rows) > 5 else "")
        return f"{len(self.rows)} of {self.total} rows (row {first}) have no supervised token left within max_length"


def number_rows(dataset: Dataset) -> Dataset:
    return dataset.add_column(SAMPLE, list(range(len(dataset))))


def require_supervision(prepared: Dataset, total: int, name: str, max_length: int | None) -> DroppedRows:
    """After tokenisation and truncation: what was lost, said once; an error where nothing is left to learn from."""
    kept = set(prepared[SAMPLE])
    dropped = DroppedRows([row + 1 for row in range(total) if row not in kept], total)
    supervised = any(label != IGNORED_LABEL for row in prepared for label in row["labels"][1:])
    if not supervised:
        raise DataError(
            f"the {name} data has no supervised token: {dropped if dropped.rows else 'every label is masked'}",
            f"Raise max_length (now {max_length}), or check that completions or assistant turns are not empty",
        )
    if dropped.rows:
        logger.warning("%s data: %s; they are left out. Raise max_length (now %s) to keep them.", name, dropped, max_length)
    return dropped


def spread_sample_ids(prepared: Dataset, packing: bool, max_length: int | None, strategy: str) -> Dataset:
    """One sample id a token, so that it is cut and packed like the tokens."""
    prepared = prepared.map(
        lambda row: {SAMPLE: [row[SAMPLE]] * len(row["input_ids"])},
        desc="Numbering samples",
    ).select_columns(["input_ids", "labels", SAMPLE])
    return pack_dataset(prepared, max_length, strategy) if packing else prepared


class SampleCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with `sample_ids` ([B, L], −1 in the padding) beside the rest."""

    def torch_call(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(list(examples))
        pieces = [torch.tensor(example[SAMPLE]) for example in examples]
        if self.padding_free:
            pieces = [torch.cat(pieces)]
        samples = torch.full_like(batch["input_ids"], -1)
        for row, piece in enumerate(pieces):
            samples[row, : len(piece)] = piece
        return {**batch, SAMPLE: samples}


def as_token_batch(inputs: dict[str, Any], labels: Tensor) -> TokenBatch:
    """A collated batch as `TokenBatch`; without `position_ids`, each row is one sample padded on the right."""
    ids = inputs["input_ids"]
    positions = inputs.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return TokenBatch(ids, labels, inputs[SAMPLE], positions)


@torch.no_grad()
def require_isolation(model: Any, name: str) -> None:
    """Refuses packing where documents in one row see each other: changes the first, and looks whether the second notices."""
    device = model.get_input_embeddings().weight.device
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 6, 7, 8]], device=device)
    training = model.training
    model.eval()
    hidden = [
        model.get_decoder()(input_ids=row[None], position_ids=positions, use_cache=False).last_hidden_state for row in ids
    ]
    model.train(training)
    if not torch.equal(hidden[0][:, 4:], hidden[1][:, 4:]):
        raise CapabilityError(
            f"packing: documents packed into one row see each other in the {name} ({type(model).__name__}, "
            f"attention {model.config._attn_implementation})",
            "Turn packing and padding_free off, or use attention that separates them (sdpa, flash_attention_2)",
        )
