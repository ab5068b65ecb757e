"""Counter-based uniforms: a draw is a function of who asks, never of what was drawn before.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by the seed, with the counter
(sample, position, epoch, draw). So a verdict does not depend on batch order, chunking, number of processes or resumption.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant × word; int64 wraps, and its bits are those of the unsigned product."""
    product = word * constant
    return (product >> 32) & _WORD, product & _WORD


def philox(key: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        key: 64-bit integer.
        counter: four int64 tensors of one broadcastable shape, each word in [0, 2**32).

    Returns:
        four int64 tensors, each word uniform in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniforms(seed: int, epoch: int, sample: Tensor, position: Tensor, draws: int, stream: int = 0) -> Tensor:
    """Two independent uniforms in [0, 1) for each row and draw.

    Args:
        seed, epoch: integers; the key and one word of the counter.
        sample, position: [N] int64, who the row is.
        draws: how many pairs each row needs (at most 2**20).
        stream: separates purposes (gates, scrambling) that share a seed.

    Returns:
        [N, draws, 2] float64, each with 53 random bits.
    """
    draw = torch.arange(draws, device=sample.device) + (stream << 20)
    epoch_word = torch.full_like(draw, epoch & _WORD)
    words = philox(seed, (sample[:, None] & _WORD, position[:, None] & _WORD, epoch_word[None], draw[None]))
    pairs = [((words[i] >> 5) * 67108864 + (words[i + 1] >> 6)).double() / 9007199254740992 for i in (0, 2)]
    return torch.stack(pairs, dim=-1)
