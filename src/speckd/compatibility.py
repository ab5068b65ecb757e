"""Do student and teacher name tokens the same way? Checked once, before any model is loaded."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from speckd.errors import VocabularyError
from speckd.head import LMHead
from speckd.types import IGNORED_LABEL

logger = logging.getLogger(__name__)

#: Splits, digits, case, spaces, symbols, scripts: tokenizers with one vocabulary but other merges disagree on some of it.
_PROBE = "Once upon a time, 3 cats cost $12.50 each!\n\n  def f(xs):\n\treturn [x**2 for x in xs]  # Straße, 你好, naïve"
#: The same for a teacher whose tokenizer is elsewhere, as texts of several kinds.
PROBES = (_PROBE, "The quick brown fox jumps over the lazy dog.", "x = 3 * (4 + 17) - 20 // 7 == 61", " \n\t  ")


class Tokenizer(Protocol):
    """What is asked of a Transformers tokenizer."""

    def get_vocab(self) -> Mapping[str, int]: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class SharedVocabulary:
    """The axis that student and teacher share: the first `size` ids, or exactly `ids` ([size] int64, ascending) if not None.

    `teacher_only`: ids of the teacher's tokens that are not on it, since the student, or another teacher, lacks them. (Ids that
    name no token at all are padding.)
    """

    size: int
    ids: Tensor | None = None
    teacher_only: tuple[int, ...] = ()

    def same_axis(self, other: "SharedVocabulary") -> bool:
        if self.ids is None or other.ids is None:
            return self.ids is other.ids and self.size == other.size
        return torch.equal(self.ids, other.ids)

    def restrict(self, head: LMHead) -> LMHead:
        """The head's rows of the shared tokens: padding and tokens that only one side knows are gone, not masked."""
        return head.restricted(self.size if self.ids is None else self.ids)

    def labels(self, labels: Tensor) -> Tensor:
        """Token ids (or −100), any shape, as indices of the shared axis.

        Raises:
            VocabularyError: a label is a token that the teacher does not know, so it cannot be verified.
        """
        unknown = self.unknown(labels)
        if unknown.numel():
            times = f"{unknown.numel()} times in this batch"
            raise VocabularyError(
                f"token id {int(unknown[0])} stands in the data ({times}), unknown to the teacher",
                "Remove that token from the data or the chat template, or use a teacher that has it",
            )
        if self.ids is None:
            return labels
        places = torch.searchsorted(self.ids.to(labels.device), labels.clamp(min=0))
        return places.where(labels != IGNORED_LABEL, IGNORED_LABEL)

    def unknown(self, token_ids: Tensor) -> Tensor:
        """Those of the ids (any shape; −100 is none) that are not on the shared axis, [n]."""
        if self.ids is None:
            return token_ids[token_ids >= self.size]
        return token_ids[(token_ids != IGNORED_LABEL) & ~torch.isin(token_ids, self.ids.to(token_ids.device))]

    def outside(self, width: int) -> Tensor:
        """Ids of a head with `width` rows that are not on the shared axis: tokens of one side, and padding."""
        everything = torch.arange(width)
        return everything[self.size :] if self.ids is None else everything[~torch.isin(everything, self.ids)]


def shared_vocabulary(student: Tokenizer, teacher: Tokenizer, student_width: int, teacher_width: int) -> SharedVocabulary:
    """The tokens that both know, by identity: the same string under the same id.

    Args:
        student, teacher: tokenizers.
        student_width, teacher_width: rows of the two heads; what exceeds the tokenizer is padding.

    Raises:
        VocabularyError: a token has two ids, an id has two tokens, or the same text is cut differently.
    """
    require_same_tokens(student, teacher)
    own, other = student.get_vocab(), teacher.get_vocab()
    shared = sorted(i for token, i in own.items() if token in other and i < min(student_width, teacher_width))
    if not shared:
        raise VocabularyError(
            "no token that student and teacher share lies within both heads", "Check that tokenizers and models belong together"
        )
    size = len(shared)
    prefix = shared[-1] == size - 1
    if not student_width == teacher_width == size:
        logger.warning(
            "Vocabulary: the student's head has %s rows, the teacher's %s; distilling on the %s tokens that both know%s.",
            f"{student_width:,}",
            f"{teacher_width:,}",
            f"{size:,}",
            "" if prefix else " (not a prefix: the heads are copied)",
        )
    lost = tuple(sorted(i for token, i in other.items() if token not in own and i < teacher_width))
    return SharedVocabulary(size, None if prefix else torch.tensor(shared), lost)


def common_axis(axes: Sequence[SharedVocabulary]) -> list[SharedVocabulary]:
    """What several teachers share with one student: the tokens of all of them, the others of each among its `teacher_only`.

    Raises:
        VocabularyError: there is no such token.
    """
    held = [set(range(axis.size) if axis.ids is None else axis.ids.tolist()) for axis in axes]
    shared = sorted(set.intersection(*held))
    if not shared:
        raise VocabularyError("no token is known to the student and all teachers", "Use models with the same tokenizer")
    size, ids = len(shared), None if shared[-1] == len(shared) - 1 else torch.tensor(shared)
    if any(len(own) > size for own in held):
        logger.warning("Vocabulary: the teachers do not share the same tokens; distilling on the %s of all.", f"{size:,}")
    return [
        SharedVocabulary(size, ids, tuple(sorted({*axis.teacher_only, *(own - set(shared))})))
        for axis, own in zip(axes, held, strict=True)
    ]


def require_same_tokens(student: Tokenizer, teacher: Tokenizer) -> None:
    """Refuses tokenizers that give one token two ids, one id two tokens, or cut the same text differently."""
    _refuse_conflicts(student.get_vocab(), teacher.get_vocab())
    known = sorted(student.get_vocab().keys() & teacher.get_vocab().keys())  # a token of one side alone is no disagreement
    some = known[:: max(1, len(known) // 1000)]
    probes = [_PROBE, *(" ".join(some[i : i + 10]) for i in range(0, len(some), 10))]
    for probe in probes:
        own, other = (one.encode(probe, add_special_tokens=False) for one in (student, teacher))
        if own != other:
            raise VocabularyError(
                "student and teacher share token ids but cut the same text differently (other merges or normalisation): "
                f"{probe[:30]!r}… is {own[:6]}… in the student, {other[:6]}… in the teacher",
                "Use models of one family, with one tokenizer",
            )


def _refuse_conflicts(own: Mapping[str, int], other: Mapping[str, int]) -> None:
    moved = sorted((i, token, other[token]) for token, i in own.items() if token in other and other[token] != i)
    if moved:
        own_id, token, other_id = moved[0]
        raise VocabularyError(
            f"{len(moved):,} tokens have different ids, first {token!r}: {own_id} in the student, {other_id} in the teacher",
            "Use a student and a teacher with the same tokenizer; distilling across tokenizers is not supported",
        )
    names = {i: token for token, i in other.items()}
    renamed = sorted((i, token, names[i]) for token, i in own.items() if i in names and token not in other)
    if renamed:
        token_id, token, other_token = renamed[0]
        raise VocabularyError(
            f"{len(renamed):,} ids mean different tokens, first {token_id}: {token!r} in the student, "
            f"{other_token!r} in the teacher",
            "Use a student and a teacher with the same tokenizer (added special tokens included)",
        )
    if not own.keys() & other.keys():
        raise VocabularyError("student and teacher have no token in common", "Use models with the same tokenizer")
