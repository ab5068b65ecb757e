"""Token ids as wide as the vocabulary needs, and log-probabilities at 16 bits whose order is exact.

A log-probability's *code* is the bit pattern of its magnitude in float16: 0 is log 1, 0x7C00 is −inf, and the larger the code
the less probable.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from speckd.errors import StoreError

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint16]
Values = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
NEVER = 0x7C00  # the code of −inf
_ROOM = 2**13  # float32 values to one of float16
_WIDER = "Capture with 32 bits: set the cache's precision to 32"
_NOTHING = 1e-15  # what a sum near 1 does not feel, in float64
#: [0x7C01]: the probability that each code stands for.
PROBABILITIES = np.exp(-np.arange(NEVER + 1, dtype="<u2").view("<f2").astype(np.float64))


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` ids of so many bits each."""
    return bits // 8 * count + bits % 8 * ((count + 7) // 8)


def pack_ids(ids: npt.NDArray[np.int64], bits: int) -> bytes:
    """[m] ids: their whole low bytes, all first ones first, then what is left bit by bit, eight ids to the byte."""
    by_byte = ids.astype("<u4").view(np.uint8).reshape(-1, 4)
    whole, rest = divmod(bits, 8)
    planes = [by_byte[:, place].tobytes() for place in range(whole)]
    planes += [np.packbits(by_byte[:, whole] >> bit & 1, bitorder="little").tobytes() for bit in range(rest)]
    return b"".join(planes)


def unpack_ids(packed: Bytes, count: int, bits: int) -> npt.NDArray[np.int64]:
    """[m] ids again."""
    by_byte = np.zeros((count, 8), dtype=np.uint8)
    whole, rest = divmod(bits, 8)
    for place in range(whole):
        by_byte[:, place] = packed[place * count : (place + 1) * count]
    size = (count + 7) // 8
    for bit in range(rest):
        start = whole * count + bit * size
        by_byte[:, whole] |= np.unpackbits(packed[start : start + size], count=count, bitorder="little") << bit
    return by_byte.reshape(-1).view("<i8")


def decoded(codes: Codes) -> torch.Tensor:
    """Log-probabilities, float32. Torch widens them faster than numpy."""
    return torch.from_numpy((codes | 0x8000).astype("<u2", copy=False).view("<f2")).float()


def ranked_codes(log_probs: Values, tail: bool) -> tuple[Codes, Flags]:
    """[n, K], most probable first: codes that never fall, and what tells apart those that are equal.

    Without a tail each is the nearest; with one, of the two neighbours in float16 the one that brings the sum of probabilities
    so far nearer to the true one, so that the tail, 1 − Σ, keeps its digits. The sum stays below 1, and the tail is no less
    than half of the true one: where rounding would have it otherwise, the least probable tokens go one code down. So no code
    is more than two beside the nearest.

    Returns:
        codes, [n, K], and for every one that equals the one before it (`crowd`) whether the log-probability was lower.

    Raises:
        StoreError: finite values below what float16 holds.
    """
    values = np.minimum(log_probs, np.float32(0))
    falls = log_probs[:, 1:] < log_probs[:, :-1]
    rising = np.concatenate([np.zeros((len(values), 1), dtype=bool), falls], -1)
    nearest, never = _nearest(values), values == -np.inf
    codes = _balanced(values, nearest, rising) if tail else nearest
    mass = np.minimum(np.exp(values.astype(np.float64)).sum(-1), 1)
    _keep_below(codes, never, rising, (1 + mass) / 2)
    _check_range(codes, never)
    small = codes.astype("<u2")
    return small, falls[crowd(small)]


def crowd(codes: Codes) -> Flags:
    """[n, K − 1] which finite codes equal the one before them."""
    return (codes[:, 1:] == codes[:, :-1]) & (codes[:, 1:] != NEVER)


def ranked_log_probs(codes: Codes, together: Flags, apart: Flags) -> torch.Tensor:
    """[n, K] float32, whose order is exact: equal codes that are `apart` differ in the 13 bits that float16 does not have.

    Args:
        together: their `crowd`.
        apart: [how many are in it] whether the log-probability was lower than the one before.

    Raises:
        StoreError: more in one crowd than these bits count.
    """
    values = decoded(codes)
    if apart.any():
        rows = np.flatnonzero(together.any(-1))
        steps = np.zeros((len(rows), codes.shape[-1]), dtype=np.int32)
        steps[:, 1:][together[rows]] = apart
        total = np.cumsum(steps, axis=-1, dtype=np.int32)
        total[:, 1:] -= np.maximum.accumulate(np.where(together[rows], 0, total[:, 1:]), axis=-1)  # since the crowd's first
        if total.max() >= _ROOM:
            raise StoreError(f"more than {_ROOM} log-probabilities share 16 bits", _WIDER)
        bits = values.view(torch.int32)
        bits[rows] += torch.from_numpy(total)  # of a negative number: its magnitude grows
    return values


