"""A writer of the user's own, looked at whenever it writes; `sequence_source: my_writer.py:MyWriter` is tried on a prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speckd.errors import ConfigError, SpeckdError
from speckd.own_parts import named, said
from speckd.sources.writer import Completion, Draws, Prompt, Sampling, Writer, WriterContext

_KEY = "sequence_source"
_FIX = "docs/sources.md shows one that works"


def require_writer_class(name: str) -> Any:
    """What stands under that name, FILE.py:NAME or MODULE:NAME.

    Raises:
        ConfigError: it is not there, or cannot be called.
    """
    found = named(_KEY, name)
    if not callable(found):
        raise ConfigError(f"{_KEY}: {name} is no class", f"It is called with what there is to write with: {_FIX}")
    return found


def own_writer(name: str, context: WriterContext, prompt: Prompt, sampling: Sampling) -> Writer:
    """The writer of that name, made with `context`, after it has continued one prompt.

    Raises:
        ConfigError: it cannot be made, or what it writes is no completion.
    """
    made = require_writer_class(name)
    try:
        writer = CheckedWriter(f"{_KEY}: {name}", made(context), context)
    except SpeckdError:
        raise
    except Exception as error:  # whatever the user's own code raises
        raise ConfigError(f"{_KEY}: {name} cannot be made ({said(error)})", f"It is given one WriterContext: {_FIX}") from error
    try:
        writer.write([prompt], sampling, Draws(0, 0))
    except SpeckdError:
        raise
    except Exception as error:
        what = f"{_KEY}: {name} is not a writer: asked to continue a prompt of {len(prompt.token_ids)} tokens, it fails"
        raise ConfigError(f"{what} ({said(error)})", _FIX) from error
    return writer


class CheckedWriter:
    """Looks at each completion before it is trained on. `name`: the writer's, for messages, and where it comes from."""

    def __init__(self, name: str, writer: Writer, context: WriterContext) -> None:
        self._name, self._writer, self._context = name, writer, context
        self._width = context.student.get_output_embeddings().weight.shape[0]

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, draws: Draws) -> list[Completion]:
        """As of `Writer`.

        Raises:
            ConfigError: it gives something else than one completion a prompt.
        """
        found = self._writer.write(prompts, sampling, draws)
        if not isinstance(found, list) or len(found) != len(prompts):
            given = f"{len(found)} completions" if isinstance(found, list) else type(found).__name__
            raise ConfigError(f"{self._name} gives {given} for {len(prompts)} prompts", f"Return a list of them: {_FIX}")
        for prompt, completion in zip(prompts, found, strict=True):
            wrong = self._wrong(prompt, completion, sampling)
            if wrong is not None:
                raise ConfigError(f"{self._name}: {wrong}", _FIX)
        return found

    def _wrong(self, prompt: Prompt, completion: Any, sampling: Sampling) -> str | None:
        if not isinstance(completion, Completion):
            return f"it gives {type(completion).__name__} and no Completion"
        ids: Any = completion.token_ids
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 1 or ids.device.type != "cpu":
            return "the token_ids of a completion are no tensor [n] of int64 on the CPU"
        limit = sampling.max_completion_length
        if self._context.positions is not None:
            limit = min(limit, max(0, self._context.positions - len(prompt.token_ids)))
        if len(ids) > limit:
            return f"a completion has {len(ids)} tokens, and may have {limit}"
        foreign = (ids < 0) | (ids >= self._width) | torch.isin(ids, self._context.suppressed.cpu())
        if bool(foreign.any()):
            return f"it writes token {int(ids[foreign][0])}, which student and teacher do not share"
        ends = len(ids) > 0 and int(ids[-1]) in self._context.stop_ids
        if bool(completion.finished) != ends:
            return "a completion is finished where it ends with one of the stop_ids, and only there"
        return None
