"""One sequence's answers as bytes, and back.

A record is a header (`HEADER`), then a body: a bitmap of the answered positions; how many tokens each has, where they were
drawn; the token ids; which log-probabilities differ that share a float16; the log-probabilities, or counts; those of the tokens
that follow, always in float32. All numbers are little-endian. A compressed body has its numbers taken apart by significance
first, and differences along K in place of the values.
"""

import struct
import zlib
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from speckd.errors import StoreError
from speckd.teachers.answers import Answer
from speckd.teachers.codes import (
    NEVER,
    Bytes,
    Codes,
    Rounding,
    Values,
    crowd,
    decoded,
    full_codes,
    pack_ids,
    packed_size,
    ranked_codes,
    ranked_log_probs,
    rounding,
    unpack_ids,
)
from speckd.teachers.draws import Drawn, drawn_of, padded
from speckd.teachers.layout import FULL_ORDERED, Compression, Kind, Layout
from speckd.teachers.plausible import require_answer

KEY_BYTES = 16
#: Key; tokens of the sequence; answered positions; entries (ids or log-probabilities) in all; how many of them share a float16
#: with the one before; bytes of the body as stored.
HEADER = struct.Struct("<16sIIQQQ")
_AT_ONCE = 2**22  # log-probabilities of a whole vocabulary that are rounded at once


def sequence_key(token_ids: Tensor) -> bytes:
    """[T] -> BLAKE2b-128 of the ids as little-endian 32-bit numbers: what a sequence is found by."""
    return blake2b(token_ids.numpy().astype("<u4").tobytes(), digest_size=KEY_BYTES).digest()


@dataclass(frozen=True)
class Encoded:
    """A record, and what is known of it."""

    data: bytes
    tokens: int
    answers: int
    rounding: Rounding


def encode(token_ids: Tensor, answer: Answer, layout: Layout) -> Encoded:
    """One sequence's answers as bytes.

    Raises:
        StoreError: an answer that cannot be one to these tokens, or does not fit the layout.
    """
    require_answer(token_ids, answer, layout)
    match layout.kind:
        case Kind.SAMPLED:
            kept = _keep_drawn(answer, layout)
        case Kind.TOP_K:
            kept = _keep_ranked(answer, layout)
        case Kind.FULL:
            kept = _keep_all(answer, layout)
    positions = np.zeros(len(token_ids), dtype=np.uint8)
    positions[answer.positions.numpy()] = 1
    labels = answer.label_log_probs.numpy().astype("<f4")
    body = np.packbits(positions, bitorder="little").tobytes() + kept.data + _bytes(labels, _apart(layout))
    stored = zlib.compress(body) if layout.compression is Compression.ZLIB else body
    numbers = len(token_ids), len(positions.nonzero()[0]), kept.entries, kept.crowded, len(stored)
    return Encoded(HEADER.pack(sequence_key(token_ids), *numbers) + stored, *numbers[:2], kept.rounding)


@dataclass(frozen=True)
class _Kept:
    """What of a body depends on the kind: its bytes, and the numbers of the header."""

    data: bytes
    entries: int
    crowded: int = 0
    rounding: Rounding = field(default_factory=Rounding)


def _keep_drawn(answer: Answer, layout: Layout) -> _Kept:
    drawn, apart = drawn_of(answer, layout), _apart(layout)
    lengths, ids = _bytes(drawn.lengths.astype("<u4"), apart), pack_ids(drawn.token_ids, layout.id_bits)
    counts = _bytes(drawn.counts.astype(f"<u{layout.count_bytes}"), apart)
    return _Kept(lengths + ids + counts, len(drawn.token_ids))


def _keep_ranked(answer: Answer, layout: Layout) -> _Kept:
    assert answer.token_ids is not None
    ids, values, apart = pack_ids(answer.token_ids.numpy().reshape(-1), layout.id_bits), _values(answer), _apart(layout)
    if layout.precision == 32:
        return _Kept(ids + _bytes(_steps(values) if apart else values, apart), values.size)
    codes, falls = ranked_codes(values, tail=layout.width < layout.vocabulary_size)
    lost = rounding(values, ranked_log_probs(codes, crowd(codes), falls))
    data = ids + np.packbits(falls, bitorder="little").tobytes() + _bytes(_steps(codes) if apart else codes, apart)
    return _Kept(data, values.size, len(falls), lost)