def full_codes(log_probs: Values, ordered: int) -> Codes:
    """[n, V] codes: a row's most probable tokens keep their order exactly; the others come after, in order but for new ties.

    No sum is kept: whoever has the whole vocabulary normalises it again.
    """
    values = np.minimum(log_probs, np.float32(0))
    nearest = _nearest(values)
    top = torch.from_numpy(log_probs).topk(min(ordered, log_probs.shape[-1]), sorted=True)
    best, where = top.values.numpy(), top.indices.numpy()
    rising = np.zeros(best.shape, dtype=bool)
    rising[:, 1:] = best[:, 1:] < best[:, :-1]
    codes = spread(np.take_along_axis(nearest, where, -1), rising)
    after = np.maximum(nearest, codes[:, -1:] + (log_probs < best[:, -1:]))
    np.put_along_axis(after, where, codes, -1)
    never = values == -np.inf
    _check_range(after, never)
    return np.where(never, NEVER, after).astype("<u2")


def spread(codes: npt.NDArray[np.int32], rising: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """[n, K] codes that do not fall -> the nearest (in the maximum norm) that grow where `rising`, and only there."""
    steps = np.cumsum(rising, axis=-1, dtype=np.int32)
    slack = codes - steps  # must not fall: half-way between the least sequence above it and the greatest below it
    above = np.maximum.accumulate(slack, axis=-1)
    below = np.minimum.accumulate(slack[:, ::-1], axis=-1)[:, ::-1]
    return steps + np.maximum((above + below) >> 1, 0)


def _nearest(values: Values) -> npt.NDArray[np.int32]:
    half = torch.from_numpy(np.ascontiguousarray(values)).half().numpy()
    return (half.view("<u2") & 0x7FFF).astype(np.int32)


def _balanced(values: Values, nearest: npt.NDArray[np.int32], rising: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Of each value's two neighbours the one that keeps the sum of probabilities; one column after the other."""
    known = -nearest.astype("<u2").view("<f2").astype(np.float32)
    above = np.ascontiguousarray((nearest - (known < values)).T)  # the one as probable as the value, or more
    true, columns = np.exp(values.T.astype(np.float64)), rising.T.copy()
    kept = np.empty_like(above)
    excess = np.zeros(len(values))
    last = np.zeros(len(values), dtype=np.int32)
    for column, more in enumerate(above):
        less = np.minimum(more + 1, NEVER)
        target = true[column] - excess
        code = np.where(target - PROBABILITIES[less] < PROBABILITIES[more] - target, less, more)
        code = np.where(columns[column], np.maximum(code, last), last if column else code)
        kept[column] = last = code
        excess += PROBABILITIES[last] - true[column]
    return np.ascontiguousarray(kept.T)


def _keep_below(
    codes: npt.NDArray[np.int32], never: npt.NDArray[np.bool_], rising: npt.NDArray[np.bool_], limit: npt.NDArray[np.float64]
) -> None:
    """Moves the ends of rows down, as short ones as will do, in place, until their sums of probabilities are below `limit`."""
    places = np.arange(codes.shape[-1])
    while True:
        over = PROBABILITIES[codes].sum(-1) - limit
        rows = np.flatnonzero(over >= 0)
        if not len(rows):
            return
        lower = np.where(never[rows], NEVER, codes[rows] + 1)
        _check_range(lower, never[rows])
        gain = (PROBABILITIES[codes[rows]] - PROBABILITIES[lower])[:, ::-1].cumsum(-1)[:, ::-1]
        first = np.maximum((gain > over[rows, None] + _NOTHING).sum(-1) - 1, 0)
        of_its_tie = np.maximum.accumulate(np.where(rising[rows], places, 0), axis=-1)  # equal ones stay equal
        first = np.take_along_axis(of_its_tie, first[:, None], -1)
        codes[rows] = np.where(places >= first, lower, codes[rows])


def _check_range(codes: npt.NDArray[np.int32], never: npt.NDArray[np.bool_]) -> None:
    if (codes[~never] >= NEVER).any():
        raise StoreError("a log-probability is below what 16 bits hold (−65504)", _WIDER)


@dataclass(frozen=True)
class Rounding:
    """How far what is read is from what was given: sums and maxima of |Δ log p| (nats, finite ones) and of |Δ p|."""

    max_log_prob: float = 0.0
    sum_log_prob: float = 0.0
    max_prob: float = 0.0
    sum_prob: float = 0.0
    entries: int = 0

    def __add__(self, other: "Rounding") -> "Rounding":
        return Rounding(
            max(self.max_log_prob, other.max_log_prob),
            self.sum_log_prob + other.sum_log_prob,
            max(self.max_prob, other.max_prob),
            self.sum_prob + other.sum_prob,
            self.entries + other.entries,
        )


def rounding(log_probs: Values, read_again: torch.Tensor) -> Rounding:
    """Of one record. −inf is exact."""
    finite = log_probs > -np.inf
    given, read = log_probs[finite].astype(np.float64), read_again.numpy()[finite].astype(np.float64)
    if not len(given):
        return Rounding()
    in_logs = np.abs(given - read)
    in_probs = np.abs(np.exp(given) - np.exp(read))
    return Rounding(float(in_logs.max()), float(in_logs.sum()), float(in_probs.max()), float(in_probs.sum()), len(given))
