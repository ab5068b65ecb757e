"""Teachers whose answer is at hand: hidden states and a head, logits, or a top-K."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from speckd.head import LMHead
from speckd.types import DenseSignal, TopKSignal


@dataclass(frozen=True)
class HiddenTeacher:
    """A teacher in this process: its logits are made chunk by chunk. `hidden`: [B·L, H]; `head`: on the shared vocabulary."""

    hidden: Tensor
    head: LMHead

    @cached_property
    def _head(self) -> LMHead:
        return self.head.widened()

    @torch.no_grad()
    def signal(self, index: Tensor) -> DenseSignal:
        return DenseSignal(self._head(self.hidden[index]))


@dataclass(frozen=True)
class DenseTeacher:
    """Logits held in full, [B·L, V]: for small vocabularies and tests."""

    logits: Tensor

    def signal(self, index: Tensor) -> DenseSignal:
        logits = self.logits[index]
        return DenseSignal(logits if logits.dtype == torch.float64 else logits.float())


@dataclass(frozen=True)
class TopKTeacher:
    """A top-K with a tail, [B·L, K] ids and log-probabilities, and [B·L] log-probabilities of the labels where known."""

    token_ids: Tensor
    log_probs: Tensor
    label_log_probs: Tensor | None = None

    def signal(self, index: Tensor) -> TopKSignal:
        return TopKSignal(self.token_ids, self.log_probs, self.label_log_probs).rows(index)
