"""The next token of a text, drawn by inverse CDF with a given uniform."""

import torch
from torch import Tensor

from speckd import tiles
from speckd.sources.writer import Sampling
from speckd.types import DenseSignal


def choose(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """One token a row: [N, V] logits and [N] uniforms in [0, 1) -> [N] token ids.

    Temperature first, then the `top_k` largest (ties at the border stay), then the smallest set whose probability reaches
    `top_p`: the order of Transformers' `generate`. At temperature 0 the first largest, whatever the uniforms.
    """
    if sampling.temperature == 0:
        return DenseSignal(logits).argmax()
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # shifted first: no overflow when it is small
    if 0 < sampling.top_k < logits.shape[-1]:
        scaled = _of_top_k(scaled, sampling.top_k)
    if sampling.top_p < 1:
        scaled = _of_top_p(scaled, sampling.top_p)
    return DenseSignal(scaled).sample(draws[:, None])[:, 0]


def _of_top_k(logits: Tensor, k: int) -> Tensor:
    least = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def _of_top_p(logits: Tensor, top_p: float) -> Tensor:
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = tiles.softmax(ordered)
    left_out = probs.cumsum(-1) - probs >= top_p  # what stands before it is enough; of the first, that is exactly 0
    return logits.masked_fill(torch.empty_like(left_out).scatter_(-1, order, left_out), -torch.inf)
