"""THE one-token shift, and who each supervised token is. Nobody else in the package shifts anything."""

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


def supervised_rows(batch: TokenBatch, seed: int = 0, epoch: int = 0) -> SupervisedRows:
    """Shifts by one: the hidden state at t predicts the token at t + 1, never across the border of two samples."""
    labels = batch.labels[:, 1:]
    same_sample = (batch.sample_ids[:, 1:] == batch.sample_ids[:, :-1]) & (batch.position_ids[:, 1:] > 0)
    sequence, position = ((labels != IGNORED_LABEL) & same_sample).nonzero(as_tuple=True)
    keys = TokenKeys(batch.sample_ids[sequence, position + 1], batch.position_ids[sequence, position + 1], seed, epoch)
    return SupervisedRows(sequence * batch.labels.shape[1] + position, labels[sequence, position], keys)


def token_batch(input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> TokenBatch:
    """A padded batch of one sample a row, numbered from 0: for loops that have no ids of their own. All [B, L].

    Positions count attended tokens, so padding on either side gives the same keys.
    """
    attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    positions = (attended.cumsum(-1) - 1).clamp(min=0)
    samples = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(input_ids)
    return TokenBatch(input_ids, labels.masked_fill(attended == 0, IGNORED_LABEL), samples, positions)
