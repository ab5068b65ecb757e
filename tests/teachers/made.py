"""Sequences with a teacher's answers, made on the spot, and stores of them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from speckd.teachers.answers import Answer
from speckd.teachers.draws import answer_of_draws
from speckd.teachers.files import Files
from speckd.teachers.layout import Compression, Kind, Layout
from speckd.teachers.record import sequence_key
from speckd.teachers.store import Store, StoreWriter

#: How many random faults of each sort: 2,000 corruptions and 200 kills are the release's.
FAULTS = int(os.environ.get("SPECKD_FAULTS", "40"))
#: 1: every bit and every length of the small shard; larger: one in so many, spread evenly.
STRIDE = int(os.environ.get("SPECKD_STRIDE", "37"))
PROVENANCE = {"teacher": "a teacher", "weights": "0f", "revision": None, "dtype": "float32", "temperature": 1.0}
Entry = tuple[Tensor, Answer]


def teacher_log_probs(
    rows: int, vocabulary: int, generator: torch.Generator, scale: float = 3.0, ties: bool = False, holes: bool = False
) -> Tensor:
    """[n, V] float32, with equal values and with −inf on demand."""
    logits = scale * torch.randn(rows, vocabulary, generator=generator)
    if ties:
        logits = (logits * 2).round() / 2
    if holes and vocabulary > 1:
        logits[:, 1:][torch.rand(rows, vocabulary - 1, generator=generator) < 0.5] = -torch.inf
    return logits.log_softmax(-1)


def answered(layout: Layout, token_ids: Tensor, positions: Tensor, log_probs: Tensor, generator: torch.Generator) -> Answer:
    """What a teacher with these log-probabilities, [n, V], answers in that layout."""
    labels = log_probs.gather(-1, token_ids[positions + 1][:, None])[:, 0]
    if layout.kind is Kind.FULL:
        return Answer(positions, None, log_probs, labels)
    if layout.kind is Kind.TOP_K:
        top = log_probs.topk(layout.width)
        return Answer(positions, top.indices, top.values, labels)
    few = log_probs.topk(layout.width)  # no more distinct ones than fit
    draws = torch.zeros(0, layout.draws, dtype=torch.int64)
    if len(positions):
        draws = torch.multinomial(few.values.exp() + 1e-9, layout.draws, replacement=True, generator=generator)
    return answer_of_draws(positions, few.indices.gather(-1, draws), labels, layout)


def entries(
    layout: Layout, lengths: Sequence[int], seed: int = 0, ties: bool = False, holes: bool = False, share: float = 0.7
) -> list[Entry]:
    """One sequence of each length, answered at some of its positions; their first tokens tell them apart."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, length in enumerate(lengths):
        token_ids = torch.randint(layout.vocabulary_size, (length,), generator=generator)
        if length:
            token_ids[0] = number % layout.vocabulary_size
        positions = (torch.rand(max(0, length - 1), generator=generator) < share).nonzero()[:, 0]
        log_probs = teacher_log_probs(len(positions), layout.vocabulary_size, generator, ties=ties, holes=holes)
        made.append((token_ids, answered(layout, token_ids, positions, log_probs, generator)))
    return made


def planned(made: Sequence[Entry], shards: int) -> list[list[Entry]]:
    size = -(-len(made) // shards) if made else 0
    return [list(made[size * number : size * (number + 1)]) for number in range(shards)]


def keys(parts: Sequence[Sequence[Entry]]) -> list[list[bytes]]:
    return [[sequence_key(token_ids) for token_ids, _ in part] for part in parts]


def capture(folder: Path, layout: Layout, parts: Sequence[Sequence[Entry]], files: Files | None = None) -> StoreWriter:
    """Begins or resumes, and finishes."""
    writer = StoreWriter.open(folder, layout, PROVENANCE, keys(parts), files)
    for number in writer.missing():
        writer.write(number, iter(parts[number]))
    writer.publish()
    return writer


def stored(folder: Path, layout: Layout, made: Sequence[Entry], shards: int = 1) -> Store:
    capture(folder, layout, planned(made, shards))
    return Store.open(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(a: Answer, b: Answer) -> bool:
    """To the bit."""
    ids = a.token_ids is b.token_ids is None or (
        a.token_ids is not None and b.token_ids is not None and torch.equal(a.token_ids, b.token_ids)
    )
    return (
        ids
        and a.ranked == b.ranked
        and torch.equal(a.positions, b.positions)
        and torch.equal(a.log_probs, b.log_probs)
        and torch.equal(a.label_log_probs, b.label_log_probs)
    )


def layouts(vocabulary: int = 50, width: int = 8) -> Iterator[Layout]:
    """One of every sort."""
    for compression in Compression:
        for precision in (16, 32):
            yield Layout(Kind.TOP_K, vocabulary, width, precision, compression)
            yield Layout(Kind.FULL, vocabulary, vocabulary, precision, compression)
        yield Layout(Kind.SAMPLED, vocabulary, width, 16, compression, draws=12)
