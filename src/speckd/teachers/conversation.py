"""What is said between a run and any one of its teacher's servers: questions and answers, and the start, when it is found out
whether the server can give them."""

import asyncio
import itertools
import secrets
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from speckd.errors import CapabilityError, ConfigError, SpeckdError, TeacherLostError, VocabularyError
from speckd.teachers import dialect as spoken
from speckd.teachers.answers import Answer
from speckd.teachers.dialect import BadAnswer, Dialect, Reply, ServedModel, TooFewInside, Wanted, check_labels, checked, drift
from speckd.teachers.exchange import MESSAGE_BYTES, Broken, Connections, Refused, Unreachable, parsed

#: Bytes that an entry {id: {logprob, rank, decoded_token}} may have; about 70 are usual, more where a token's text is long.
_ENTRY_BYTES = 512
_CANARY_TOKENS = 16
_MOST_SPARE = 1024
_LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True)
class ServerFacts:
    """What a server showed at the start.

    `longest`: tokens it takes, where it says so; `repeats_tokens`, `repeats_request`: its responses say what was asked;
    `tokenizer_checked`: it could be asked to tokenize; `noise`: the `drift` between two of its answers to one question, alone
    and beside others.
    """

    url: str
    model: str
    longest: int | None
    repeats_tokens: bool = False
    repeats_request: bool = False
    tokenizer_checked: bool = False
    noise: float = 0.0


