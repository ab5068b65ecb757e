"""The next token, drawn: a function of the logits, of how it is to be sampled, and of one uniform."""

import torch
from torch import Tensor

from speckd.randomness import uniforms
from speckd.sources.writer import Draws, Sampling

#: Of the uniforms that share a seed: those that write text (gates take 0 and 1).
_STREAM = 16


def uniforms_at(draws: Draws, samples: Tensor, positions: Tensor) -> Tensor:
    """[N] uniforms in [0, 1), each for one position (in prompt and completion together) of a sample; both [N] int64."""
    return uniform_pairs_at(draws, samples, positions)[:, 0]


def uniform_pairs_at(draws: Draws, samples: Tensor, positions: Tensor) -> Tensor:
    """[N, 2]: that of `uniforms_at`, and an independent one for whoever replaces what was drawn by it."""
    return uniforms(draws.seed, draws.turn, samples, positions, draws=1, stream=_STREAM)[:, 0]


def truncated(logits: Tensor, sampling: Sampling) -> Tensor:
    """[N, V] logits at `temperature` (not 0), −inf at what top-k and then top-p leave out; ties at the border stay in."""
    scores = logits / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, _ = scores.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # the mass above each
        least = ordered.masked_fill(before >= sampling.top_p, torch.inf).amin(-1, keepdim=True)
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """[N, V] logits, [N] uniforms -> [N] token ids by inverse CDF in the order of ids; at temperature 0 the most probable."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return drawn(probabilities(logits, sampling), uniform)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """[N, V] float64: what `draw` draws from; at temperature 0 all of it is the most probable token's."""
    if sampling.temperature == 0:
        return torch.zeros(logits.shape, dtype=torch.float64, device=logits.device).scatter_(-1, logits.argmax(-1)[:, None], 1)
    return truncated(logits.float(), sampling).double().softmax(-1)


def drawn(probs: Tensor, uniform: Tensor) -> Tensor:
    """[N, V] probabilities, [N] uniforms -> [N] token ids by inverse CDF."""
    below = probs.cumsum(-1)
    target = uniform[:, None] * below[:, -1:]
    found = (below <= target).sum(-1)
    possible = torch.arange(probs.shape[-1], device=probs.device) * (probs > 0)
    return torch.minimum(found, possible.amax(-1))  # never, by rounding, a token that cannot be
