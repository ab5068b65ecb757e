"""What an example is, and which split it belongs to."""

import hashlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Example:
    """One task. `prompt` and `completion` are space-separated words of the families' vocabulary.

    `core`: what is asked, without the random wording: it decides the split. `answer`: what a right completion must give, in
    the family's own terms (a list of words, a number, or pairs of input and output).
    """

    family: str
    level: int
    core: str
    prompt: str
    completion: str
    answer: object


def split_of(core: str) -> Split:
    """A tenth of all tasks each for test and validation, by a hash of what is asked: no task is in two splits."""
    bucket = hashlib.blake2b(core.encode(), digest_size=8).digest()[0] % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"