@dataclass(eq=False)
class Conversation:
    """One teacher, whichever server is asked.

    `vocabulary`: the shared one's size; `top_k`: None for all of it; `model`: None for the only one served; `tolerance`: how
    far an answer to the canary may drift; `canary_ids`, `canary`: a sequence asked along with every request, and its answer;
    `spare`: how many tokens more than K are asked for, because some are not in the shared vocabulary; `outside`: entries left
    out for that reason.
    """

    dialect: Dialect
    vocabulary: int
    top_k: int | None
    model: str | None
    tolerance: float
    spare: int = 0
    outside: int = 0
    canary_ids: list[int] = field(default_factory=list)
    canary: Answer | None = None
    nonce: str = field(default_factory=lambda: secrets.token_hex(4))
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def wanted(self) -> Wanted:
        return Wanted((self.vocabulary if self.top_k is None else self.top_k) + self.spare, whole=self.top_k is None)

    @property
    def canary_positions(self) -> list[int]:
        return list(range(len(self.canary_ids) - 1))

    def new_request_id(self) -> str:
        return f"speckd-{self.nonce}-{next(self._numbers)}"

    def nothing(self) -> Answer:
        """The answer at no position."""
        width = self.vocabulary if self.top_k is None else self.top_k
        ids = None if self.top_k is None else torch.empty(0, width, dtype=torch.int64)
        return Answer(torch.empty(0, dtype=torch.int64), ids, torch.empty(0, width), torch.empty(0))

    def check_ids(self, ids: list[int]) -> None:
        """
        Raises:
            VocabularyError: a token that the teacher may not know, or know as another one.
        """
        place = next((i for i, token in enumerate(ids) if not 0 <= token < self.vocabulary), None)
        if place is not None:
            what = f"token {ids[place]} at position {place} lies outside of the shared vocabulary of {self.vocabulary}"
            raise VocabularyError(what, "Use a teacher with the student's vocabulary")

    def choose_canary(self, texts: Many[tuple[str, list[int]]], remembered: Answer | None) -> None:
        """The start of the first text, as the teacher is used to; without a text, tokens from all over the vocabulary."""
        ids = next((ids for _, ids in texts if len(ids) > 3), [])[:_CANARY_TOKENS]
        self.canary_ids = ids or [(13 + 7919 * i) % self.vocabulary for i in range(_CANARY_TOKENS)]
        self.check_ids(self.canary_ids)
        self.canary = remembered

    def widen(self) -> bool:
        """Asks for more tokens from now on. False where that is no longer reasonable."""
        if self.spare >= _MOST_SPARE:
            return False
        self.spare = max(8, 2 * self.spare)
        return True

    # Questions

    async def answers(
        self,
        connections: Connections,
        facts: ServerFacts,
        sequences: list[list[int]],
        positions: list[list[int]],
        request_id: str,
    ) -> list[Answer]:
        """The answers of one request, in which the canary's is what it was.

        Raises:
            Unreachable, Broken, Refused, BadAnswer, TooFewInside: there are none, or none that can be believed.
        """
        *found, canary = await self._asked(
            connections, facts, [*sequences, self.canary_ids], [*positions, self.canary_positions], request_id
        )
        self._compare_canary(canary)
        return found

    async def _asked(
        self,
        connections: Connections,
        facts: ServerFacts,
        sequences: list[list[int]],
        positions: list[list[int]],
        request_id: str,
    ) -> list[Answer]:
        wanted = self.wanted
        body = self.dialect.write(facts.model, sequences, wanted, request_id)
        raw = await connections.post(self.dialect.path, body, request_id, _most_bytes(sequences, wanted))
        try:
            answers, outside = await asyncio.to_thread(self._understood, raw, facts, sequences, positions, wanted, request_id)
        except BadAnswer:
            await connections.close()  # one of them may hold more of the same
            raise
        self.outside += outside
        return answers

    def _understood(
        self,
        raw: bytes,
        facts: ServerFacts,
        sequences: list[list[int]],
        positions: list[list[int]],
        wanted: Wanted,
        request_id: str,
    ) -> tuple[list[Answer], int]:
        reply = self.dialect.read(parsed(raw), sequences, positions, wanted)
        _check_source(reply, sequences, request_id, facts)
        found = []
        for heard, sequence, places in zip(reply.heard, sequences, positions, strict=True):
            check_labels(heard, [sequence[place + 1] for place in places])
            found.append(checked(heard, torch.tensor(places), self.top_k, self.vocabulary))
        return [answer for answer, _ in found], sum(outside for _, outside in found)

    def _compare_canary(self, answer: Answer) -> None:
        assert self.canary is not None
        moved = drift(self.canary, answer)
        if moved > self.tolerance:
            raise BadAnswer(f"the model is another one: what is known of it differs by {moved:.3g} nat in the mean")

    # The start

    async def start(
        self, connections: Connections, deadline: float, longest: int, texts: Many[tuple[str, list[int]]]
    ) -> ServerFacts:
        """What `ServerPool.probe` says, for one server; `deadline`: of the monotonic clock."""
        server, wait = f"teacher server {connections.url}", connections.timeouts
        pause_s, broken = wait.backoff_s, ""
        least = min(wait.connect_s, wait.ready_s)  # seconds for one that is up, where another has used them all
        while True:
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), least)):  # however long one request may take
                    return await self._examined(connections, longest, texts)
            except Refused as error:
                raise ConfigError(f"{server}: {error}", error.fix) from None
            except BadAnswer as error:
                what = f"{server} does not answer as a teacher must: {error}"
                raise CapabilityError(what, "Check the address and the dialect, or use a newer version of the server") from None
            except TimeoutError:
                what = f"{server} is not ready after {wait.ready_s:g} s: it gave no answer"
                raise TeacherLostError(what, "See its own log, or take it out of the list") from None
            except (Unreachable, Broken) as error:
                if isinstance(error, Broken) and not broken:
                    broken = str(error)  # why it may be down now
                if time.monotonic() + pause_s > deadline:
                    before = f", and before that: {broken}" if broken not in ("", str(error)) else ""
                    what = f"{server} is not ready after {wait.ready_s:g} s: {error}{before}"
                    raise TeacherLostError(what, "Start it, or take it out of the list") from None
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _examined(self, connections: Connections, longest: int, texts: Many[tuple[str, list[int]]]) -> ServerFacts:
        offered = offered_models(parsed(await connections.get("/v1/models", self.new_request_id())))
        model = self._chosen(connections.url, offered)
        if model.longest is not None and model.longest < longest + 1:
            raise CapabilityError(
                f"teacher server {connections.url} takes {model.longest - 1} tokens, and the longest sequence has {longest}",
                f"Start it with {self.dialect.lengthen(longest + 1)}, or lower max_length",
            )
        told = await self._tokenizes_alike(connections, model.name, texts)
        facts = ServerFacts(connections.url, model.name, model.longest, tokenizer_checked=told)
        facts = await self._with_echoes(connections, facts)
        return replace(facts, noise=await self._noise(connections, facts))

    def _chosen(self, url: str, offered: list[ServedModel]) -> ServedModel:
        names = [model.name for model in offered]
        if self.model is None and len(offered) == 1:
            return offered[0]
        if self.model not in names:
            what = f"teacher server {url} offers {', '.join(names) or 'no model'}; wanted: {self.model or 'the only one'}"
            raise ConfigError(what, "Name one of these as the teacher, or start the server with that model")
        return offered[names.index(self.model)]

    async def _tokenizes_alike(self, connections: Connections, model: str, texts: Many[tuple[str, list[int]]]) -> bool:
        """Whether it could be asked."""
        for text, expected in texts:
            body = {"model": model, "prompt": text, "add_special_tokens": False}
            try:
                raw = await connections.post("/tokenize", body, self.new_request_id(), MESSAGE_BYTES + 64 * len(text))
            except Refused:
                return False
            found = spoken.field(parsed(raw), "tokens", list)
            if found != expected:
                what = f"has the wrong tokenizer: {text!r:.40} is {found!s:.40}, not {expected!s:.40}"
                raise VocabularyError(
                    f"teacher server {connections.url} {what}", "Serve a teacher with the student's tokenizer"
                )
        return bool(texts)

    async def _with_echoes(self, connections: Connections, facts: ServerFacts) -> ServerFacts:
        """How its responses can be told apart, and that there are as many log-probabilities as wanted."""
        wanted, request_id = self.wanted, self.new_request_id()
        body = self.dialect.write(facts.model, [self.canary_ids], wanted, request_id)
        try:
            raw = await connections.post(self.dialect.path, body, request_id, _most_bytes([self.canary_ids], wanted))
        except Refused as error:
            raise await self._why_refused(connections, facts, wanted, error) from None
        reply = self.dialect.read(parsed(raw), [self.canary_ids], [self.canary_positions], wanted)
        tokens, request = reply.heard[0].token_ids is not None, reply.request_id == request_id
        if not (tokens or request):
            what = f"teacher server {facts.url} repeats neither tokens nor the request's id: answers could be mixed up unseen"
            raise CapabilityError(what, "Use a newer version of the server (vLLM 0.10.2 or later)")
        return replace(facts, repeats_tokens=tokens, repeats_request=request)

    async def _why_refused(self, connections: Connections, facts: ServerFacts, wanted: Wanted, error: Refused) -> SpeckdError:
        """The same with one log-probability tells whether their number is the reason."""
        request_id = self.new_request_id()
        body = self.dialect.write(facts.model, [self.canary_ids], Wanted(1), request_id)
        try:
            await connections.post(self.dialect.path, body, request_id, MESSAGE_BYTES)
        except Refused:
            return ConfigError(f"teacher server {facts.url}: {error}", error.fix)
        what = f"teacher server {facts.url} gives fewer than {wanted.count} log-probabilities a token ({error})"
        return CapabilityError(what, f"Start it with {self.dialect.allow(wanted)}, or lower the teacher's top K")

    async def _noise(self, connections: Connections, facts: ServerFacts) -> float:
        """Between the canary's answers alone and beside others; it becomes the one to compare with, if there is none yet."""
        ids, places = self.canary_ids, self.canary_positions
        try:
            alone, *_ = await self._asked(connections, facts, [ids], [places], self.new_request_id())
            both = [ids[::-1], ids, ids[1:]]
            beside = await self._asked(connections, facts, both, [places, places, places[:-1]], self.new_request_id())
        except TooFewInside:
            if not self.widen():
                what = f"of teacher server {facts.url}'s first {_MOST_SPARE} tokens too few are shared with the student"
                raise VocabularyError(what, "Use a teacher with the student's vocabulary") from None
            await self._with_echoes(connections, facts)
            return await self._noise(connections, facts)
        noise = drift(alone, beside[1])
        if noise > self.tolerance:
            raise CapabilityError(
                f"teacher server {facts.url} gives one question two answers, {noise:.3g} nat apart",
                "Start it in batch-invariant mode or without prefix caching, or raise the tolerance",
            )
        self.canary = self.canary or alone
        self._compare_canary(alone)
        return noise


