"""Three families of small tasks that a program can make and check: instruction following, mathematics, code.

An example is a pure function of (seed, split, family, level, index): the stream has no end, and the splits share no task.
"""

from speckd.tasks.example import Example, Split
from speckd.tasks.families import FAMILIES, distinct, generate, stream, verify_all
from speckd.tasks.vocabulary import build_tokenizer

__all__ = ["FAMILIES", "Example", "Split", "build_tokenizer", "distinct", "generate", "stream", "verify_all"]
