"""What a store of the teacher's answers keeps of each, and in how many bytes."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from speckd.errors import StoreError
from speckd.types import Capabilities

#: Of a whole vocabulary at 16 bits, so many of a row's most probable tokens keep their order exactly.
FULL_ORDERED = 32
#: Of a sequence, whatever its length: the record's header and the index entry.
SEQUENCE_BYTES = 88


class Kind(StrEnum):
    """Which tokens' log-probabilities are kept: the K most probable, S drawn at random, or all."""

    TOP_K = "top_k"
    SAMPLED = "sampled"
    FULL = "full"


class Compression(StrEnum):
    """Of a record, after its bytes were sorted by significance."""

    NONE = "none"
    ZLIB = "zlib"


@dataclass(frozen=True)
class Layout:
    """The same for all records of a store.

    `width`: K: how many tokens of a position (at most, where they are drawn; V, where it is all); `precision`: 16 or 32 bits a
    log-probability (drawn tokens keep their counts, which are exact); `draws`: S, of drawn tokens only, else 0.
    """

    kind: Kind
    vocabulary_size: int
    width: int
    precision: int = 16
    compression: Compression = Compression.NONE
    draws: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.vocabulary_size <= 2**31:
            raise StoreError(f"vocabulary_size is {self.vocabulary_size}", "Give the number of shared tokens, 1 or more")
        if not 1 <= self.width <= self.vocabulary_size:
            raise StoreError(
                f"the cache is to hold {self.width} tokens of a vocabulary of {self.vocabulary_size}",
                f"Ask for 1 to {self.vocabulary_size}",
            )
        if self.kind is Kind.FULL and self.width != self.vocabulary_size:
            raise StoreError("a full cache holds the whole vocabulary", f"Set its width to {self.vocabulary_size}")
        if self.precision not in (16, 32):
            raise StoreError(f"precision is {self.precision} bits", "Choose 16 or 32")
        if (self.kind is Kind.SAMPLED) != (self.draws > 0) or self.draws > 2**32 - 1:
            raise StoreError(f"a {self.kind} cache with {self.draws} draws", "Give draws for sampled tokens, and only there")

    @property
    def id_bits(self) -> int:
        """Of a token id: as wide as the vocabulary needs."""
        return (self.vocabulary_size - 1).bit_length()

    @property
    def count_bytes(self) -> int:
        """Of one drawn token's count."""
        return 1 if self.draws < 2**8 else 2 if self.draws < 2**16 else 4

    @property
    def exact_top_k(self) -> int:
        """Up to which k the verdicts of the greedy top-k gate are those of the teacher itself."""
        match self.kind:
            case Kind.SAMPLED:
                return 0
            case Kind.TOP_K:
                return self.width
            case Kind.FULL:
                return self.width if self.precision == 32 else min(self.width, FULL_ORDERED)

    @property
    def capabilities(self) -> Capabilities:
        """What a teacher that is kept like this can be asked."""
        if self.kind is Kind.FULL:
            return Capabilities(exact_top_k=self.exact_top_k if self.exact_top_k < self.vocabulary_size else None)
        return Capabilities(self.width, self.kind is Kind.TOP_K)

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, as a run's settings name it, as far as answers depend on it."""
        match self.kind:
            case Kind.SAMPLED:  # counts, which are exact in any case
                own = {"teacher_cache_samples": self.draws}
            case Kind.TOP_K:
                own = {"teacher_top_k": self.width, "teacher_cache_bits": self.precision}
            case Kind.FULL:
                own = {"teacher_cache_bits": self.precision}
        return {"teacher_cache_kind": str(self.kind), **own}

    def bytes_per_token(self) -> float:
        """Of one answered position, uncompressed; an upper bound for drawn tokens, of which a row may have fewer."""
        fixed = 4 + 1 / 8  # the label's log-probability, and one bit that says the position is there
        match self.kind:
            case Kind.SAMPLED:
                return fixed + 4 + self.width * (self.id_bits / 8 + self.count_bytes)
            case Kind.TOP_K:
                return fixed + self.width * (self.id_bits + self.precision) / 8
            case Kind.FULL:
                return fixed + self.width * self.precision / 8

    def estimated_bytes(self, sequences: int, tokens: int, answers: int) -> int:
        """Of a whole store, uncompressed: of `sequences`, `tokens` in all, of which `answers` are answered."""
        return round(sequences * SEQUENCE_BYTES + (tokens - answers) / 8 + answers * self.bytes_per_token())
