"""Which sample every token belongs to, carried from the data set through truncation, packing and padding to the loss."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import pack_dataset

from speckd.compatibility import SharedVocabulary
from speckd.errors import CapabilityError, DataError, VocabularyError
from speckd.teachers.source import Question
from speckd.tokens import TokenBatch, supervised_rows, token_batch
from speckd.trl_internals import DataCollatorForLanguageModeling
from speckd.types import IGNORED_LABEL

logger = logging.getLogger(__name__)

SAMPLE = "sample_ids"
TEACHER = "teacher_numbers"  # where several teachers share the samples: whose each token is
EXAMPLE = "example_index"  # which of the batch's rows of the data set a token came from
_ROWS_AT_ONCE = 1_000


@dataclass(frozen=True)
class DroppedRows:
    """Rows that lost every supervised token when cut to `max_length`. `rows`: their numbers, from 1; `total`: of how many."""

    rows: list[int]
    total: int

    def __str__(self) -> str:
        first = ", ".join(map(str, self.rows[:5])) + (", …" if len(self.rows) > 5 else "")
        return f"{len(self.rows)} of {self.total} rows (row {first}) have no supervised token left within max_length"


def number_rows(dataset: Dataset) -> Dataset:
    if SAMPLE in dataset.column_names:
        dataset = dataset.remove_columns(SAMPLE)
    return dataset.add_column(SAMPLE, list(range(len(dataset))))


def number_teachers(dataset: Dataset, column: str, names: Sequence[str], data_name: str) -> Dataset:
    """Adds each row's teacher by its number among `names`.

    Raises:
        DataError: there is no such column, or a row names no teacher.
    """
    if column not in dataset.column_names:
        raise DataError(
            f"{data_name}: there is no column '{column}' (teacher_route_column)", f"There is: {', '.join(dataset.column_names)}"
        )
    numbers = {name: number for number, name in enumerate(names)}
    values = list(map(str, dataset[column]))
    for row, value in enumerate(values, 1):
        if value not in numbers:
            fix = f"Give one of {', '.join(names)}, or add it to teachers"
            raise DataError(f"{data_name}: row {row}: {column} is '{value[:60]}', which is no teacher", fix)
    if TEACHER in dataset.column_names:
        dataset = dataset.remove_columns(TEACHER)
    return dataset.add_column(TEACHER, [numbers[value] for value in values])


def keep_supervised(prepared: Dataset, total: int, name: str, max_length: int | None) -> tuple[Dataset, DroppedRows]:
    """After tokenisation and truncation: the rows with something to learn, and what was lost, said once.

    Raises:
        DataError: nothing is left to learn from.
    """
    prepared = prepared.filter(_is_supervised, desc=f"Keeping supervised rows of the {name} data")
    kept = set(prepared[SAMPLE])
    dropped = DroppedRows([row + 1 for row in range(total) if row not in kept], total)
    fix = f"Raise max_length (now {max_length}), or check that completions or assistant turns are not empty"
    if not kept:
        raise DataError(f"the {name} data has no supervised token: {dropped}", fix)
    if dropped.rows:
        logger.warning("%s data: %s; they are left out. %s.", name, dropped, fix)
    return prepared, dropped


def longest_row(prepared: Dataset, name: str, max_length: int | None) -> int:
    """Tokens of the longest row; says how many rows reach the limit, and so may have lost their end."""
    tables = prepared.with_format("arrow").iter(10_000)  # lengths alone: the tokens stay where they are
    lengths = [n for table in tables for n in table["input_ids"].combine_chunks().value_lengths().to_pylist()]
    cut = sum(length == max_length for length in lengths)
    if cut:
        logger.warning(
            "%s data: %d of %d rows are cut at max_length (%s), or just as long.", name, cut, len(lengths), max_length
        )
    return max(lengths)


def _is_supervised(row: dict[str, Any]) -> bool:
    """Is there a token to predict? Nothing predicts a sample's first one."""
    return any(label != IGNORED_LABEL for label in row["labels"][1:])


def spread_sample_ids(prepared: Dataset, packing: bool, max_length: int | None, strategy: str) -> Dataset:
    """One sample id (and teacher's number) a token, so that it is cut and packed like the tokens."""
    of_tokens = [name for name in (SAMPLE, TEACHER) if name in prepared.column_names]
    prepared = prepared.map(
        lambda row: {name: [row[name]] * len(row["input_ids"]) for name in of_tokens},
        desc="Numbering samples",
    ).select_columns(["input_ids", "labels", *of_tokens])
    return pack_dataset(prepared, max_length, strategy) if packing else prepared


@dataclass(frozen=True)
class Wanted:
    """One sequence of a data set, [T] token ids, and where a teacher is asked about it, [n] positions: at t about the token at
    t + 1. `row`: of the data set, from 1, for messages; `teacher`: the number of its own, where several share the samples."""

    token_ids: Tensor
    positions: Tensor
    row: int
    teacher: int | None = None


