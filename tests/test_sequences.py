"""A prepared data set taken apart: the same sequences as reading it row by row, and each once."""

import random
from collections.abc import Iterator
from itertools import groupby

import pytest
import torch
from datasets import Dataset

from speckd import collation
from speckd.collation import SAMPLE, TEACHER, distinct, sequences_in
from speckd.types import IGNORED_LABEL

Plain = tuple[list[int], list[int], int, int | None]


def prepared(rows: int, seed: int, teachers: bool) -> Dataset:
    """Rows of none to four samples, of which some are repeated under another mask, and some have nothing to learn."""
    draw, made, number = random.Random(seed), [], 0
    texts = [[draw.randrange(50) for _ in range(draw.choice((1, 2, 3, 9)))] for _ in range(rows)]
    for _ in range(rows):
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], SAMPLE: [], **({TEACHER: []} if teachers else {})}
        for _ in range(draw.randrange(5)):
            text = draw.choice(texts)
            row["input_ids"] += text
            row["labels"] += [draw.choice((token, IGNORED_LABEL)) for token in text]
            row[SAMPLE] += [number] * len(text)
            if teachers:
                row[TEACHER] += [number % 3] * len(text)
            number += 1
        made.append(row)
    return Dataset.from_list(made)


def one_by_one(dataset: Dataset) -> Iterator[Plain]:
    for row in dataset:
        for sample, tokens in groupby(range(len(row["input_ids"])), key=lambda i: row[SAMPLE][i]):
            places = list(tokens)
            asked = [i - places[0] - 1 for i in places[1:] if row["labels"][i] != IGNORED_LABEL]
            if asked:
                teacher = row[TEACHER][places[0]] if TEACHER in row else None
                yield [row["input_ids"][i] for i in places], asked, sample + 1, teacher


@pytest.mark.parametrize("teachers", [False, True])
@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_the_same_as_row_by_row(at_once: int, teachers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collation, "_ROWS_AT_ONCE", at_once)
    for seed in range(5):
        dataset = prepared(20, seed, teachers)
        for some in (dataset, dataset.select(range(0, 20, 3)), dataset.select([])):
            found = [(x.token_ids.tolist(), x.positions.tolist(), x.row, x.teacher) for x in sequences_in(some)]
            assert found == list(one_by_one(some))
            assert all(x.token_ids.dtype is x.positions.dtype is torch.int64 for x in sequences_in(some))


def test_each_sequence_once_where_it_first_stands_with_all_its_masks() -> None:
    dataset = prepared(60, 1, teachers=False)
    wanted: dict[tuple[int, ...], tuple[set[int], int]] = {}
    for ids, positions, row, _ in one_by_one(dataset):
        asked, first = wanted.setdefault(tuple(ids), (set(), row))
        wanted[tuple(ids)] = asked | set(positions), first
    found = distinct(sequences_in(dataset))
    assert len(found) < sum(1 for _ in sequences_in(dataset))
    assert [(tuple(x.token_ids.tolist()), (set(x.positions.tolist()), x.row)) for x in found] == list(wanted.items())
    assert all(x.positions.tolist() == sorted(set(x.positions.tolist())) for x in found)
