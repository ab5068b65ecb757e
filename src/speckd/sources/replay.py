"""What the student wrote in earlier steps, kept to be trained on again: DistiLLM's off-policy text (arXiv 2402.03898)."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speckd.randomness import uniforms
from speckd.sources.writer import Completion, Prompt

_STREAM = 18


@dataclass(frozen=True)
class Written:
    """A completion and what it continues. `step`: the optimizer steps that its writer had made; `teacher`: the number of the
    sample's own teacher, where several share the samples."""

    prompt: Prompt
    completion: Completion
    step: int
    teacher: int | None = None


class ReplayBuffer:
    """The newest `capacity` completions, the same on all processes."""

    def __init__(self, capacity: int) -> None:
        self._kept: deque[Written] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def full(self) -> bool:
        return len(self._kept) == self._kept.maxlen

    def add(self, written: Sequence[Written]) -> None:
        """A step's, of all processes, in any order."""
        self._kept.extend(sorted(written, key=lambda each: each.prompt.sample))

    def drawn(self, seed: int, step: int, samples: Tensor) -> list[Written]:
        """One for each of some samples, [n], in whose place it is trained on; uniform, with replacement, by counter."""
        uniform = uniforms(seed, step, samples, torch.zeros_like(samples), draws=1, stream=_STREAM)[:, 0, 0]
        return [self._kept[int(place)] for place in (uniform * len(self._kept)).long()]

    def state(self) -> list[dict[str, Any]]:
        """For a checkpoint, as JSON has it."""
        return [
            {
                "sample": each.prompt.sample,
                "prompt": each.prompt.token_ids.tolist(),
                "completion": each.completion.token_ids.tolist(),
                "finished": each.completion.finished,
                "step": each.step,
                "teacher": each.teacher,
            }
            for each in self._kept
        ]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        self._kept.clear()
        for each in state:
            prompt = Prompt(torch.tensor(each["prompt"], dtype=torch.int64), each["sample"])
            completion = Completion(torch.tensor(each["completion"], dtype=torch.int64), each["finished"])
            self._kept.append(Written(prompt, completion, each["step"], each["teacher"]))