def sequences_in(dataset: Dataset) -> Iterator[Wanted]:
    """A prepared data set, packed or not, taken apart into its samples: some rows at a time, whose tokens are held together."""
    for table in dataset.with_format("arrow").iter(_ROWS_AT_ONCE):
        lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        ids, labels, samples = (_flat(table[column]) for column in ("input_ids", "labels", SAMPLE))
        begins = np.zeros(len(ids), dtype=bool)
        begins[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        begins[1:] |= samples[1:] != samples[:-1]
        starts = np.flatnonzero(begins)
        asked = np.flatnonzero((labels[1:] != IGNORED_LABEL) & ~begins[1:])  # nothing predicts a sample's first token
        owners = np.searchsorted(starts, asked, side="right") - 1
        sizes, counts = np.diff(np.append(starts, len(ids))), np.bincount(owners, minlength=len(starts))
        tokens, positions = torch.from_numpy(ids), torch.from_numpy(asked - starts[owners])
        of_tokens, of_positions = tokens.split(sizes.tolist()), positions.split(counts.tolist())
        rows = (samples[starts] + 1).tolist()
        teachers = _flat(table[TEACHER])[starts].tolist() if TEACHER in table.column_names else [None] * len(starts)
        for one in map(Wanted, of_tokens, of_positions, rows, teachers):
            if len(one.positions):
                yield one


def _flat(column: Any) -> npt.NDArray[np.int64]:
    """All numbers of an Arrow column of lists, one after the other; a copy."""
    return np.array(column.combine_chunks().flatten(), dtype=np.int64)


def distinct(wanted: Iterable[Wanted]) -> list[Wanted]:
    """Each sequence once, where it first stands, with the positions of all its masks."""
    found: dict[bytes, Wanted] = {}
    for one in wanted:
        key = blake2b(one.token_ids.numpy().tobytes(), digest_size=16).digest()  # of the tokens, which are many
        known = found.get(key)
        found[key] = one if known is None else replace(known, positions=torch.cat([known.positions, one.positions]).unique())
    return list(found.values())


def question_about(asked: Sequence[Wanted], vocabulary: SharedVocabulary, device: torch.device) -> Question:
    """Some sequences as one batch, padded on the right, on a device; its samples are numbered from 0."""
    labels = [torch.full_like(one.token_ids, IGNORED_LABEL) for one in asked]
    for target, one in zip(labels, asked, strict=True):
        target[one.positions + 1] = one.token_ids[one.positions + 1]
    tokens = pad_sequence([one.token_ids for one in asked], batch_first=True).to(device)
    mask = pad_sequence([torch.ones_like(one.token_ids) for one in asked], batch_first=True).to(device)
    targets = pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL).to(device)
    batch = token_batch(tokens, vocabulary.labels(targets), mask)
    numbers = [-1 if one.teacher is None else one.teacher for one in asked]
    teachers = torch.tensor(numbers, device=device)[:, None].where(mask == 1, -1) if max(numbers) >= 0 else None
    return Question({"input_ids": tokens, "attention_mask": mask}, batch, supervised_rows(batch), teachers)


def require_known_tokens(dataset: Dataset, vocabulary: SharedVocabulary, name: str) -> None:
    """Refuses data with tokens that the teacher does not have, before the first step; names the first row."""
    for table in dataset.with_format("arrow").iter(10_000):
        used = {i for column in ("input_ids", "labels") for i in table[column].combine_chunks().flatten().unique().to_pylist()}
        unknown = vocabulary.unknown(torch.tensor(sorted(used)))
        if not unknown.numel():
            continue
        token = int(unknown[0])
        rows = zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), table[SAMPLE].to_pylist(), strict=True)
        row = next(sample for row in rows for i, label, sample in zip(*row, strict=True) if token in (i, label))
        raise VocabularyError(
            f"the {name} data: row {row + 1} holds token id {token}, which the teacher does not have",
            "Remove that token from the data or the chat template, or use a teacher that has it",
        )


class SampleCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with `sample_ids`, `example_index` and, where several teachers share the samples, `teacher_numbers`
    ([B, L], −1 in the padding) beside the rest."""

    def torch_call(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(list(examples))
        of_tokens = {
            name: [torch.tensor(example[name]) for example in examples] for name in (SAMPLE, TEACHER) if name in examples[0]
        }
        of_tokens[EXAMPLE] = [torch.full_like(sample, i) for i, sample in enumerate(of_tokens[SAMPLE])]
        return {**batch, **{name: self._like(batch["input_ids"], pieces) for name, pieces in of_tokens.items()}}

    def _like(self, ids: Tensor, pieces: list[Tensor]) -> Tensor:
        """One piece a row of `ids`, or all in its only row where there is no padding."""
        whole = torch.full_like(ids, -1)
        for row, piece in enumerate([torch.cat(pieces)] if self.padding_free else pieces):
            whole[row, : len(piece)] = piece
        return whole


def mask_repeated(batch: dict[str, Any], real: int) -> None:
    """Takes the labels from all but the first `real` examples of a batch: the others only fill it up."""
    batch["labels"] = batch["labels"].masked_fill(batch[EXAMPLE] >= real, IGNORED_LABEL)


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
