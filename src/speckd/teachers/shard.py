"""A file of records that never changes once it has its name. Every byte of it stands under a checksum.

Header (64 bytes, with its own digest), records one after the other, index (key, length and digest of each), footer (136 bytes:
totals, the digests of header and index, its own). The footer's digest therefore vouches for the whole file, and is what the
store's manifest names. Digests are BLAKE2b-128; numbers are little-endian.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from speckd.errors import StoreError
from speckd.teachers.answers import Answer
from speckd.teachers.codes import Rounding
from speckd.teachers.files import Files, named, publish
from speckd.teachers.layout import Compression, Kind, Layout
from speckd.teachers.record import encode, sequence_key

VERSION = 1
_MAGIC, _END = b"speckdTA", b"TAspeckd"
_KINDS, _COMPRESSIONS = list(Kind), list(Compression)
#: Magic, version, kind, precision, compression; vocabulary, K, draws, number of the shard; the plan's digest.
_HEADER = struct.Struct("<8sHBBB3xIIII16s")
#: Magic; where the index starts; the file's length; sequences, tokens, answers; rounding; digests of header and index.
_FOOTER = struct.Struct("<8sQQQQQddddQ16s16s")
_DIGEST = 16
_INDEX = np.dtype([("key", "V16"), ("length", "<u8"), ("digest", "V16")])
_FIX = "Delete this file and run `speckd cache` again: it makes what is missing"

Entry: TypeAlias = tuple[Tensor, Answer]


def digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_DIGEST).digest()


@dataclass(frozen=True)
class Totals:
    """Of a shard or a store. `tokens`: of the sequences; `answers`: positions that are answered; `size`: bytes."""

    sequences: int = 0
    tokens: int = 0
    answers: int = 0
    size: int = 0
    rounding: Rounding = field(default_factory=Rounding)

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            self.sequences + other.sequences,
            self.tokens + other.tokens,
            self.answers + other.answers,
            self.size + other.size,
            self.rounding + other.rounding,
        )


def write_shard(
    files: Files, path: Path, layout: Layout, plan: bytes, number: int, keys: Sequence[bytes], entries: Iterable[Entry]
) -> None:
    """Publishes a shard of exactly these sequences, in this order. To be called in `files.alone`.

    Raises:
        StoreError: an answer that does not fit, a sequence that is not the planned one, or a file that cannot be written.
    """
    publish(files, path, _parts(path, layout, plan, number, keys, entries))


def _parts(
    path: Path, layout: Layout, plan: bytes, number: int, keys: Sequence[bytes], entries: Iterable[Entry]
) -> Iterator[bytes]:
    header = _header(layout, plan, number)
    yield header
    index, totals = np.zeros(len(keys), dtype=_INDEX), Totals(size=len(header))
    for token_ids, answer in entries:
        place = totals.sequences
        if place == len(keys) or sequence_key(token_ids) != keys[place]:
            raise StoreError(
                f"{path}: sequence {place} that was captured is not the one that was planned",
                "Delete the cache's folder and run `speckd cache` again",
            )
        record = encode(token_ids, answer, layout)
        yield record.data
        index[place] = keys[place], len(record.data), digest(record.data)
        totals += Totals(1, record.tokens, record.answers, len(record.data), record.rounding)
    if totals.sequences != len(keys):
        raise StoreError(
            f"{path}: {totals.sequences} of {len(keys)} sequences were captured", "Run `speckd cache` again: it starts here"
        )
    yield index.tobytes()
    yield _footer(header, index.tobytes(), totals)


def _header(layout: Layout, plan: bytes, number: int) -> bytes:
    kind, compression = _KINDS.index(layout.kind), _COMPRESSIONS.index(layout.compression)
    sizes = layout.vocabulary_size, layout.width, layout.draws
    content = _HEADER.pack(_MAGIC, VERSION, kind, layout.precision, compression, *sizes, number, plan)
    return content + digest(content)


def _footer(header: bytes, index: bytes, totals: Totals) -> bytes:
    size, lost = totals.size + len(index) + _FOOTER.size + _DIGEST, totals.rounding
    content = _FOOTER.pack(
        _END,
        totals.size,
        size,
        totals.sequences,
        totals.tokens,
        totals.answers,
        lost.max_log_prob,
        lost.sum_log_prob,
        lost.max_prob,
        lost.sum_prob,
        lost.entries,
        digest(header),
        digest(index),
    )
    return content + digest(content)


@dataclass(frozen=True)
class Shard:
    """A published shard, of which header, index and footer were checked. `index`: one entry a record, in the file's order."""

    path: Path
    layout: Layout
    plan: bytes
    number: int
    totals: Totals
    index: npt.NDArray[np.void]
    digest: bytes

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """[sequences + 1] where each record starts."""
        start = _HEADER.size + _DIGEST
        return start + np.concatenate([[0], np.cumsum(self.index["length"].astype(np.int64))])

    def record(self, files: Files, place: int) -> bytes:
        """One record's bytes, checked against its digest."""
        length = int(self.index["length"][place])
        with named(self.path):
            data = files.read(self.path, int(self.offsets[place]), length)
        if len(data) != length or digest(data) != self.index["digest"][place].tobytes():
            raise StoreError(f"{self.path}: record {place} of {len(self.index)} is damaged (its checksum is another)", _FIX)
        return data

    def beginning(self, files: Files, place: int, size: int) -> bytes:
        """Up to so many bytes of a record, which no digest vouches for."""
        with named(self.path):
            return files.read(self.path, int(self.offsets[place]), min(size, int(self.index["length"][place])))

    def verify(self, files: Files) -> None:
        """Every record's digest, and that nothing has changed since the shard was opened."""
        if open_shard(files, self.path).digest != self.digest:
            raise StoreError(f"{self.path}: it was replaced while it was open", "Open the cache again")
        for place in range(len(self.index)):
            self.record(files, place)


