"""Answers in batches: greedy or sampled, each token by a uniform of its own, so that a batch's company decides nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from speckd.evaluation.items import Item, by_stops, template_end
from speckd.evaluation.models import Models, positions, width
from speckd.evaluation.options import TaskOptions
from speckd.sources.model_writer import ModelWriter
from speckd.sources.writer import Completion, Draws, Prompt, Sampling


@dataclass(frozen=True)
class Answer:
    """What was said, up to the first stop text; `tokens`: written, the end included; `truncated`: cut off at the limit."""

    text: str
    tokens: int
    truncated: bool


class Answerer:
    """The model, asked by one task's options. The weights are loaded at the first question."""

    def __init__(self, models: Models, task: TaskOptions, seed: int) -> None:
        assert task.max_new_tokens is not None
        self._models, self._task, self._seed = models, task, seed
        self._writers: dict[frozenset[int], ModelWriter] = {}
        self._sampling = Sampling(
            task.sampling_temperature, task.sampling_top_k, task.sampling_top_p, max_completion_length=task.max_new_tokens
        )

    def answers(self, items: Sequence[Item]) -> list[Answer]:
        """One each, in order."""
        found: list[Answer | None] = [None] * len(items)
        for stops, places in by_stops(items, self._stops).items():
            for turn in sorted({items[place].turn for place in places}):
                own = [place for place in places if items[place].turn == turn]
                prompts = [Prompt(torch.tensor(items[place].ids), items[place].row.number) for place in own]
                written = self._writer(stops).write(prompts, self._sampling, Draws(self._seed, turn))
                for place, one in zip(own, written, strict=True):
                    found[place] = self._answer(items[place], one)
        return [answer for answer in found if answer is not None]

    def _stops(self, item: Item) -> frozenset[int]:
        return self._models.rendering.stops | template_end(item, self._task, self._models)

    def _writer(self, stops: frozenset[int]) -> ModelWriter:
        if stops not in self._writers:
            model, tokenizer = self._models.model, self._models.tokenizer
            unknown = sorted(set(range(width(model))) - set(tokenizer.get_vocab().values()))  # padding of the head
            suppressed, ends = torch.tensor(unknown, dtype=torch.int64), said(tokenizer, self._task.stop)
            self._writers[stops] = ModelWriter(model, sorted(stops), suppressed, positions(model), said=ends)
        return self._writers[stops]

    def _answer(self, item: Item, written: Completion) -> Answer:
        text = self._models.text(item.ids, written)
        ends = [place for place in map(text.find, self._task.stop) if place >= 0]
        text = text[: min(ends)] if ends else text
        return Answer(text, len(written.token_ids), not written.finished and not ends)


def said(tokenizer: Any, stop: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """Do the last tokens say one of the stop texts? None where there are none."""
    if not stop:
        return None
    most = 4 * max(map(len, stop)) + 8  # a character may take four tokens

    def ends(tokens: list[int]) -> bool:
        tail = tokenizer.decode(tokens[-most:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(text in tail for text in stop)

    return ends
