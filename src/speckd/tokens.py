"""THE one-token shift, and who each supervised token is. Nobody else in the package shifts anything."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from speckd.types import IGNORED_LABEL, TokenKeys


@dataclass(frozen=True)
class TokenBatch:
    """Sequences to train on, all [B, L] int64.

    `labels`: the input ids where supervised, −100 elsewhere, *not* shifted; `sample_ids`: which sample of the data set a token
    belongs to (several in a row when packed); `position_ids`: position within that sample.
    """

    input_ids: Tensor
    labels: Tensor
    sample_ids: Tensor
    position_ids: Tensor


@dataclass(frozen=True)
class SupervisedRows:
    """The N positions that predict a supervised token.

    `index`: [N] into the flattened B·L positions whose hidden state predicts; `labels`: [N] the token that follows there;
    `keys`: sample and position *of the predicted token*.
    """

    index: Tensor
    labels: Tensor
    keys: TokenKeys

    def __len__(self) -> int:
        return self.index.numel()

    def rows(self, index: Tensor | slice) -> "SupervisedRows":
        """Some of them; views where `index` is a slice."""
        return SupervisedRows(self.index[index], self.labels[index], self.keys.rows(index))


def supervised_rows(batch: TokenBatch, seed: int = 0, epoch: int = 0) -> SupervisedRows:
    """Shifts by one: the hidden state at t predicts the token at t + 1, never across the border of two samples."""
    labels = batch.labels[:, 1:]
    same_sample = (batch.sample_ids[:, 1:] == batch.sample_ids[:, :-1]) & (batch.position_ids[:, 1:] > 0)
    sequence, position = ((labels != IGNORED_LABEL) & same_sample).nonzero(as_tuple=True)
    keys = TokenKeys(batch.sample_ids[sequence, position + 1], batch.position_ids[sequence, position + 1], seed, epoch)
    return SupervisedRows(sequence * batch.labels.shape[1] + position, labels[sequence, position], keys)


@dataclass(frozen=True)
class Sequence:
    """One sample's tokens in a batch, as any teacher must be asked about them: alone and unpadded.

    `token_ids`: [T]; `positions`: [n], where an answer is wanted, ascending: the one at t is about the token at t + 1; `rows`:
    [n], which of the batch's supervised rows those are. All int64, on the CPU.
    """

    token_ids: Tensor
    positions: Tensor
    rows: Tensor


def sequences(batch: TokenBatch, rows: SupervisedRows) -> Iterator[Sequence]:
    """Takes a batch apart, packed or padded on either side, into its samples that have a supervised token."""
    ids, samples, positions = batch.input_ids.cpu(), batch.sample_ids.cpu(), batch.position_ids.cpu()
    where, numbers = rows.index.cpu(), torch.arange(len(rows))
    width = ids.shape[1]
    for line in range(len(ids)):
        begins = torch.ones(width, dtype=torch.bool)
        begins[1:] = (samples[line, 1:] != samples[line, :-1]) | (positions[line, 1:] != positions[line, :-1] + 1)
        starts = begins.nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], width], strict=True):
            own = numbers[(where >= line * width + start) & (where < line * width + end)]
            if len(own):
                yield Sequence(ids[line, start:end], where[own] - line * width - start, own)


def token_batch(input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> TokenBatch:
    """A padded batch of one sample a row, numbered from 0: for loops that have no ids of their own. All [B, L].

    Positions count attended tokens, so padding on either side gives the same keys.
    """
    attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    positions = (attended.cumsum(-1) - 1).clamp(min=0)
    samples = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(input_ids)
    return TokenBatch(input_ids, labels.masked_fill(attended == 0, IGNORED_LABEL), samples, positions)
