"""Interleaved sampling, as in SKD: the student proposes, the teacher replaces what it would hardly say."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from speckd.compatibility import SharedVocabulary
from speckd.errors import ConfigError, DataError, VocabularyError
from speckd.head import LMHead
from speckd.randomness import uniforms
from speckd.sources.choosing import choose
from speckd.sources.rewinding import RewindingReader, check_rewinding, in_eval_mode, input_device
from speckd.sources.writer import Completion, Draws, Prompt, Sampling
from speckd.teachers.in_process import HiddenTeacher
from speckd.teachers.placement import head_on
from speckd.types import DenseSignal

_STREAM = 8  # of random draws, apart from those of gates, caches and scrambling
_LOGITS_BYTES = 2**28  # of the teacher's logits that are held at once

_Context = Callable[[], AbstractContextManager[Any]]


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

    The proposal and the replacement at a position have one uniform each, a function of (seed, turn, sample, position). So a
    text depends neither on `block` nor on what else is in the call, as far as the models' arithmetic does not: products round
    differently in batches of another shape, and a draw that falls between two roundings goes the other way. In float32 that is
    rare (none of 2,400 tokens of two random models); in bfloat16 it is not (their texts parted after 16 tokens on average), and
    what holds there is the distribution.

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
        batch_size: int = 64,
        student_context: _Context = nullcontext,
        teacher_context: _Context = nullcontext,
    ) -> None:
        for name, value, least in (("verify_top_k", verify_top_k, 0), ("block", block, 1), ("batch_size", batch_size, 1)):
            if value < least:
                raise ConfigError(f"{name} is {value}", f"Use {least} or more")
        self.vocabulary, self.verify_top_k, self.block, self.batch_size = vocabulary, verify_top_k, block, batch_size
        self._ids = torch.arange(vocabulary.size) if vocabulary.ids is None else vocabulary.ids
        self._stops = _shared_stops(self._ids, stop_token_ids)
        self._teacher_sampling = teacher_sampling or Sampling()
        device = input_device(student, torch.device("cpu"))
        self._student = _Speaker(student, vocabulary, device, student_context)
        self._teacher = _Speaker(teacher, vocabulary, input_device(teacher, device), teacher_context)
        for speaker, name in ((self._student, "student"), (self._teacher, "teacher")):
            speaker.check(name)

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, draws: Draws) -> list[Completion]:
        """See `Writer.write`; `sampling` is the student's, and its limit the completion's.

        Raises:
            DataError: a prompt is empty, or with its completion longer than a model's positions.
            VocabularyError: a prompt holds a token that the two do not share.
        """
        self._refuse(prompts, sampling.max_completion_length)
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].token_ids))  # little padding
        found: dict[int, Completion] = {}
        with in_eval_mode(self._student.model), in_eval_mode(self._teacher.model):
            for start in range(0, len(order), self.batch_size):
                some = order[start : start + self.batch_size]
                found.update(zip(some, self._written([prompts[number] for number in some], sampling, draws), strict=True))
        return [found[number] for number in range(len(prompts))]

    def _written(self, prompts: Sequence[Prompt], sampling: Sampling, draws: Draws) -> list[Completion]:
        texts = _Texts([prompt.sample for prompt in prompts], [int(prompt.token_ids[-1]) for prompt in prompts], sampling)
        longest = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_completion_length
        starts = [prompt.token_ids[:-1] for prompt in prompts]  # both have read all but the last token, always
        student, teacher = self._student.begin(starts, longest), self._teacher.begin(starts, longest)
        while len(texts.open):
            steps = min(self.block if self.verify_top_k else 1, texts.most_left)  # with K = 0 the first one is rejected
            chances = texts.chances(draws, steps)
            proposed = self._proposed(student, texts.last, sampling, chances[..., 0])
            offered, accepted = self._verified(teacher, texts.last, proposed, chances[..., 1])
            rows, kept = texts.take(self._ids[offered], accepted, torch.isin(offered, self._stops))
            student.reader.keep(rows, kept)
            teacher.reader.keep(rows, kept)
        return texts.completions()

    def _proposed(self, student: "_Begun", last: Tensor, sampling: Sampling, chances: Tensor) -> Tensor:
        """[B] last tokens and [B, n] uniforms -> [B, n] indices of the shared axis, on the CPU."""
        token, found = last, []
        for chance in chances.to(student.device).unbind(-1):
            found.append(choose(student.signal(student.read(token[:, None])[:, 0]).logits, sampling, chance))
            token = self._ids.to(student.device)[found[-1]]
        return torch.stack(found, -1).cpu()

    def _verified(self, teacher: "_Begun", last: Tensor, proposed: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
        """[B, n] proposals with the first rejected one of each row replaced, and [B], how many stand before it."""
        count, steps = proposed.shape
        hidden = teacher.read(torch.cat([last[:, None], self._ids[proposed[:, :-1]]], -1)).flatten(0, 1)
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
        own = choose(signal.logits, self._teacher_sampling, chances[rejected, place].to(teacher.device))
        return proposed.index_put((rejected, place), own.cpu()), accepted

    def _refuse(self, prompts: Sequence[Prompt], limit: int) -> None:
        for prompt in prompts:
            if not len(prompt.token_ids):
                raise DataError(
                    f"the prompt of sample {prompt.sample} is empty", "Give it a token, such as the one that begins a text"
                )
            unknown = self.vocabulary.unknown(prompt.token_ids)
            if unknown.numel():
                raise VocabularyError(
                    f"the prompt of sample {prompt.sample} holds token id {int(unknown[0])}, which the two models do not share",
                    "Remove that token from the data or the chat template, or use a teacher that has it",
                )
            for speaker, name in ((self._student, "student"), (self._teacher, "teacher")):
                if len(prompt.token_ids) + limit > speaker.positions:
                    raise DataError(
                        f"the prompt of sample {prompt.sample} has {len(prompt.token_ids)} tokens and max_completion_length is "
                        f"{limit}, together more than the {name}'s {speaker.positions} positions",
                        "Lower max_completion_length, or shorten or drop such prompts",
                    )


def replaced_share(completions: Sequence[Completion]) -> tuple[int, int]:
    """How many tokens a verifier put in the place of the writer's own, and how many there are."""
    replaced = sum(int(one.replaced.sum()) for one in completions if one.replaced is not None)
    return replaced, sum(len(one.token_ids) for one in completions)


