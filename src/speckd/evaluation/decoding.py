"""The teacher's plain decoding and the same with drafts, side by side and by the clock."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from speckd.evaluation.models import Models, positions, width
from speckd.evaluation.speculative import SpeculativeDecoder
from speckd.sources.model_writer import ModelWriter
from speckd.sources.writer import Draws, Prompt, Sampling


class Decoders:
    """`plain`: the teacher alone, by Transformers' `generate` with a cache; `speculative`: with the model's drafts. Both write
    the shared tokens only, end with the same ones, and at the last position that both models have."""

    def __init__(self, models: Models, draft_length: int, batch_size: int) -> None:
        model, teacher, shared = models.model, models.teacher_model, models.vocabulary
        assert models.teacher is not None
        self.stops = sorted(models.rendering.stops & models.teacher.stops(models.teacher.tokenizer))
        known = [most for most in (positions(model), positions(teacher)) if most is not None]
        self.plain = ModelWriter(teacher, self.stops, shared.outside(width(teacher)), min(known, default=None))
        self.speculative = SpeculativeDecoder(model, teacher, shared, self.stops, draft_length, batch_size)
        self.device = models.device


def timed(decoders: Decoders, prompt: Prompt, greedy: Sampling, repeats: int) -> dict[str, Any]:
    """One prompt alone, each way by turns, the first of each untimed: medians of the seconds, and their ratio."""
    draws = Draws(0, 0)
    ways: dict[str, Callable[[], Any]] = {
        "plain_s": lambda: decoders.plain.write([prompt], greedy, draws),
        "speculative_s": lambda: decoders.speculative.write([prompt], greedy, draws),
    }
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = _now(decoders.device)
            way()
            seconds[name].append(_now(decoders.device) - start)
    found = {name: median(each) for name, each in seconds.items()}
    return found | {"speedup": found["plain_s"] / found["speculative_s"]}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