def open_shard(files: Files, path: Path) -> Shard:
    """Reads and checks all but the records.

    Raises:
        StoreError: naming the file and the part of it that is damaged.
    """
    start, end = _HEADER.size + _DIGEST, _FOOTER.size + _DIGEST
    with named(path):
        size = files.size(path)
        header, footer = files.read(path, 0, start), files.read(path, max(0, size - end), end)
    content = _checked(path, "header", header, start)
    magic, version, kind, precision, compression, vocabulary, width, draws, number, plan = _HEADER.unpack(content)
    if magic != _MAGIC or version != VERSION:
        raise StoreError(f"{path}: not a shard of version {VERSION} (it says {version})", "Capture it with this speckd")
    end_magic, index_at, length, sequences, tokens, answers, *lost, header_digest, index_digest = _FOOTER.unpack(
        _checked(path, "footer", footer, end)
    )
    index_size = length - end - index_at
    if end_magic != _END or length != size or index_size != sequences * _INDEX.itemsize or header_digest != digest(header):
        raise StoreError(f"{path}: its footer does not belong to it (it has {size} bytes, the footer says {length})", _FIX)
    with named(path):
        raw = files.read(path, index_at, index_size)
    if len(raw) != index_size or digest(raw) != index_digest:
        raise StoreError(f"{path}: the index is damaged (its checksum is another)", _FIX)
    index = np.frombuffer(raw, dtype=_INDEX)
    if start + sum(index["length"].tolist()) != index_at:
        raise StoreError(f"{path}: its records do not fill it", _FIX)
    layout = _layout(path, kind, vocabulary, width, precision, compression, draws)
    totals = Totals(sequences, tokens, answers, size, Rounding(*lost))
    return Shard(path, layout, plan, number, totals, index, footer[-_DIGEST:])


def _checked(path: Path, part: str, data: bytes, size: int) -> bytes:
    content = data[:-_DIGEST]
    if len(data) != size or digest(content) != data[-_DIGEST:]:
        raise StoreError(f"{path}: the {part} is damaged (its checksum is another)", _FIX)
    return content


def _layout(path: Path, kind: int, vocabulary: int, width: int, precision: int, compression: int, draws: int) -> Layout:
    try:
        return Layout(_KINDS[kind], vocabulary, width, precision, _COMPRESSIONS[compression], draws)
    except IndexError:
        raise StoreError(f"{path}: of a kind that this speckd does not know", "Capture it with this speckd") from None
