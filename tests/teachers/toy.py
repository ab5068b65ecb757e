"""A language model whose distributions are drawn from a hash of what came before: exact, and another for another seed."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from speckd.teachers.answers import Answer

VOCABULARY = 64


@lru_cache(maxsize=200_000)
def _row(seed: int, before: tuple[int, ...], size: int) -> np.ndarray:
    """[V] log-probabilities in float64."""
    key = hashlib.blake2b(repr((seed, before)).encode(), digest_size=16).digest()
    logits = 3 * np.random.Generator(np.random.Philox(key=int.from_bytes(key))).standard_normal(size)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


@dataclass(frozen=True)
class Toy:
    """`size`: the model's vocabulary, which may be larger than the shared one."""

    seed: int = 0
    size: int = VOCABULARY

    def log_probs(self, tokens: list[int], position: int) -> np.ndarray:
        """[V] of the token after `position`."""
        return _row(self.seed, tuple(tokens[: position + 1]), self.size)

    def answer(self, tokens: list[int], positions: list[int], top_k: int | None, shared: int = VOCABULARY) -> Answer:
        """What any source has to answer for this model; None for the whole vocabulary."""
        rows = np.stack([self.log_probs(tokens, position) for position in positions])
        labels = torch.tensor([row[tokens[position + 1]] for row, position in zip(rows, positions, strict=True)]).float()
        rows = rows[:, :shared]
        if top_k is None:
            return Answer(torch.tensor(positions), None, torch.tensor(rows).float(), labels)
        ids = np.argsort(-rows, axis=-1)[:, :top_k]
        top = torch.tensor(np.take_along_axis(rows, ids, -1)).float()
        return Answer(torch.tensor(positions), torch.tensor(ids), top, labels)


def tokenized(text: str) -> list[int]:
    return [ord(letter) % VOCABULARY for letter in text]


def same(one: Answer, other: Answer) -> bool:
    """To the last bit."""
    pairs = [(one.positions, other.positions), (one.log_probs, other.log_probs), (one.label_log_probs, other.label_log_probs)]
    if one.token_ids is not None and other.token_ids is not None:
        pairs.append((one.token_ids, other.token_ids))
    known = (one.token_ids is None) == (other.token_ids is None)
    return known and all(torch.equal(a, b) for a, b in pairs)
