"""Which sequences a served teacher is asked about, and how often; what is told ahead to it, on several processes."""

from concurrent.futures import Future
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler

from speckd.collation import Wanted, question_about
from speckd.compatibility import SharedVocabulary
from speckd.lookahead import Lookahead
from speckd.teachers.answers import Answer
from speckd.teachers.served import ServedSource
from speckd.teachers.source import Question
from tests.teachers.toy import VOCABULARY, Toy

SHARED = SharedVocabulary(VOCABULARY)


class CountedPool:
    """Answers at once, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def ask(self, token_ids: torch.Tensor, positions: torch.Tensor) -> "Future[Answer]":
        self.asked.append(token_ids.tolist())
        future: Future[Answer] = Future()
        future.set_result(Toy().answer(token_ids.tolist(), positions.tolist(), 4))
        return future

    def gather(self, futures: Any) -> list[Answer]:
        return [future.result() for future in futures]


def question(*rows: int) -> Question:
    """A batch: each row a sequence of its own, by its number."""
    asked = [Wanted(torch.arange(6) + row, torch.tensor([1, 3]), row) for row in rows]
    return question_about(asked, SHARED, torch.device("cpu"))


def right(source: ServedSource, *rows: int) -> bool:
    """The answers to a batch are each row's own."""
    asked = question(*rows)
    found = source.launch(asked).rows().signal(asked.rows.index)
    wanted = [Toy().answer((torch.arange(6) + row).tolist(), [1, 3], 4).log_probs for row in rows]
    return torch.equal(found.log_probs, torch.cat(wanted))  # type: ignore[union-attr]


@pytest.fixture
def source() -> ServedSource:
    return ServedSource(CountedPool(), SHARED, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("expected", [(), ((1, 2), (2, 3)), ((1, 2), (2, 3), (4, 2))])
def test_equal_rows_of_a_step_are_asked_once_and_before_it(source: ServedSource, expected: tuple[tuple[int, ...], ...]) -> None:
    for rows in expected:
        source.expect(question(*rows))
    source.settle([question(1, 2), question(2, 3), question(2, 2)])
    asked = list(source.pool.asked)  # type: ignore[attr-defined]
    assert sorted(row[0] for row in asked) == [1, 2, 3, 4][: 4 if len(expected) > 2 else 3]
    assert right(source, 1, 2) and right(source, 2, 3) and right(source, 2, 2)
    assert source.pool.asked == asked  # type: ignore[attr-defined]


def test_what_was_settled_is_let_go_with_the_next_step(source: ServedSource) -> None:
    source.settle([question(1, 2)])
    source.settle([question(3)])
    assert right(source, 3) and len(source._settled) == 1 and not source._ahead


def test_a_lost_answer_is_asked_again(source: ServedSource) -> None:
    source.expect(question(1))
    (key,) = source._ahead
    source._ahead[key] = Future()
    source._ahead[key].set_exception(RuntimeError("gone"))
    with pytest.raises(RuntimeError, match="gone"):
        source.settle([question(1)])
    source.settle([question(1)])
    assert right(source, 1)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 20, 24, 25, 40])
@pytest.mark.parametrize("depth", [1, 4])
def test_only_what_a_process_will_see_is_told_to_it(rows: int, processes: int, depth: int) -> None:
    """An epoch as Accelerate deals it out: the last batches are filled up with the first rows."""
    dataset = Dataset.from_dict({"sample_ids": [[row] for row in range(rows)]})
    for process in range(processes):
        told: list[int] = []
        forgotten: list[int] = []
        ahead = Lookahead(
            dataset,
            "sample_ids",
            8,
            depth,
            process,
            processes,
            lambda some: told.extend(row["sample_ids"][0] for row in some),
            lambda: forgotten.append(len(told)),
        )
        for _ in range(2):
            told.clear()
            ahead.begin(list(range(rows)))
            seen: list[int] = []
            for batch in BatchSamplerShard(BatchSampler(range(rows), 8, drop_last=False), processes, process):
                ahead.collated([dataset[row] for row in batch])
                seen += batch
            assert set(told) <= set(seen) and len(told) == len(set(told))
            assert set(seen) - set(told) <= set(seen[:8]) | set(range(8 * processes)), "all but the first and what fills up"
        assert len(forgotten) == 2


def test_an_epochs_end_drops_what_was_expected_and_did_not_come(source: ServedSource) -> None:
    source.expect(question(1, 2))
    source.settle([question(1)])
    assert len(source._ahead) == 1
    source.forget_expected()
    assert not source._ahead and right(source, 2)
