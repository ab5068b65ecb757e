"""Rows of logits by the maxima of their tiles: one cheap pass, after which argmax and rank look at a few tiles only.

On two cores a row's `argmax` costs ten times its `amax`, and a top-k more. Exact: same winner, same rank, ties included.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

#: What a few rows may take: on a CPU to stay in a core's cache, on a GPU to be worth a launch.
_ROWS_BYTES = {"cpu": 2**20, "cuda": 2**26}
WIDTH = 128  # entries in a tile; the last one may be shorter


def tile_maxima(logits: Tensor) -> Tensor:
    """[N, V] -> [N, ceil(V / 128)]. NaN comes through."""
    whole = logits.shape[-1] // WIDTH * WIDTH
    maxima = logits[:, :whole].unflatten(-1, (whole // WIDTH, WIDTH)).amax(-1)
    if whole == logits.shape[-1]:
        return maxima
    return torch.cat([maxima, logits[:, whole:].amax(-1, keepdim=True)], -1)


def winners(logits: Tensor, tiles: Tensor) -> Tensor:
    """The first largest entry of some tiles: [N, V], [N, C] tile numbers -> [N, C] token ids."""
    ids = _entries(tiles, logits.shape[-1])
    best = logits.gather(-1, ids.flatten(-2)).view_as(ids).argmax(-1, keepdim=True)
    return ids.gather(-1, best)[..., 0]


def argmax(logits: Tensor, maxima: Tensor) -> Tensor:
    """[N], the first largest entry of each row; `maxima` as of `tile_maxima`."""
    return winners(logits, maxima.argmax(-1, keepdim=True))[:, 0]


def fewer_above_than(logits: Tensor, maxima: Tensor, values: Tensor, k: int) -> Tensor:
    """[N] bool: are fewer than k entries of the row strictly above `values`, [N]?"""
    above = maxima > values[:, None]  # each such tile holds at least one
    if k > maxima.shape[-1]:
        return (logits > values[:, None]).sum(-1) < k
    best = maxima.topk(min(k, maxima.shape[-1]), dim=-1).indices  # if k or more tiles are above, these show k entries
    ids = _entries(best, logits.shape[-1]).flatten(-2)
    found = logits.gather(-1, ids) > values[:, None]
    counted = (found & _first_of(ids)).sum(-1)
    return (counted < k) & (above.sum(-1) < k)


def _entries(tiles: Tensor, width: int) -> Tensor:
    """[N, C] tile numbers -> [N, C, 128] token ids; past the end, the last token again."""
    return (tiles[..., None] * WIDTH + torch.arange(WIDTH, device=tiles.device)).clamp(max=width - 1)


def _first_of(ids: Tensor) -> Tensor:
    """False where `_entries` repeated the last token."""
    return torch.cat([torch.ones_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], -1)


def softmax(logits: Tensor) -> Tensor:
    """[N, V] probabilities that add up to 1, without gradient.

    Torch adds a row's exponentials one after the other: at a vocabulary of 150,000 their sum is off by up to 1e-5 in float32.
    Adding them up again, pairwise, mends that.
    """
    probs = torch.softmax(logits, -1)
    return probs.div_(probs.sum(-1, keepdim=True))


def rows_at_once(logits: Tensor) -> int:
    """Of [N, V]: how many to work on together, so that what is made of them stays small and in the cache."""
    return max(1, _ROWS_BYTES.get(logits.device.type, 2**26) // (logits.shape[-1] * logits.element_size()))


def row_slices(logits: Tensor) -> Iterator[slice]:
    """Of [N, V]: so many rows after so many."""
    step = rows_at_once(logits)
    return (slice(start, start + step) for start in range(0, len(logits), step))


def sample(probs: Tensor, draws: Tensor) -> Tensor:
    """Inverse CDF, the tile first and then the entry: [N, V] and uniforms [N, C] -> [N, C] token ids."""
    width = probs.shape[-1]
    padded = torch.nn.functional.pad(probs, (0, -width % WIDTH)).unflatten(-1, (-1, WIDTH))
    cumulative = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    target = draws * cumulative[:, -1:]
    tile = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)
    before = torch.where(tile > 0, cumulative.gather(-1, (tile - 1).clamp(min=0)), 0)
    inside = padded[torch.arange(len(probs), device=probs.device)[:, None], tile]
    within = (inside.double().cumsum(-1) + before[..., None] <= target[..., None]).sum(-1).clamp(max=WIDTH - 1)
    return (tile * WIDTH + within).clamp(max=width - 1)