def _shared_stops(ids: Tensor, stop_token_ids: Sequence[int]) -> Tensor:
    """As indices of the shared axis."""
    shared = torch.isin(ids, torch.tensor(list(stop_token_ids), dtype=torch.long)).nonzero()[:, 0]
    if stop_token_ids and not len(shared):
        raise VocabularyError(
            f"student and teacher share none of the stop tokens {sorted(stop_token_ids)}, so no text would end",
            "Use a teacher of the same family, or name a stop token that both have",
        )
    return shared


class _Texts:
    """What N texts have so far, and which are still open. Everything on the CPU."""

    def __init__(self, samples: Sequence[int], last: Sequence[int], sampling: Sampling) -> None:
        shape = (len(samples), sampling.max_completion_length)
        self._tokens, self._replaced = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        self._count, self._finished = torch.zeros(shape[0], dtype=torch.long), torch.zeros(shape[0], dtype=torch.bool)
        self._samples, self.last = torch.tensor(samples), torch.tensor(last)  # `last`: of the open ones, not yet read
        self.open = torch.arange(shape[0])

    @property
    def most_left(self) -> int:
        """Tokens until the last open text reaches its limit."""
        return self._tokens.shape[1] - int(self._count[self.open].min())

    def chances(self, draws: Draws, steps: int) -> Tensor:
        """[B, steps, 2] uniforms of the next positions: for the proposal, for the replacement."""
        position = self._count[self.open][:, None] + torch.arange(steps)
        sample = self._samples[self.open][:, None].expand_as(position)
        found = uniforms(draws.seed, draws.turn, sample.flatten(), position.flatten(), draws=1, stream=_STREAM)
        return found[:, 0].unflatten(0, position.shape)

    def take(self, offered: Tensor, accepted: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
        """Appends [B, n] tokens up to the replaced one, a stop token or the limit, whichever is first.

        Args:
            accepted: [B], where the replaced token stands; n where none does.
            stops: [B, n] bool, which tokens end a text.

        Returns:
            which of the rows go on, [B'], and how many tokens each of them took.
        """
        steps, limit = offered.shape[1], self._tokens.shape[1]
        column, count = torch.arange(steps), self._count[self.open]
        before_stop = (stops.long().cumsum(-1) - stops.long() == 0).sum(-1)  # up to and with the first one
        kept = torch.stack([accepted + 1, before_stop, limit - count, torch.full_like(count, steps)]).amin(0)
        row, place = (column < kept[:, None]).nonzero(as_tuple=True)
        where = (self.open[row], count[row] + place)
        self._tokens[where] = offered[row, place]
        self._replaced[where] = place == accepted[row]
        self._count[self.open] += kept
        rows = torch.arange(len(kept))
        finished = stops[rows, kept - 1]
        self._finished[self.open] = finished
        goes_on = (~finished & (count + kept < limit)).nonzero()[:, 0]
        self.last, self.open = offered[goes_on, kept[goes_on] - 1], self.open[goes_on]
        return goes_on, kept[goes_on]

    def completions(self) -> list[Completion]:
        columns = zip(self._count.tolist(), self._finished.tolist(), self._tokens, self._replaced, strict=True)
        return [Completion(tokens[:n].clone(), done, replaced[:n].clone()) for n, done, tokens, replaced in columns]


class _Speaker:
    """A model as one of the two: where it stands, and what its forwards run in."""

    def __init__(self, model: Any, vocabulary: SharedVocabulary, device: torch.device, context: _Context) -> None:
        self.model, self._vocabulary, self._device, self._context = model, vocabulary, device, context
        self.positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31

    def check(self, name: str) -> None:
        with in_eval_mode(self.model), self._context():
            check_rewinding(self.model.get_decoder(), name, self._device)

    def begin(self, starts: Sequence[Tensor], longest: int) -> "_Begun":
        with self._context():
            head = self._vocabulary.restrict(LMHead.from_model(self.model))
            reader = RewindingReader(self.model.get_decoder(), starts, longest, self._device)
        return _Begun(reader, head, self._device, self._context)


class _Begun:
    """A model in the middle of some texts."""

    def __init__(self, reader: RewindingReader, head: LMHead, device: torch.device, context: _Context) -> None:
        self.reader, self.device, self._head, self._context = reader, device, head_on(head, device), context

    def read(self, tokens: Tensor) -> Tensor:
        with self._context():
            return self.reader.read(tokens)

    def signal(self, hidden: Tensor) -> DenseSignal:
        """[n, H] -> the distributions over the shared axis."""
        return HiddenTeacher(hidden, self._head).signal(torch.arange(len(hidden), device=hidden.device))