def _keep_all(answer: Answer, layout: Layout) -> _Kept:
    values, rows = _values(answer), max(1, _AT_ONCE // layout.width)
    if layout.precision == 32:
        return _Kept(_bytes(values, _apart(layout)), values.size)
    blocks = [values[start : start + rows] for start in range(0, len(values), rows)]
    codes = [full_codes(block, FULL_ORDERED) for block in blocks]
    lost = sum((rounding(block, decoded(code)) for block, code in zip(blocks, codes, strict=True)), Rounding())
    whole = np.concatenate([np.empty((0, layout.width), dtype="<u2"), *codes])
    return _Kept(_bytes(whole, _apart(layout)), values.size, rounding=lost)


def _values(answer: Answer) -> Values:
    return answer.log_probs.numpy().astype("<f4", copy=False)


def _apart(layout: Layout) -> bool:
    """Whether numbers are laid out by significance, for the sake of compression."""
    return layout.compression is not Compression.NONE


def body_size(layout: Layout, tokens: int, answered: int, entries: int, crowded: int = 0) -> int:
    """Bytes of a record's body before compression."""
    ids = 0 if layout.kind is Kind.FULL else packed_size(entries, layout.id_bits)
    lengths, each = (4 * answered, layout.count_bytes) if layout.kind is Kind.SAMPLED else (0, layout.precision // 8)
    return _bitmap_size(tokens) + lengths + ids + (crowded + 7) // 8 + entries * each + 4 * answered


def decode(record: bytes, token_ids: Tensor, layout: Layout, positions: Tensor | None = None) -> Answer:
    """The answers at these positions, all by default.

    Raises:
        StoreError: a record of other tokens, or one that is none; a position without an answer.
    """
    body, answered, entries, crowded = _body(record, token_ids, layout)
    reader = _Reader(body, _apart(layout))
    there = _positions(reader.raw(_bitmap_size(len(token_ids))), len(token_ids), answered)
    ids: npt.NDArray[np.int64] | None = None
    match layout.kind:
        case Kind.SAMPLED:
            ids, log_probs = _drawn(reader, answered, entries, layout)
        case Kind.TOP_K:
            ids = unpack_ids(reader.raw(packed_size(entries, layout.id_bits)), entries, layout.id_bits)
            ids = ids.reshape(answered, layout.width)
            log_probs = _ranked(reader, answered, crowded, layout)
        case Kind.FULL:
            log_probs = _unranked(reader, answered, layout)
    labels = torch.from_numpy(reader.numbers("<f4", answered).astype(np.float32))
    if ids is not None and ids.size and ids.max() >= layout.vocabulary_size:
        raise _damaged("it names a token outside the vocabulary")
    token_ids_there = None if ids is None else torch.from_numpy(ids)
    whole = Answer(torch.from_numpy(there), token_ids_there, log_probs, labels, layout.kind is not Kind.SAMPLED)
    if positions is None or torch.equal(positions, whole.positions):
        return whole
    try:
        return whole.at(positions.contiguous())
    except KeyError:
        raise StoreError(
            "the cache holds this sequence, but not at all the positions that are trained on",
            "Capture again with this run's settings: what is supervised has changed",
        ) from None


def beginning_size(tokens: int, layout: Layout) -> int:
    """Bytes of a record that hold its answered positions for certain."""
    bitmap = _bitmap_size(tokens)
    # Deflate codes a byte in 15 bits at most, and its tables take less than a kilobyte.
    return HEADER.size + (bitmap if layout.compression is Compression.NONE else 2 * bitmap + 1024)


def positions_in(beginning: bytes, token_ids: Tensor, layout: Layout) -> Tensor:
    """[n] int64, ascending: the answered positions, by the first `beginning_size` bytes of a record, or all if it is shorter.

    Raises:
        StoreError: a record of other tokens, or one that is none.
    """
    answered, *_ = _numbers(beginning, token_ids, layout)
    size, bitmap = _bitmap_size(len(token_ids)), beginning[HEADER.size :]
    if layout.compression is Compression.ZLIB:
        try:
            bitmap = zlib.decompressobj().decompress(bitmap, max(1, size))  # 0 were no limit
        except zlib.error as error:
            raise _damaged(f"it cannot be decompressed ({error})") from None
    if len(bitmap) < size:
        raise _damaged("it is cut short")
    return torch.from_numpy(_positions(np.frombuffer(bitmap[:size], dtype=np.uint8), len(token_ids), answered))


def _bitmap_size(tokens: int) -> int:
    return (tokens + 7) // 8


def _positions(bitmap: Bytes, tokens: int, answered: int) -> npt.NDArray[np.int64]:
    there = np.flatnonzero(np.unpackbits(bitmap, bitorder="little"))
    if len(there) != answered or (answered and there[-1] >= tokens - 1):
        raise _damaged("its positions are not as many as it says")
    return there


def _numbers(beginning: bytes, token_ids: Tensor, layout: Layout) -> tuple[int, int, int, int]:
    """What a header says: answered positions, entries, how many are crowded, bytes of the body."""
    if len(beginning) < HEADER.size:
        raise _damaged("it is cut short")
    key, tokens, answered, entries, crowded, stored = HEADER.unpack_from(beginning)
    if key != sequence_key(token_ids) or tokens != len(token_ids):
        raise _damaged("it is of another sequence")
    wrong = entries > answered * layout.width if layout.kind is Kind.SAMPLED else entries != answered * layout.width
    if answered > max(0, tokens - 1) or wrong or crowded > entries:
        raise _damaged("its header contradicts itself")
    return answered, entries, crowded, stored


def _body(record: bytes, token_ids: Tensor, layout: Layout) -> tuple[Bytes, int, int, int]:
    """The body, decompressed to no more than the header's numbers allow; answered positions, entries, how many are crowded."""
    answered, entries, crowded, stored = _numbers(record, token_ids, layout)
    if stored != len(record) - HEADER.size:
        raise _damaged("its header contradicts itself")
    body, size = record[HEADER.size :], body_size(layout, len(token_ids), answered, entries, crowded)
    if layout.compression is Compression.ZLIB:
        inflate = zlib.decompressobj()
        try:
            body = inflate.decompress(body, size + 1)
        except zlib.error as error:
            raise _damaged(f"it cannot be decompressed ({error})") from None
        if not inflate.eof or inflate.unused_data:
            raise _damaged("it decompresses to another size than it says")
    if len(body) != size:
        raise _damaged("its body has another size than its header says")
    return np.frombuffer(body, dtype=np.uint8), answered, entries, crowded


def _damaged(how: str) -> StoreError:
    return StoreError(f"a record is damaged: {how}", "Delete its shard and run `speckd cache` again: it makes what is missing")


class _Reader:
    """Takes a body apart from front to back. `apart`: its numbers are laid out by significance."""

    def __init__(self, body: Bytes, apart: bool) -> None:
        self._body, self._at, self.apart = body, 0, apart

    def raw(self, size: int) -> Bytes:
        self._at += size
        return self._body[self._at - size : self._at]

    def numbers(self, kind: str, count: int) -> npt.NDArray[np.generic]:
        width = np.dtype(kind).itemsize
        raw = self.raw(count * width)
        if not self.apart:
            return raw.view(kind)
        return np.ascontiguousarray(raw.reshape(width, count).T).reshape(-1).view(kind)


def _codes(reader: _Reader, answered: int, layout: Layout, steps: bool = False) -> Codes:
    codes: Codes = reader.numbers("<u2", answered * layout.width).reshape(answered, layout.width).astype("<u2", copy=False)
    codes = np.cumsum(codes, axis=-1, dtype="<u2") if steps else codes
    if codes.size and codes.max() > NEVER:
        raise _damaged("a log-probability is not a number")
    return codes


def _floats(reader: _Reader, answered: int, layout: Layout, steps: bool = False) -> Tensor:
    bits = reader.numbers("<u4", answered * layout.width).reshape(answered, layout.width)
    bits = np.cumsum(bits, axis=-1, dtype="<u4") if steps else bits.copy()
    return torch.from_numpy(bits.view("<f4").astype(np.float32, copy=False))


def _unranked(reader: _Reader, answered: int, layout: Layout) -> Tensor:
    return decoded(_codes(reader, answered, layout)) if layout.precision == 16 else _floats(reader, answered, layout)


def _ranked(reader: _Reader, answered: int, crowded: int, layout: Layout) -> Tensor:
    if layout.precision == 32:
        return _floats(reader, answered, layout, steps=reader.apart)
    apart = np.unpackbits(reader.raw((crowded + 7) // 8), count=crowded, bitorder="little").astype(bool)
    codes = _codes(reader, answered, layout, steps=reader.apart)
    together = crowd(codes)
    if np.count_nonzero(together) != crowded:
        raise _damaged("as many log-probabilities are not equal as it says")
    return ranked_log_probs(codes, together, apart)


def _drawn(reader: _Reader, answered: int, entries: int, layout: Layout) -> tuple[npt.NDArray[np.int64], Tensor]:
    lengths = reader.numbers("<u4", answered).astype(np.int64)
    if lengths.sum() != entries or (lengths > layout.width).any():
        raise _damaged("its rows are not as long as it says")
    drawn = unpack_ids(reader.raw(packed_size(entries, layout.id_bits)), entries, layout.id_bits)
    if entries and drawn.max() >= layout.vocabulary_size:
        raise _damaged("it names a token outside the vocabulary")
    counts = reader.numbers(f"<u{layout.count_bytes}", entries).astype(np.int64)
    return padded(Drawn(lengths, drawn, counts), layout)


def _steps(values: Codes | Values) -> npt.NDArray[np.generic]:
    """Each row's first bit pattern, then differences, modulo the width."""
    bits = np.ascontiguousarray(values).view(f"<u{values.dtype.itemsize}")
    return np.concatenate([bits[:, :1], bits[:, 1:] - bits[:, :-1]], -1)


def _bytes(numbers: npt.NDArray[np.generic], apart: bool) -> bytes:
    """Little-endian; where `apart`, all first bytes first."""
    flat = np.ascontiguousarray(numbers).reshape(-1)
    return flat.view(np.uint8).reshape(-1, flat.dtype.itemsize).T.tobytes() if apart else flat.tobytes()
