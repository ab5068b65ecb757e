"""Answers sequence by sequence, as caches keep and servers give them, and how a batch of them is laid out for the engine."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from speckd.teachers.in_process import DenseTeacher, TopKTeacher
from speckd.tokens import Sequence
from speckd.types import TeacherRows


@dataclass(frozen=True)
class Answer:
    """What the teacher says of one sequence at n positions, on the vocabulary shared with the student, at temperature 1.

    `positions`: [n] int64, ascending: the entry at t is about the token at t + 1. `token_ids`: [n, K] int64, and None where
    `log_probs`, [n, V] then, is of the whole vocabulary; else it is [n, K], in float32, the most probable first.
    `label_log_probs`: [n], of the tokens that do follow, exact also outside the top-K. `ranked`: False where the K tokens were
    drawn at random, and log_probs are the logarithms of how often each was. `dropped`: [n], of an answer from a server, the
    probability that is seen to lie outside of the shared vocabulary: all of it where the whole vocabulary was asked for, whose
    log_probs are then known up to a shift, like logits; else what is listed among the most probable.
    """

    positions: Tensor
    token_ids: Tensor | None
    log_probs: Tensor
    label_log_probs: Tensor
    ranked: bool = True
    dropped: Tensor | None = None

    def at(self, positions: Tensor) -> "Answer":
        """Only those positions, [m], all of which must be there."""
        places = torch.searchsorted(self.positions, positions).clamp(max=max(0, len(self.positions) - 1))
        if not len(self.positions) or not torch.equal(self.positions[places], positions):
            raise KeyError("a position without an answer")
        ids = None if self.token_ids is None else self.token_ids[places]
        dropped = None if self.dropped is None else self.dropped[places]
        return Answer(positions, ids, self.log_probs[places], self.label_log_probs[places], self.ranked, dropped)


def rows_of(asked: Many[Sequence], answers: Many[Answer], index: Tensor, positions: int) -> TeacherRows:
    """The answers to a batch's sequences, for the engine.

    Args:
        asked: the batch's sequences, by `tokens.sequences`.
        answers: one each, with the positions asked for.
        index: [N] the supervised positions among the flattened ones; their device is where the answers go.
        positions: B·L, how many positions there are.
    """
    place = torch.zeros(positions, dtype=torch.int64)
    place[index.cpu()] = torch.arange(len(index))
    order = torch.cat([sequence.rows for sequence in asked])
    log_probs = _in_order([answer.log_probs for answer in answers], order, index.device)
    if answers[0].token_ids is None:
        return DenseTeacher(log_probs, place.to(index.device))
    ids = _in_order([answer.token_ids for answer in answers if answer.token_ids is not None], order, index.device)
    labels = _in_order([answer.label_log_probs for answer in answers], order, index.device)
    return TopKTeacher(ids, log_probs, labels, place.to(index.device), answers[0].ranked)


def _in_order(parts: Many[Tensor], order: Tensor, device: torch.device) -> Tensor:
    whole = torch.cat(list(parts))
    return torch.empty_like(whole).index_copy_(0, order, whole).to(device)
