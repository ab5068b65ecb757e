"""The Triton programs, one program a row in blocks of the vocabulary; `statistics.py` and `kernel_pass.py` launch them.

A row is read in any precision of at most 32 bits and worked on in float32. Sums are kept lane by lane and added up once, as a
tree, so that they are as exact over 150,000 entries as PyTorch's. Everything per row is indexed by the row's number in its
chunk, so a launch for some rows needs their numbers and nothing that is gathered. Widths are constants: a model has one.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from types import FunctionType

import triton
import triton.language as tl

# ---- a divergence's entry, from its own source ---------------------------------------------------------------------------


@triton.jit
def _abs(x):
    return tl.abs(x)


@triton.jit
def _clamp_min(x, least):
    return tl.maximum(x, least)


@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _log(x):
    return tl.log(x)


@triton.jit
def _where(condition, x, y):
    return tl.where(condition, x, y)


#: What an entry may name. `Any` stands in annotations, of which Triton wants to know every name; its interpreter wants `tl`.
_NAMES = {"abs": _abs, "clamp_min": _clamp_min, "exp": _exp, "log": _log, "where": _where, "Any": tl.tensor, "tl": tl}
_ALLOWED = {*_NAMES, "float", "tuple"} - {"tl"}


def translatable(entry: Callable) -> bool:
    """Is an entry a plain function in the language that `divergences.Entrywise` describes?"""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(entry))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, no function, or part of a longer line
        return False
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return False
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    own = {argument.arg for argument in function.args.args} | {n.id for n in names if isinstance(n.ctx, ast.Store)}
    return {n.id for n in names} <= own | _ALLOWED and not any(isinstance(n, ast.Attribute) for n in ast.walk(function))


@cache
def translated(entry: Callable) -> Callable:
    """The same lines as a Triton function: the code is the entry's, only its names mean Triton's functions."""
    twin = FunctionType(entry.__code__, dict(_NAMES), entry.__name__)
    twin.__module__ = entry.__module__
    return triton.jit(twin)


# ---- what the gates ask -----------------------------------------------------------------------------------------------------


@triton.jit
def row_statistics(
    logits,
    stride,
    maximum,
    argmax,
    log_mass,
    log_mass_at,
    tile_maxima,
    inverse_temperature,
    width: tl.constexpr,
    tile_count: tl.constexpr,
    TEMPERED: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Maximum, its first place, log Σ exp(logits − maximum) at temperature 1 and T, and each tile's maximum, in one read.

    Each of `TILES` strands follows its own running maximum, so that nothing is exchanged between warps before the end.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    tile_maxima += row * tile_count
    strand, lane = tl.arange(0, TILES), tl.arange(0, WIDTH)
    best = tl.full([TILES], float("-inf"), tl.float32)
    best_tile = tl.zeros([TILES], tl.int32)
    mass = tl.zeros([TILES, WIDTH], tl.float32)
    mass_at = tl.zeros([TILES, WIDTH], tl.float32)
    for first in range(0, tile_count, TILES):
        tile = first + strand
        entry = tile[:, None] * WIDTH + lane[None, :]
        x = tl.load(logits + entry, mask=entry < width, other=float("-inf")).to(tl.float32)
        own = tl.max(x, 1)
        tl.store(tile_maxima + tile, own, mask=tile < tile_count)
        best_tile = tl.where(own > best, tile, best_tile)
        new = tl.maximum(best, own)
        shift = tl.where(new > float("-inf"), new, 0.0)  # −inf − −inf would be NaN
        mass = mass * tl.exp(best - shift)[:, None] + tl.exp(x - shift[:, None])
        if TEMPERED:
            old = tl.exp((best - shift) * inverse_temperature)
            mass_at = mass_at * old[:, None] + tl.exp((x - shift[:, None]) * inverse_temperature)
        best = new
    top = tl.max(best, 0)
    shift = tl.where(top > float("-inf"), top, 0.0)
    total = tl.sum(tl.sum(mass, 1) * tl.exp(best - shift), 0)
    tl.store(log_mass + row, tl.log(total))
    if TEMPERED:
        total_at = tl.sum(tl.sum(mass_at, 1) * tl.exp((best - shift) * inverse_temperature), 0)
        tl.store(log_mass_at + row, tl.log(total_at))
    # A maximum may overlook NaN, the sum does not; +inf makes the sum NaN as well and stays the maximum.
    tl.store(maximum + row, tl.where((tl.abs(total) < float("inf")) | (top == float("inf")), top, total))
    tile = tl.min(tl.where(best == top, best_tile, tile_count), 0)
    entry = tile * WIDTH + lane
    x = tl.load(logits + entry, mask=entry < width, other=float("-inf")).to(tl.float32)
    tl.store(argmax + row, tl.min(tl.where(x == top, entry, width - 1), 0))


@triton.jit
def entries_above(
    logits,
    stride,
    tile_maxima,
    values,
    count,
    most,
    width: tl.constexpr,
    tile_count: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """How many entries of each row are strictly above the row's value; at least `most` where it is `most` or more.

    Where so many tiles have a maximum above it, no logit is read; elsewhere, those tiles alone.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    tile_maxima += row * tile_count
    value = tl.load(values + row)
    strand, lane = tl.arange(0, TILES), tl.arange(0, WIDTH)
    tiles_above = tl.zeros([TILES], tl.int32)
    for first in range(0, tile_count, TILES):
        tile = first + strand
        own = tl.load(tile_maxima + tile, mask=tile < tile_count, other=float("-inf"))
        tiles_above += (own > value).to(tl.int32)
    above = tl.sum(tiles_above, 0)
    if above < most:
        found = tl.zeros([TILES], tl.int32)
        for first in range(0, tile_count, TILES):
            tile = first + strand
            own = tl.load(tile_maxima + tile, mask=tile < tile_count, other=float("-inf"))
            holds = own > value
            if tl.sum(holds.to(tl.int32), 0) > 0:
                entry = tile[:, None] * WIDTH + lane[None, :]
                read = holds[:, None] & (entry < width)
                x = tl.load(logits + entry, mask=read, other=float("-inf")).to(tl.float32)
                found += tl.sum((x > value).to(tl.int32), 1)
        above = tl.sum(found, 0)
    tl.store(count + row, above)


