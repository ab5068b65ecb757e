"""A causal language model of this process that continues prompts, student or teacher: many at once, with a KV cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from speckd.sources.rewinding import in_eval_mode
from speckd.sources.sampling import draw, uniforms_at
from speckd.sources.writer import Completion, Draws, Prompt, Sampling

#: Prompts continued at once; their caches are held together.
ROWS_AT_ONCE = 128


class ModelWriter:
    """Writes with a Transformers causal LM, by its own `generate`.

    A token is drawn by a uniform of its own (`sampling.uniforms_at`), so a completion does not depend on what else is in the
    batch, on the number of processes, or on what was drawn before; but for rounding, which differs with a batch's shape and
    decides only where a uniform falls within it.

    Args:
        model: the model itself, inside of DDP and PEFT.
        stop_ids: a completion ends with the first of these.
        suppressed: [n] int64, ids that are never written, such as tokens that the teacher lacks.
        positions: how many the models that read the text have; None: any number.
        autocast: what the model's forward runs in.
        said: asked about all tokens that a text has so far, after each: true ends it there. None: only stop tokens do.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: Sequence[int],
        suppressed: Tensor | None = None,
        positions: int | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        said: Callable[[list[int]], bool] | None = None,
    ) -> None:
        self.model, self.stop_ids, self._positions, self._autocast = model, tuple(sorted(stop_ids)), positions, autocast
        self._said = said
        self._suppressed = torch.empty(0, dtype=torch.int64) if suppressed is None else suppressed

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, draws: Draws) -> list[Completion]:
        """As of `Writer`. A prompt that fills all positions gets a completion without tokens."""
        found: dict[int, Completion] = {}
        for limit, numbers in self._grouped(prompts, sampling.max_completion_length):
            some = [prompts[number] for number in numbers]
            found.update(zip(numbers, self._written(some, sampling, draws, limit), strict=True))
        return [found[number] for number in range(len(prompts))]

    def _grouped(self, prompts: Sequence[Prompt], most: int) -> Iterator[tuple[int, list[int]]]:
        """Prompts that may be continued by as many tokens, the longest first, some at a time, by their numbers."""
        limits = [most if self._positions is None else min(most, self._positions - len(p.token_ids)) for p in prompts]
        for limit in sorted(set(limits)):
            own = [number for number, each in enumerate(limits) if each == limit]
            own.sort(key=lambda number: -len(prompts[number].token_ids))  # less padding
            for start in range(0, len(own), ROWS_AT_ONCE):
                yield limit, own[start : start + ROWS_AT_ONCE]

    def _written(self, prompts: list[Prompt], sampling: Sampling, draws: Draws, limit: int) -> list[Completion]:
        if limit < 1:
            return [Completion(torch.empty(0, dtype=torch.int64), finished=False) for _ in prompts]
        device = self.model.get_input_embeddings().weight.device
        ids, mask = _left_padded(prompts)
        samples = torch.tensor([prompt.sample for prompt in prompts], device=device)
        positions = mask.sum(-1, keepdim=True).to(device) + torch.arange(limit, device=device)
        uniform = uniforms_at(draws, samples.repeat_interleave(limit), positions.flatten()).view(-1, limit)
        drawn = _Drawn(sampling, uniform, ids.shape[1], self._suppressed.to(device))
        config = GenerationConfig(
            max_new_tokens=limit, do_sample=False, use_cache=True, eos_token_id=list(self.stop_ids) or None, pad_token_id=0
        )
        ended = None if self._said is None else _Said(self._said, ids.shape[1], len(prompts))
        with self._autocast(), _as_it_is(self.model):
            whole = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([drawn]),
                stopping_criteria=StoppingCriteriaList([] if ended is None else [ended]),
            )
        lengths = [None] * len(prompts) if ended is None else ended.lengths
        return [self._cut(row, length) for row, length in zip(whole[:, ids.shape[1] :].cpu(), lengths, strict=True)]

    def _cut(self, written: Tensor, length: int | None) -> Completion:
        """Up to the first stop token, or to where `said` ended it; what follows is padding."""
        written = written[:length]
        stops = torch.isin(written, torch.tensor(self.stop_ids, dtype=torch.int64)).nonzero()[:, 0]
        if not len(stops):
            return Completion(written.clone(), finished=length is not None)
        return Completion(written[: int(stops[0]) + 1].clone(), finished=True)


def _left_padded(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [B, T]."""
    width = max(len(prompt.token_ids) for prompt in prompts)
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.token_ids) :] = prompt.token_ids
        mask[row, width - len(prompt.token_ids) :] = 1
    return ids, mask


class _Drawn(LogitsProcessor):
    """Leaves of each row's logits the one token that its uniform draws, so that greedy search takes it.

    `uniforms`: [B, n], for the n tokens that may be written; `width`: of the padded prompts.
    """

    def __init__(self, sampling: Sampling, uniforms: Tensor, width: int, suppressed: Tensor) -> None:
        self._sampling, self._uniforms, self._width, self._suppressed = sampling, uniforms, width, suppressed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        allowed = scores.index_fill(-1, self._suppressed, -torch.inf)
        chosen = draw(allowed, self._sampling, self._uniforms[:, input_ids.shape[1] - self._width])
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)


class _Said(StoppingCriteria):
    """Ends a row by what its tokens say. `lengths`: [B], tokens until then, None where it did not; `width`: of the prompts."""

    def __init__(self, said: Callable[[list[int]], bool], width: int, rows: int) -> None:
        self._said, self._width, self.lengths = said, width, cast(list[int | None], [None] * rows)

    def __call__(self, input_ids: Tensor, scores: Any, **unused: Any) -> Tensor:
        written = input_ids[:, self._width :].tolist()
        for row, tokens in enumerate(written):
            if self.lengths[row] is None and self._said(tokens):
                self.lengths[row] = len(tokens)
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


@contextmanager
def _as_it_is(model: Any) -> Iterator[None]:
    """In eval mode, without gradients, penalties and limits of its own generation settings; all comes back as it was."""
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with in_eval_mode(model):
            yield
    finally:
        model.generation_config = settings


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """All at which a model's text ends: its tokenizer's end token, and those of its generation and model settings."""
    configured = [tokenizer.eos_token_id]
    for settings in (model.generation_config, model.config.get_text_config()):
        given = getattr(settings, "eos_token_id", None)
        configured += given if isinstance(given, (list, tuple)) else [given]
    return sorted({int(token) for token in configured if token is not None})
