"""Who writes completions: the student, the teacher, both in turn, or a server. A writer knows no loss, gate or trainer."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from speckd.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature` 0: the most probable one; `top_k` 0 and `top_p` 1: no truncation."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_completion_length: int = 256

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"sampling_temperature is {self.temperature}", "Use 0 (greedy) or above")
        if self.top_k < 0:
            raise ConfigError(f"sampling_top_k is {self.top_k}", "Use 0 (off) or a number of tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling_top_p is {self.top_p}", "Use a share above 0, up to 1 (off)")
        if self.max_completion_length < 1:
            raise ConfigError(f"max_completion_length is {self.max_completion_length}", "Use at least 1")


@dataclass(frozen=True)
class Draws:
    """Which uniforms a completion is written with: a function of who asks, so that batch, order and resumption do not matter.

    `turn`: how often this sample has been written for before (the epoch, or the optimizer step)."""

    seed: int
    turn: int


@dataclass(frozen=True)
class Prompt:
    """What is to be continued: `token_ids`, [T] int64 on the CPU, T ≥ 1; `sample`: its number in the data set."""

    token_ids: Tensor
    sample: int


@dataclass(frozen=True)
class Completion:
    """What was written: `token_ids`, [n] int64 on the CPU, the stop token included where there is one.

    `finished`: it ends with a stop token, and was not cut off at the limit. `replaced`: [n] bool, which tokens a verifier put
    in the place of the writer's own; None where nobody verifies.
    """

    token_ids: Tensor
    finished: bool
    replaced: Tensor | None = None


@dataclass(frozen=True)
class WriterContext:
    """What there is to write with in a run, once models and data are loaded.

    `student`: the causal LM itself, whose weights move as it is trained; `tokenizer`: its own; `stop_ids`: a completion ends
    with the first of these; `suppressed`: [n] int64, ids that are not to be written, such as tokens that the teacher lacks;
    `positions`: how many the models that read the text have, None for any number; `autocast`: what the student's forward runs
    in.
    """

    student: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]
    suppressed: Tensor
    positions: int | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext


class Writer(Protocol):
    """Continues prompts."""

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, draws: Draws) -> list[Completion]:
        """One completion a prompt, in order; the same for a prompt, draws and weights, whatever else is in the call.

        Raises:
            SpeckdError: it cannot.
        """
        ...