@triton.jit
def row_entropies(logits, stride, rows, maximum, log_mass, entropies, width: tl.constexpr, BLOCK: tl.constexpr):
    """−Σ p log p of some rows, nats, in the order of `rows`."""
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    logits += row * stride
    shift = tl.load(maximum + row)
    mass = tl.load(log_mass + row)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        entry = first + lane
        x = tl.load(logits + entry, mask=entry < width, other=float("-inf")).to(tl.float32)
        log_p = x - shift - mass
        p = tl.exp(log_p)
        total += tl.where(p > 0, p * log_p, 0.0)
    tl.store(entropies + tl.program_id(0), -tl.sum(total, 0))


# ---- gradients for the head's product, over the student's logits ------------------------------------------------------------


@triton.jit
def _log_prob(x, shift, mass, inverse_temperature, TEMPERED: tl.constexpr):
    log_prob = x - shift
    if TEMPERED:
        log_prob *= inverse_temperature
    return log_prob - mass


@triton.jit
def _slope_of_cap(x, softcap):
    ratio = x / softcap
    return 1.0 - ratio * ratio


@triton.jit
def label_gradient(
    logits,
    stride,
    rows,
    maximum,
    log_mass,
    labels,
    label_slopes,
    softcap,
    width: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows that learn from the label alone: slope · (1 at the label − q)."""
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    logits += row * stride
    shift = tl.load(maximum + row)
    mass = tl.load(log_mass + row)
    label = tl.load(labels + row)
    slope = tl.load(label_slopes + row)
    lane = tl.arange(0, BLOCK)
    for first in range(0, width, BLOCK):
        entry = first + lane
        x = tl.load(logits + entry, mask=entry < width, other=0.0)
        gradient = tl.where(entry == label, slope, 0.0) - slope * tl.exp(x - shift - mass)
        if CAPPED:
            gradient *= _slope_of_cap(x, softcap)
        tl.store(logits + entry, gradient, mask=entry < width)


@triton.jit
def divergence_gradient(
    student,
    student_stride,
    teacher,
    teacher_stride,
    rows,
    student_maximum,
    student_log_mass,
    student_log_mass_at,
    teacher_maximum,
    teacher_log_mass_at,
    weights,
    labels,
    label_slopes,
    values,
    inverse_temperature,
    softcap,
    width: tl.constexpr,
    divergence_entry: tl.constexpr,
    a: tl.constexpr,
    b: tl.constexpr,
    WRITE: tl.constexpr,
    TEMPERED: tl.constexpr,
    LABELLED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The divergence of each row and, where that is finite, weight · (slope − q·Σ slope) plus the label's part.

    A row whose value is not finite keeps its logits: the divergence itself must be asked.
    """
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    q_shift = tl.load(student_maximum + row)
    q_mass = tl.load(student_log_mass_at + row)
    p_shift = tl.load(teacher_maximum + row)
    p_mass = tl.load(teacher_log_mass_at + row)
    lane = tl.arange(0, BLOCK)
    values_of_lanes = tl.zeros([BLOCK], tl.float32)
    slopes_of_lanes = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        entry = first + lane
        inside = entry < width
        x = tl.load(student + entry, mask=inside, other=0.0)
        y = tl.load(teacher + entry, mask=inside, other=0.0).to(tl.float32)
        log_q = _log_prob(x, q_shift, q_mass, inverse_temperature, TEMPERED)
        log_p = _log_prob(y, p_shift, p_mass, inverse_temperature, TEMPERED)
        value, slope = divergence_entry(log_q, log_p, tl.exp(log_q), tl.exp(log_p), a, b)
        values_of_lanes += tl.where(inside, value, 0.0)
        slopes_of_lanes += tl.where(inside, slope, 0.0)
    divergence = tl.sum(values_of_lanes, 0)
    tl.store(values + row, divergence)
    if WRITE and tl.abs(divergence) < float("inf"):
        slopes = tl.sum(slopes_of_lanes, 0)
        weight = tl.load(weights + row)
        q_mass_1 = tl.load(student_log_mass + row)
        label = tl.load(labels + row)
        label_slope = tl.load(label_slopes + row)
        for first in range(0, width, BLOCK):
            entry = first + lane
            inside = entry < width
            x = tl.load(student + entry, mask=inside, other=0.0)
            y = tl.load(teacher + entry, mask=inside, other=0.0).to(tl.float32)
            log_q = _log_prob(x, q_shift, q_mass, inverse_temperature, TEMPERED)
            log_p = _log_prob(y, p_shift, p_mass, inverse_temperature, TEMPERED)
            q = tl.exp(log_q)
            value, slope = divergence_entry(log_q, log_p, q, tl.exp(log_p), a, b)
            gradient = weight * (slope - q * slopes)
            if LABELLED:
                if TEMPERED:
                    q = tl.exp(x - q_shift - q_mass_1)
                gradient += tl.where(entry == label, label_slope, 0.0) - label_slope * q
            if CAPPED:
                gradient *= _slope_of_cap(x, softcap)
            tl.store(student + entry, gradient, mask=inside)


@triton.jit
def remaining_mass(logits, stride, rows, maximum, log_mass, masses, width: tl.constexpr, BLOCK: tl.constexpr):
    """Σ q over what is left of a row from which tokens were struck (−inf) after its statistics."""
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    logits += row * stride
    shift = tl.load(maximum + row)
    mass = tl.load(log_mass + row)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        entry = first + lane
        x = tl.load(logits + entry, mask=entry < width, other=float("-inf"))
        total += tl.exp(x - shift - mass)
    tl.store(masses + row, tl.sum(total, 0))


@triton.jit
def scaled_probabilities(
    logits, stride, rows, maximum, log_mass, factors, softcap, width: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):
    """factor · q over each row; 0 at what was struck."""
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    logits += row * stride
    shift = tl.load(maximum + row)
    mass = tl.load(log_mass + row)
    factor = tl.load(factors + row)
    lane = tl.arange(0, BLOCK)
    for first in range(0, width, BLOCK):
        entry = first + lane
        x = tl.load(logits + entry, mask=entry < width, other=0.0)
        gradient = factor * tl.exp(x - shift - mass)
        if CAPPED:
            gradient = tl.where(x > float("-inf"), gradient * _slope_of_cap(x, softcap), 0.0)
        tl.store(logits + entry, gradient, mask=entry < width)


@triton.jit
def move_rows(data, stride, sources, targets, width: tl.constexpr, SWAP: tl.constexpr, BLOCK: tl.constexpr):
    """Row `sources[i]` to row `targets[i]`, or both ways; no row is named twice."""
    source = tl.load(sources + tl.program_id(0)).to(tl.int64)
    target = tl.load(targets + tl.program_id(0)).to(tl.int64)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < width
    moved = tl.load(data + source * stride + entry, mask=inside)
    if SWAP:
        tl.store(data + source * stride + entry, tl.load(data + target * stride + entry, mask=inside), mask=inside)
    tl.store(data + target * stride + entry, moved, mask=inside)
