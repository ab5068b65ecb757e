"""Teachers whose answer is at hand: hidden states and a head, logits, or a top-K."""

from dataclasses import dataclass

import torch
from torch import Tensor

from speckd.head import LMHead
from speckd.types import DenseSignal, TopKSignal


@dataclass(frozen=True)
class HiddenTeacher:
    """A teacher in this process: its logits are made chunk by chunk. `hidden`: [B·L, H]; `head`: on the shared vocabulary."""

    hidden: Tensor
    head: LMHead

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(torch.promote_types(self.hidden.dtype, self.head.weight.dtype), torch.float32)

    @property
    def vocabulary_size(self) -> int:
        return self.head.weight.shape[0]

    def write_logits(self, index: Tensor, out: Tensor) -> None:
        self.head.write(self.hidden[index], out)

    def logits_at(self, index: Tensor, token_ids: Tensor) -> Tensor:
        return self.head.at(self.hidden[index], token_ids)

    @torch.no_grad()
    def signal(self, index: Tensor) -> DenseSignal:
        logits = torch.empty(len(index), self.vocabulary_size, dtype=self.dtype, device=self.hidden.device)
        self.write_logits(index, logits)
        return DenseSignal(logits)


@dataclass(frozen=True)
class DenseTeacher:
    """Logits held in full, [M, V]: for small vocabularies and tests. `place`: [B·L], each position's row, if M is not B·L."""

    logits: Tensor
    place: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.logits.dtype, torch.float32)

    @property
    def vocabulary_size(self) -> int:
        return self.logits.shape[-1]

    def write_logits(self, index: Tensor, out: Tensor) -> None:
        out.copy_(self.logits[self._rows(index)])

    def logits_at(self, index: Tensor, token_ids: Tensor) -> Tensor:
        return self.logits[self._rows(index)[:, None], token_ids].to(self.dtype)

    def signal(self, index: Tensor) -> DenseSignal:
        return DenseSignal(self.logits[self._rows(index)].to(self.dtype))

    def _rows(self, index: Tensor) -> Tensor:
        return index if self.place is None else self.place[index]


@dataclass(frozen=True)
class TopKTeacher:
    """A top-K with a tail, [M, K] ids and log-probabilities, and [M] log-probabilities of the labels where known.

    `place`: [B·L], each position's row, if M is not B·L; `ranked`: as of `TopKSignal`.
    """

    token_ids: Tensor
    log_probs: Tensor
    label_log_probs: Tensor | None = None
    place: Tensor | None = None
    ranked: bool = True

    def signal(self, index: Tensor) -> TopKSignal:
        rows = index if self.place is None else self.place[index]
        return TopKSignal(self.token_ids, self.log_probs, self.label_log_probs, self.ranked).rows(rows)
