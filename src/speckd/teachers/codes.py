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
NEVER = 0x7C00  # the code of −inf
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


def ranked_codes(log_probs: Values, tail: bool) -> Codes:
    """[n, K], most probable first: codes that grow exactly where the log-probabilities fall, and are equal where they are.

    Without a tail each is the nearest; with one, of the two neighbours in float16 the one that brings the sum of probabilities
    so far nearer to the true one, so that the tail, 1 − Σ, keeps its digits. Where more values share a float16 than there are
    codes, they spread to either side: so far the last ones may be off. The sum stays below 1, and the tail is no less than half
    of the true one: where rounding would have it otherwise, the least probable tokens go one code down.

    Raises:
        StoreError: finite values below what float16 holds.
    """
    values = np.minimum(log_probs, np.float32(0))
    rising = np.zeros(values.shape, dtype=bool)
    rising[:, 1:] = log_probs[:, 1:] < log_probs[:, :-1]
    nearest = _nearest(values)
    codes = np.minimum(spread(nearest, rising), NEVER)
    if tail:
        codes = _balanced(values, nearest, codes, rising)
    never = values == -np.inf
    codes = np.where(never, NEVER, codes)
    mass = np.minimum(np.exp(values.astype(np.float64)).sum(-1), 1)
    _keep_below(codes, never, rising, (1 + mass) / 2)
    _check_range(codes, never)
    return codes.astype("<u2")


def full_codes(log_probs: Values, ordered: int) -> Codes:
    """[n, V]: as `ranked_codes` for a row's most probable tokens; the others come after them, in order but for new ties.

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
    after = np.where(log_probs == best[:, -1:], codes[:, -1:], after)  # a tie of the last one, moved with it
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


def _balanced(
    values: Values, nearest: npt.NDArray[np.int32], codes: npt.NDArray[np.int32], rising: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int32]:
    """Each code as it is or one beside it, whichever keeps the sum of probabilities; one column after the other."""
    known = -nearest.astype("<u2").view("<f2").astype(np.float32)
    moved = codes != nearest
    above = np.ascontiguousarray((codes - (~moved & (known < values))).T)  # as probable as the value, or more
    true, columns = np.exp(values.T.astype(np.float64)), rising.T.copy()
    kept = np.empty_like(above)
    excess = np.zeros(len(values))
    last = np.full(len(values), -1, dtype=np.int32)
    for column, more in enumerate(above):
        less = np.minimum(more + 1, NEVER)
        target = true[column] - excess
        code = np.where(target - PROBABILITIES[less] < PROBABILITIES[more] - target, less, more)
        code = np.where(columns[column], np.maximum(code, last + 1), last if column else code)
        kept[column] = last = np.minimum(code, NEVER)
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
        raise StoreError(
            "a log-probability is below what 16 bits hold (−65504)", "Capture with 32 bits: set the cache's precision to 32"
        )


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


def rounding(log_probs: Values, codes: Codes) -> Rounding:
    """Of one record. −inf is exact."""
    finite = log_probs > -np.inf
    given, read = log_probs[finite].astype(np.float64), decoded(codes[finite]).double().numpy()
    if not len(given):
        return Rounding()
    in_logs = np.abs(given - read)
    in_probs = np.abs(np.exp(given) - np.exp(read))
    return Rounding(float(in_logs.max()), float(in_logs.sum()), float(in_probs.max()), float(in_probs.sum()), len(given))
