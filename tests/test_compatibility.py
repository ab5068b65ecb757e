"""One axis for two vocabularies: padding is cut, tokens that one side lacks are left out, conflicts are refused."""

import logging
from dataclasses import dataclass

import pytest
import torch

from speckd import LMHead, Objective, distillation_loss
from speckd.compatibility import SharedVocabulary, shared_vocabulary
from speckd.errors import VocabularyError
from speckd.teachers import HiddenTeacher
from speckd.tokens import SupervisedRows
from speckd.types import TokenKeys


@dataclass(frozen=True)
class WordTokenizer:
    """Tokens of one word each; unknown words are token 0."""

    vocabulary: dict[str, int]

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.vocabulary.get(word, 0) for word in text.split()]


def words(count: int) -> dict[str, int]:
    return {f"w{i}": i for i in range(count)}


def heads(student_width: int, teacher_width: int) -> tuple[LMHead, LMHead]:
    generator = torch.Generator().manual_seed(0)
    return tuple(LMHead(torch.randn(width, 2, generator=generator)) for width in (student_width, teacher_width))  # type: ignore[return-value]


class Kept(logging.Handler):
    """Lines as they are said, whatever a command line in another test did to the loggers above."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_qwen_widths_just_work_with_one_line() -> None:
    """151,936 against 152,064 rows over 151,665 tokens: the loss is that of the real tokens, junk in the padding or not."""
    tokenizer, kept = WordTokenizer(words(151_665)), Kept()
    logger = logging.getLogger("speckd.compatibility")
    logger.addHandler(kept)
    shared = shared_vocabulary(tokenizer, tokenizer, 151_936, 152_064)
    logger.removeHandler(kept)
    assert kept.lines == [
        "Vocabulary: the student's head has 151,936 rows, the teacher's 152,064; "
        "distilling on the 151,665 tokens that both know."
    ]
    student, teacher = heads(151_936, 152_064)
    hidden = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    index = torch.arange(3)
    rows = SupervisedRows(index, torch.tensor([0, 65_536, 151_664]), TokenKeys(index, index))

    def loss(own: LMHead, other: LMHead) -> torch.Tensor:
        return distillation_loss(Objective(), hidden, own, HiddenTeacher(hidden, other), rows).sum

    junk = [LMHead(head.weight.clone()) for head in (student, teacher)]
    for head in junk:
        head.weight[151_665:] = 1e4
    real = [LMHead(head.weight[:151_665]) for head in (student, teacher)]
    assert torch.equal(loss(*map(shared.restrict, junk)), loss(*real))
    assert shared.restrict(student).weight.data_ptr() == student.weight.data_ptr()  # a view: nothing is copied


def test_a_token_that_one_side_lacks_is_left_out_and_refused_as_label() -> None:
    own, other = words(8), {word: i for word, i in words(8).items() if i != 3}
    shared = shared_vocabulary(WordTokenizer(own), WordTokenizer(other), 8, 8)
    assert shared.size == 7 and shared.ids is not None and shared.ids.tolist() == [0, 1, 2, 4, 5, 6, 7]
    student, _ = heads(8, 8)
    assert torch.equal(shared.restrict(student).weight, student.weight[[0, 1, 2, 4, 5, 6, 7]])
    assert shared.labels(torch.tensor([[0, 4, -100, 7]])).tolist() == [[0, 3, -100, 6]]
    with pytest.raises(VocabularyError, match="token id 3 stands in the data"):
        shared.labels(torch.tensor([3]))


def test_labels_beyond_the_shared_tokens_are_refused() -> None:
    assert SharedVocabulary(5).labels(torch.tensor([4, -100])).tolist() == [4, -100]
    with pytest.raises(VocabularyError, match=r"token id 5 stands in the data \(2 times"):
        SharedVocabulary(5).labels(torch.tensor([5, 0, 5]))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"w0": 1, "w1": 0, "w2": 2}, "2 tokens have different ids, first 'w0': 0 in the student, 1 in the teacher"),
        ({"w0": 0, "x": 1, "w2": 2}, "1 ids mean different tokens, first 1: 'w1' in the student, 'x' in the teacher"),
        ({"x": 7, "y": 8}, "no token in common"),
    ],
)
def test_conflicts_are_refused_with_the_first_one_named(other, said) -> None:
    with pytest.raises(VocabularyError) as caught:
        shared_vocabulary(WordTokenizer(words(3)), WordTokenizer(other), 3, 9)
    assert said in str(caught.value) and "same token" in str(caught.value)
