"""Speculative decoding as it is served: the model drafts, the teacher verifies, and what is written is the teacher's.

Leviathan et al. 2023, arXiv 2211.17192, Algorithm 1; Chen et al. 2023, arXiv 2302.01318, Algorithm 2.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from speckd.compatibility import SharedVocabulary
from speckd.sources.sampling import drawn, probabilities
from speckd.sources.two_models import Begun, Texts, TwoModels
from speckd.sources.writer import Completion, Draws, Prompt, Sampling


@dataclass
class Tally:
    """Of one text. `calls`: of the teacher; `tokens`: written; `tests`: drafted tokens that were put to the test and are in the
    text or were replaced; `accepted`: of these; `alpha`: the sum of their chances Σ min(p, q); `own`: tokens of the teacher's
    own, in the place of a rejected one or behind a whole draft."""

    calls: int = 0
    tokens: int = 0
    tests: int = 0
    accepted: int = 0
    alpha: float = 0.0
    own: int = 0


class SpeculativeDecoder:
    """Writes what the teacher would write, in blocks that the model drafts.

        x₁…x_γ ~ q                                 the model drafts
        x_i is accepted with chance min(1, p(x_i) / q(x_i)), until the first that is not
        there, x ~ max(0, p − q) / Σ max(0, p − q)   the residual
        behind γ accepted ones, x ~ p

    So each token is distributed as the teacher's p, and one test is passed with the chance Σ min(p, q) given what stands
    before. At temperature 0 both distributions are one token, and the text is the teacher's greedy one, but for ties within
    rounding. Both keep caches, and forget what was not accepted.

    A token has two uniforms, functions of (seed, turn, sample, position): one draws the draft's, the other decides, and, scaled
    back to [0, 1), draws from the residual.

    Args:
        draft, teacher: Transformers causal language models.
        vocabulary: what they share; only its tokens are written.
        stop_token_ids: which end a text.
        draft_length: γ.
        batch_size: texts that are written side by side.

    Raises:
        CapabilityError: a model's cache cannot be rewound.
    """

    def __init__(
        self,
        draft: Any,
        teacher: Any,
        vocabulary: SharedVocabulary,
        stop_token_ids: Sequence[int],
        draft_length: int,
        batch_size: int,
    ) -> None:
        self.draft_length = draft_length
        self._both = TwoModels(draft, teacher, vocabulary, stop_token_ids, batch_size, nullcontext, nullcontext)

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, draws: Draws) -> tuple[list[Completion], dict[int, Tally]]:
        """One completion a prompt, and by sample what it took. `sampling` is both models'."""
        tallies: dict[int, Tally] = defaultdict(Tally)
        finish = partial(self._finish, sampling, draws, tallies)
        return self._both.write(prompts, sampling.max_completion_length, finish), tallies

    def _finish(
        self, sampling: Sampling, draws: Draws, tallies: dict[int, Tally], texts: Texts, draft: Begun, teacher: Begun
    ) -> None:
        while len(texts.open):  # both have read all but the last token of each, always
            steps = min(self.draft_length, texts.most_left)
            chances = texts.chances(draws, steps + 1)
            proposed, q = self._drafted(draft, texts.last, sampling, chances[:, :steps, 0])
            offered, accepted, alpha = self._verified(teacher, texts.last, proposed, q, sampling, chances[..., 1])
            opened, samples = texts.open, texts.samples
            before = texts.count(opened)
            rows, kept = texts.take(offered, accepted, torch.isin(offered, self._both.stops))
            _add(tallies, samples, texts.count(opened) - before, accepted, alpha)
            if len(kept) and int(kept.max()) > steps:  # a whole draft stands: the model has not read its last token
                draft.read(self._both.ids[proposed[:, -1:]])
            draft.reader.keep(rows, kept)
            teacher.reader.keep(rows, kept)

    def _drafted(self, draft: Begun, last: Tensor, sampling: Sampling, chances: Tensor) -> tuple[Tensor, Tensor]:
        """[B] last tokens, [B, γ] uniforms -> [B, γ] indices of the shared axis, and [B, γ, V] what they were drawn from."""
        token, found, distributions = last, [], []
        for chance in chances.to(draft.device).unbind(-1):
            q = probabilities(draft.signal(draft.read(token[:, None])[:, 0]).logits, sampling)
            found.append(drawn(q, chance))
            distributions.append(q)
            token = self._both.ids.to(draft.device)[found[-1]]
        return torch.stack(found, -1).cpu(), torch.stack(distributions, 1)

    def _verified(
        self, teacher: Begun, last: Tensor, proposed: Tensor, q: Tensor, sampling: Sampling, chances: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, γ + 1] tokens, of which those behind the first that is the teacher's own count for nothing; [B], how many drafted
        ones stand before it; [B, γ], the chance that each had to be accepted. On the CPU."""
        count, steps = proposed.shape
        hidden = teacher.read(torch.cat([last[:, None], self._both.ids[proposed]], -1)).flatten(0, 1)
        p = probabilities(teacher.signal(hidden).logits, sampling).view(count, steps + 1, -1)
        q, ids, chance = q.to(p.device), proposed.to(p.device), chances.to(p.device)
        ratio = (p[:, :-1].gather(-1, ids[..., None]) / q.gather(-1, ids[..., None]))[..., 0]
        passed = chance[:, :-1] < ratio
        accepted = passed.long().cumprod(-1).sum(-1)
        row, whole = torch.arange(count, device=p.device), accepted == steps
        place = accepted.clamp(max=steps - 1)
        residual = (p[row, place] - q[row, place]).clamp(min=0)
        nothing = residual.sum(-1, keepdim=True) <= 0  # rejected by rounding alone
        rejecting = ((chance[row, place] - ratio[row, place]) / (1 - ratio[row, place])).clamp(0, 1 - 2**-53)
        own = drawn(
            torch.where(whole[:, None], p[:, -1], torch.where(nothing, p[row, place], residual)),
            torch.where(whole, chance[:, -1], rejecting),
        )
        offered = torch.cat([ids, ids[:, -1:]], -1).index_put((row, accepted), own)
        return offered.cpu(), accepted.cpu(), torch.minimum(p[:, :-1], q).sum(-1).clamp(max=1).cpu()


def _add(tallies: dict[int, Tally], samples: Tensor, kept: Tensor, accepted: Tensor, alpha: Tensor) -> None:
    steps = alpha.shape[1]
    for row, (sample, count, passed) in enumerate(zip(samples.tolist(), kept.tolist(), accepted.tolist(), strict=True)):
        own, tests = tallies[sample], min(count, steps)
        own.calls += 1
        own.tokens += count
        own.tests += tests
        own.accepted += min(count, passed)
        own.alpha += float(alpha[row, :tests].sum())
        own.own += count > passed
