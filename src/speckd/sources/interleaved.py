"""Interleaved sampling, as in SKD: the student proposes, the teacher replaces what it would hardly say."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from speckd.compatibility import SharedVocabulary
from speckd.errors import ConfigError
from speckd.sources.model_writer import ROWS_AT_ONCE
from speckd.sources.sampling import draw
from speckd.sources.two_models import Begun, Context, Texts, TwoModels
from speckd.sources.writer import Completion, Draws, Prompt, Sampling

_LOGITS_BYTES = 2**28  # of the teacher's logits that are held at once


class InterleavedWriter:
    """Continues prompts by Speculative Knowledge Distillation's rule (Xu et al., arXiv 2410.11325, Algorithm 1):

        yᵢ ~ M_s(· | y₍<ᵢ₎, x)                        the student proposes
        if yᵢ ∉ top_K(M_t(· | y₍<ᵢ₎, x)):             the teacher verifies
            yᵢ ~ M_t(· | y₍<ᵢ₎, x)                    and puts a token of its own in that place

    So each token is distributed as `P(v) = q(v)·1[v ∈ top_K(p)] + p(v)·Σ_{u ∉ top_K(p)} q(u)`, with q the student and p the
    teacher as they sample. A replacement is drawn from all of p, not from its top-K, and may be the proposal again, marked as
    replaced all the same. Ranks are those of the teacher's logits, which no temperature moves and no truncation cuts; of
    tokens that tie at the border of the top-K, all are in it. `verify_top_k` = V never rejects: pure student sampling, the
    paper's on-policy end. 0 rejects everything: pure teacher sampling, its supervised end.

    Read of the paper was Algorithm 1, in its LaTeX source; that the student proposes in blocks of 5 and that K is 25 are taken
    from descriptions of it. Blocks are a matter of speed only: the teacher verifies a block in one forward, the first rejected
    token is replaced, and what the student said after it is forgotten and proposed anew. Stop tokens are proposed and verified
    like any other.

    The proposal and the replacement at a position have one uniform each, a function of (seed, turn, sample, position), that of
    the proposal the same as `ModelWriter`'s: at K = V the two write the same text. A text depends neither on `block` nor on
    what else is in the call, as far as the models' arithmetic does not: products round differently in batches of another shape,
    and a draw that falls between two roundings goes the other way. In float32 that is rare (none of 2,400 tokens of two random
    models); in bfloat16 it is not (their texts parted after 16 tokens on average), and what holds there is the distribution.

    Args:
        student, teacher: Transformers causal language models, the student possibly wrapped by PEFT. Weights and heads are read
            anew at each call, in eval mode; modes are restored.
        vocabulary: what they share. Only its tokens are written.
        stop_token_ids: which end a text. Those that the two do not share cannot occur.
        verify_top_k: K, 0 to any.
        block: tokens that are proposed before the teacher is asked.
        teacher_sampling: how a replacement is drawn; its length plays no part. The student's way is given with each call.
        batch_size: texts that are written side by side.
        student_context, teacher_context: what their forwards run in, such as autocast, or the base of an adapted student as the
            teacher (`teachers.base.without_adapter`).

    Raises:
        ConfigError: K, block or batch_size out of range.
        VocabularyError: stop tokens are given, and none of them is shared.
        CapabilityError: a model's cache cannot be rewound.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        vocabulary: SharedVocabulary,
        stop_token_ids: Sequence[int],
        verify_top_k: int = 25,
        block: int = 5,
        teacher_sampling: Sampling | None = None,
        batch_size: int = ROWS_AT_ONCE,
        student_context: Context = nullcontext,
        teacher_context: Context = nullcontext,
    ) -> None:
        for name, value, least in (("verify_top_k", verify_top_k, 0), ("block", block, 1)):
            if value < least:
                raise ConfigError(f"{name} is {value}", f"Use {least} or more")
        self.vocabulary, self.verify_top_k, self.block = vocabulary, verify_top_k, block
        self._teacher_sampling = teacher_sampling or Sampling()
        self._both = TwoModels(student, teacher, vocabulary, stop_token_ids, batch_size, student_context, teacher_context)

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, draws: Draws) -> list[Completion]:
        """See `Writer.write`; `sampling` is the student's, and its limit the completion's, which ends at the last position that
        both models have: a prompt that fills them all gets a completion without tokens.

        Raises:
            DataError: a prompt is empty.
            VocabularyError: a prompt holds a token that the two do not share.
        """
        return self._both.write(prompts, sampling.max_completion_length, partial(self._finish, sampling, draws))

    def _finish(self, sampling: Sampling, draws: Draws, texts: Texts, student: Begun, teacher: Begun) -> None:
        while len(texts.open):  # both have read all but the last token of each, always
            steps = min(self.block if self.verify_top_k else 1, texts.most_left)  # with K = 0 the first one is rejected
            chances = texts.chances(draws, steps)
            proposed = self._proposed(student, texts.last, sampling, chances[..., 0])
            offered, accepted = self._verified(teacher, texts.last, proposed, chances[..., 1])
            rows, kept = texts.take(self._both.ids[offered], accepted, torch.isin(offered, self._both.stops))
            student.reader.keep(rows, kept)
            teacher.reader.keep(rows, kept)

    def _proposed(self, student: Begun, last: Tensor, sampling: Sampling, chances: Tensor) -> Tensor:
        """[B] last tokens and [B, n] uniforms -> [B, n] indices of the shared axis, on the CPU."""
        token, found = last, []
        for chance in chances.to(student.device).unbind(-1):
            found.append(draw(student.signal(student.read(token[:, None])[:, 0]).logits, sampling, chance))
            token = self._both.ids.to(student.device)[found[-1]]
        return torch.stack(found, -1).cpu()

    def _verified(self, teacher: Begun, last: Tensor, proposed: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
        """[B, n] proposals with the first rejected one of each row replaced, and [B], how many stand before it."""
        count, steps = proposed.shape
        hidden = teacher.read(torch.cat([last[:, None], self._both.ids[proposed[:, :-1]]], -1)).flatten(0, 1)
        asked = proposed.flatten().to(teacher.device)
        step = max(1, _LOGITS_BYTES // (4 * self.vocabulary.size))
        pieces = zip(hidden.split(step), asked.split(step), strict=True)
        verdicts = [teacher.signal(states).in_top_k(ids, self.verify_top_k) for states, ids in pieces]
        accepted = torch.cat(verdicts).view(count, steps).long().cumprod(-1).sum(-1).cpu()
        rejected = (accepted < steps).nonzero()[:, 0]
        if not len(rejected):
            return proposed, accepted
        place = accepted[rejected]
        signal = teacher.signal(hidden[(rejected * steps + place).to(hidden.device)])
        own = draw(signal.logits, self._teacher_sampling, chances[rejected, place].to(teacher.device))
        return proposed.index_put((rejected, place), own.cpu()), accepted
