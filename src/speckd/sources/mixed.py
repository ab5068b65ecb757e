"""Teacher-mixed sampling, as in MiniLLM: each token from a mixture of both models' distributions."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from speckd.compatibility import SharedVocabulary
from speckd.errors import ConfigError
from speckd.sources.model_writer import ROWS_AT_ONCE
from speckd.sources.sampling import drawn, probabilities
from speckd.sources.two_models import Begun, Context, Texts, TwoModels
from speckd.sources.writer import Completion, Draws, Prompt, Sampling


class MixedWriter:
    """Continues prompts by MiniLLM's teacher-mixed sampling (Gu et al., arXiv 2306.08543, eq. 4):

        yᵢ ~ p̃ = α·p(· | y₍<ᵢ₎, x) + (1 − α)·q(· | y₍<ᵢ₎, x)

    with q the student and p the teacher, both at the call's sampling (temperature and truncation of each by itself). Both read
    every token, each in one cache for all texts. The uniform at a position is that of `ModelWriter`: with α = 0 the two write
    the same text, and α = 1 is the teacher's alone.

    Args:
        student, teacher, vocabulary, stop_token_ids, batch_size, student_context, teacher_context: as of `InterleavedWriter`.
        teacher_mix: α, 0 to 1; the paper's is 0.2.

    Raises:
        ConfigError: teacher_mix or batch_size out of range.
        VocabularyError: stop tokens are given, and none of them is shared.
        CapabilityError: a model's cache cannot be rewound.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        vocabulary: SharedVocabulary,
        stop_token_ids: Sequence[int],
        teacher_mix: float = 0.2,
        batch_size: int = ROWS_AT_ONCE,
        student_context: Context = nullcontext,
        teacher_context: Context = nullcontext,
    ) -> None:
        if not 0 <= teacher_mix <= 1:
            raise ConfigError(f"teacher_mix is {teacher_mix}", "Use a share between 0 and 1")
        self.teacher_mix = teacher_mix
        self._both = TwoModels(student, teacher, vocabulary, stop_token_ids, batch_size, student_context, teacher_context)

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, draws: Draws) -> list[Completion]:
        """See `Writer.write`; a prompt that fills all positions of one of the models gets a completion without tokens.

        Raises:
            DataError: a prompt is empty.
            VocabularyError: a prompt holds a token that the two do not share.
        """
        found = self._both.write(prompts, sampling.max_completion_length, partial(self._finish, sampling, draws))
        return [replace(one, replaced=None) for one in found]  # nobody verifies

    def _finish(self, sampling: Sampling, draws: Draws, texts: Texts, student: Begun, teacher: Begun) -> None:
        while len(texts.open):
            chances = texts.chances(draws, 1)[:, 0, 0]
            q, p = (self._next(model, texts.last, sampling) for model in (student, teacher))
            mixture = (1 - self.teacher_mix) * q + self.teacher_mix * p.to(q.device)
            found = drawn(mixture, chances.to(q.device)).cpu()[:, None]
            rows, kept = texts.take(self._both.ids[found], torch.ones(len(found)).long(), torch.isin(found, self._both.stops))
            student.reader.keep(rows, kept)
            teacher.reader.keep(rows, kept)

    @staticmethod
    def _next(model: Begun, last: Tensor, sampling: Sampling) -> Tensor:
        """[B] last tokens -> [B, V] probabilities on the shared axis."""
        return probabilities(model.signal(model.read(last[:, None])[:, 0]).logits, sampling)