def _most_bytes(sequences: list[list[int]], wanted: Wanted) -> int:
    """Of an answer to them; a server's own vocabulary may be somewhat larger than the shared one."""
    entries = 2 * wanted.count + 4096 if wanted.whole else wanted.count + 2
    return sum(map(len, sequences)) * entries * _ENTRY_BYTES + MESSAGE_BYTES


def offered_models(reply: Any) -> list[ServedModel]:
    """Of `/v1/models`, parsed."""
    offered = []
    for card in spoken.field(reply, "data", list):
        longest = card.get("max_model_len") if isinstance(card, dict) else None
        name, adapted = spoken.field(card, "id", str), card.get("parent") is not None  # vLLM's cards; others have no such field
        offered.append(ServedModel(name, longest if isinstance(longest, int) else None, adapted))
    return offered


def _check_source(reply: Reply, sequences: list[list[int]], request_id: str, facts: ServerFacts) -> None:
    """The response is to this request, of this model, about these tokens."""
    if reply.model is not None and reply.model != facts.model:
        raise BadAnswer(f"it is by the model '{reply.model:.60}', not '{facts.model}'")
    if facts.repeats_request and reply.request_id != request_id:
        raise BadAnswer(f"it is to another request ({reply.request_id!s:.60})")
    for number, (heard, sequence) in enumerate(zip(reply.heard, sequences, strict=True)):
        if heard.token_ids != sequence and (facts.repeats_tokens or heard.token_ids is not None):
            raise BadAnswer(f"answer {number} is about other tokens than were asked")
