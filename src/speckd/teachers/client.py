"""Teachers' servers, asked together: who is asked what and when, what is done when one fails, and which answers are believed.

A thread of its own runs the requests, so that questions can be asked ahead of need. Nothing is answered in part, or guessed: a
question ends with its answer, checked, or with an error.
"""

import asyncio
import hashlib
import itertools
import secrets
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable
from collections.abc import Sequence as Many
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import httpx
import torch
from torch import Tensor

from speckd.errors import CapabilityError, ConfigError, DataError, SpeckdError, TeacherLostError, VocabularyError
from speckd.teachers import dialect as spoken
from speckd.teachers.answers import Answer
from speckd.teachers.dialect import BadAnswer, Dialect, Reply, ServedModel, TooFewInside, Wanted, check_labels, checked, drift
from speckd.teachers.exchange import MESSAGE_BYTES, Broken, Connections, Refused, Timeouts, Unreachable, key, parsed, server_url

#: Bytes that an entry {id: {logprob, rank, decoded_token}} may have; about 70 are usual, more where a token's text is long.
_ENTRY_BYTES = 512
_CANARY_TOKENS = 16
_MOST_SPARE = 1024
_T = TypeVar("_T")


@dataclass(frozen=True)
class Load:
    """`concurrency`: requests at a time to one server; `tokens`: of the sequences in one request, unless a single one has more;
    `attempts`: how often one question may fail for reasons of its own (a wrong answer, a request that breaks)."""

    concurrency: int = 4
    tokens: int = 4096
    attempts: int = 6

    def __post_init__(self) -> None:
        wrong = [name for name, value in vars(self).items() if value < 1]
        if wrong:
            raise ConfigError(f"{wrong[0]} of the teacher's servers is {getattr(self, wrong[0])}", "Give at least 1")


@dataclass(frozen=True)
class Counters:
    """What was done until now. `asked` = `answered` + `failed` + those still under way.

    `requests`: sent; `retries`: questions asked again; `invalid`: responses not believed; `splits`: requests halved; `outside`:
    entries left out because their tokens are not in the shared vocabulary; `received_bytes`; `waited_s`: spent in `gather`.
    """

    asked: int = 0
    answered: int = 0
    failed: int = 0
    requests: int = 0
    retries: int = 0
    invalid: int = 0
    splits: int = 0
    outside: int = 0
    received_bytes: int = 0
    waited_s: float = 0.0


@dataclass(frozen=True)
class ServerFacts:
    """What a server showed at the start. `longest`: tokens it takes, where it says so; `repeats_tokens`, `repeats_request`: its
    responses say what was asked; `tokenizer_checked`: it could be asked to tokenize; `noise`: nats between two answers to one
    question, alone and beside others."""

    url: str
    model: str
    longest: int | None
    repeats_tokens: bool
    repeats_request: bool
    tokenizer_checked: bool
    noise: float


@dataclass(eq=False)
class _Question:
    token_ids: list[int]
    positions: list[int]
    future: "Future[Answer]"
    failures: int = 0

    @property
    def asked(self) -> list[int]:
        """No more of the sequence than what the positions' answers depend on."""
        return self.token_ids[: self.positions[-1] + 2]


@dataclass(eq=False)
class _Group:
    """Questions that go in one request. `avoid`: servers that have answered them wrongly or refused them."""

    questions: list[_Question]
    avoid: set[int] = field(default_factory=set)

    @property
    def tokens(self) -> int:
        return sum(len(question.asked) for question in self.questions)


@dataclass(eq=False)
class _Server:
    number: int
    connections: Connections
    budget: int
    in_flight: int = 0
    failures: int = 0
    until: float = 0.0
    down_since: float | None = None
    cause: str = ""
    facts: ServerFacts | None = None

    @property
    def url(self) -> str:
        return self.connections.url


class ServerPool:
    """Several servers of one teacher.

    Args:
        urls: their addresses, http or https.
        dialect: how they are spoken to.
        vocabulary: the shared vocabulary's size; ids from there on belong to the teacher alone.
        top_k: how many of the most probable tokens each answer has; None for the whole vocabulary.
        model: the served model's name; None for the only one that a server offers.
        timeouts, load: how long to wait, and how much to ask at a time.
        tolerance: nats, in the mean over the canary's tokens, by which a server's answers may differ from one time to another.

    Raises:
        ConfigError: an address, number or key that cannot be used.
    """

    def __init__(
        self,
        urls: Many[str],
        dialect: Dialect,
        *,
        vocabulary: int,
        top_k: int | None,
        model: str | None = None,
        timeouts: Timeouts | None = None,
        load: Load | None = None,
        tolerance: float = 1e-2,
    ) -> None:
        addresses = [server_url(url) for url in urls]
        if not addresses or len(set(addresses)) < len(addresses):
            raise ConfigError("the teacher's servers are none, or one is named twice", "Name each server once")
        if top_k is not None and top_k < 1:
            raise ConfigError(f"the teacher's top K is {top_k}", "Give at least 1")
        self._timeouts, self._load = timeouts or Timeouts(), load or Load()
        self._dialect, self._vocabulary, self._tolerance = dialect, vocabulary, tolerance
        self._top_k = None if top_k is None else min(top_k, vocabulary)
        self._model = model
        secret, tls = key(), httpx.create_ssl_context()
        connections = [Connections(address, self._timeouts, secret, tls) for address in addresses]
        self._servers = [_Server(i, each, self._load.tokens) for i, each in enumerate(connections)]
        self._canary_ids: list[int] = []
        self._canary: Answer | None = None
        self._spare = 0
        self._nonce = secrets.token_hex(4)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._counts = Counters()
        self._fresh: deque[_Question] = deque()
        self._again: deque[_Group] = deque()
        self._open: set[_Question] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # What a caller does

    def probe(
        self, longest: int, texts: Many[tuple[str, list[int]]] = (), remembered: Answer | None = None
    ) -> list[ServerFacts]:
        """Waits until the servers are up, and finds out whether they can answer what will be asked.

        Args:
            longest: tokens of the longest sequence.
            texts: some texts and their token ids by the student's tokenizer, without special tokens. The first one's start is
                the canary: a sequence asked along with every request, whose answer must stay what it is.
            remembered: `canary` of an earlier run that this one goes on with.

        Raises:
            TeacherLostError: a server is not up in time.
            ConfigError, CapabilityError, VocabularyError: what a server cannot do, and what to start it with.
        """
        canary = next((ids for _, ids in texts if len(ids) > 3), [])[:_CANARY_TOKENS]
        self._canary_ids = canary or [(13 + 7919 * i) % self._vocabulary for i in range(_CANARY_TOKENS)]
        self._check_ids(self._canary_ids)
        self._canary = remembered
        return self._wait_for(self._probe_all(longest, texts))

    @property
    def canary(self) -> Answer:
        """What the servers said of the canary at the start. To be kept with a checkpoint, and handed to `probe` at a resume."""
        if self._canary is None:
            raise RuntimeError("the servers were not probed")
        return self._canary

    def ask(self, token_ids: Tensor, positions: Tensor) -> "Future[Answer]":
        """What the teacher says of one sequence; does not wait.

        Args:
            token_ids: [T] int64, unpadded.
            positions: [n] int64, ascending, in 0 to T − 2.

        Returns:
            A future with the answer, or with a `TeacherLostError`.

        Raises:
            VocabularyError, DataError: a sequence that cannot be asked.
        """
        if self._canary is None:
            raise RuntimeError("the servers were not probed")
        ids, places = token_ids.tolist(), positions.tolist()
        self._check_ids(ids)
        if any(b <= a for a, b in itertools.pairwise([-1, *places, len(ids) - 1])):
            raise ValueError("positions must ascend and have a token after them")
        future: Future[Answer] = Future()
        future.set_running_or_notify_cancel()
        if not places:
            future.set_result(self._nothing())
            return future
        question = _Question(ids, places, future)
        self._check_length(question)
        loop = self._running()
        with self._lock:
            self._open.add(question)
            self._fresh.append(question)
            self._counts = replace(self._counts, asked=self._counts.asked + 1)
        loop.call_soon_threadsafe(self._dispatch)
        return future

    def gather(self, futures: Iterable["Future[Answer]"]) -> list[Answer]:
        """Waits for answers, and counts the time.

        Raises:
            TeacherLostError: of the first that failed.
        """
        start = time.monotonic()
        try:
            return [future.result() for future in futures]
        finally:
            self._count(waited_s=time.monotonic() - start)

    @property
    def counters(self) -> Counters:
        sent = sum(server.connections.requests for server in self._servers)
        received = sum(server.connections.received_bytes for server in self._servers)
        with self._lock:
            return replace(self._counts, requests=sent, received_bytes=received)

    def close(self) -> None:
        """Ends the thread; what is still open fails."""
        self._closed = True
        if self._loop is None or self._thread is None:
            return
        with suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(timeout=10)
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop = self._thread = None

    def __enter__(self) -> "ServerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # The thread

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise TeacherLostError("the teacher's servers were asked after the end", "Ask before the pool is closed")
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="speckd-teacher", daemon=True)
                self._thread.start()
                self._loop.call_soon_threadsafe(self._watch)
            return self._loop

    def _wait_for(self, work: "Coroutine[Any, Any, _T]") -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._running())
        try:
            return future.result()
        finally:
            future.cancel()  # where the wait was interrupted

    async def _end(self) -> None:
        self._fail(list(self._open), TeacherLostError("the teacher's servers are no longer asked", "Start the run again"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self._servers:
            await server.connections.close()

    def _watch(self) -> None:
        """Ends the wait when every server has been down for too long."""
        now = time.monotonic()
        since = [server.down_since for server in self._servers]
        if self._open and all(start is not None and now - start > self._timeouts.patience_s for start in since):
            self._lose()
        if self._loop is not None:
            self._loop.call_later(min(0.5, self._timeouts.patience_s / 10), self._watch)

    def _lose(self) -> None:
        causes = "; ".join(f"{server.url}: {server.cause}" for server in self._servers)
        lost = TeacherLostError(
            f"no server of the teacher has answered for {self._timeouts.patience_s:g} s ({causes})",
            "Start one again and resume the run",
        )
        self._fail(list(self._open), lost)
        for server in self._servers:
            server.down_since, server.failures, server.until = None, 0, 0.0

    # Who is asked what

    def _dispatch(self) -> None:
        while (server := self._free()) is not None and (group := self._next(server)) is not None:
            server.in_flight += 1
            task = asyncio.get_running_loop().create_task(self._serve(server, group))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _free(self) -> _Server | None:
        """The least busy server that may be asked and has something to be asked."""
        ready = [server for server in self._servers if self._slots(server) > 0 and self._has_work(server)]
        return min(ready, key=lambda server: server.in_flight, default=None)

    def _slots(self, server: _Server) -> int:
        """How many more requests it can take; one alone tries a server that has failed."""
        if time.monotonic() < server.until:
            return 0
        return (1 if server.failures else self._load.concurrency) - server.in_flight

    def _has_work(self, server: _Server) -> bool:
        return bool(self._fresh) or any(self._may(server, group) for group in self._again)

    def _may(self, server: _Server, group: _Group) -> bool:
        """A server that has answered wrongly is asked again only if no other can be."""
        others = (other for other in self._servers if other.number not in group.avoid and other.down_since is None)
        return server.number not in group.avoid or not any(others)

    def _next(self, server: _Server) -> _Group | None:
        for group in self._again:
            if self._may(server, group):
                self._again.remove(group)
                return group
        slots = sum(max(0, self._slots(other)) for other in self._servers)
        with self._lock:
            if not self._fresh:
                return None
            share = -(-sum(len(question.asked) for question in self._fresh) // max(1, slots))
            group = _Group([self._fresh.popleft()])
            while self._fresh and group.tokens + len(self._fresh[0].asked) <= min(server.budget, share):
                group.questions.append(self._fresh.popleft())
        return group

    async def _serve(self, server: _Server, group: _Group) -> None:
        """One request and what follows from it."""
        request_id = self._request_id()
        try:
            answers = await self._exchange(server, group, request_id)
        except TooFewInside:
            self._ask_for_more(server, group, request_id)
        except Unreachable as error:
            self._set_aside(server, str(error), error.after_s)
            self._put_back([group])
        except Broken as error:
            self._set_aside(server, str(error))
            server.budget = max(1, min(server.budget, group.tokens) // 2)
            self._split(server, group, request_id, str(error))
        except Refused as error:
            self._refuse(server, group, request_id, error)
        except BadAnswer as error:
            self._count(invalid=1)
            self._set_aside(server, f"a wrong answer ({error})", down=False)
            group.avoid.add(server.number)
            self._once_more(server, group, request_id, f"a wrong answer: {error}")
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a mistake here must end the run, not hang it
            self._fail(group.questions, error)
        else:
            server.failures, server.until, server.down_since = 0, 0.0, None
            server.budget = min(self._load.tokens, server.budget + self._load.tokens // 16 + 1)
            self._answer(group.questions, answers)
        finally:
            server.in_flight -= 1
        self._dispatch()

    def _set_aside(self, server: _Server, cause: str, after_s: float = 0.0, down: bool = True) -> None:
        """Twice as long each time, and from half to all of that, so that clients do not come back together."""
        server.cause = cause
        if down and server.down_since is None:
            server.down_since = time.monotonic()
        longest = self._timeouts.longest_backoff_s
        wait = min(longest, self._timeouts.backoff_s * 2 ** min(server.failures, 30))
        wait = max(wait * (0.5 + 0.5 * self._jitter(server)), min(after_s, longest))
        server.failures += 1
        server.until = time.monotonic() + wait
        asyncio.get_running_loop().call_later(wait, self._dispatch)

    def _jitter(self, server: _Server) -> float:
        """In [0, 1), another one for each process, server and failure, and from no generator that anything else draws from."""
        text = f"{self._nonce} {server.url} {server.failures}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) / 2**32

    def _put_back(self, groups: list[_Group]) -> None:
        left = [_Group([question for question in group.questions if question in self._open], group.avoid) for group in groups]
        self._count(retries=sum(len(group.questions) for group in left))
        self._again.extendleft(group for group in reversed(left) if group.questions)

    def _split(self, server: _Server, group: _Group, request_id: str, cause: str) -> None:
        """Halves of a request that broke; a single question counts its failures."""
        questions = group.questions
        if len(questions) == 1:
            self._once_more(server, group, request_id, cause)
            return
        half = len(questions) // 2
        self._count(splits=1)
        self._put_back([_Group(questions[:half], set(group.avoid)), _Group(questions[half:], set(group.avoid))])

    def _once_more(self, server: _Server, group: _Group, request_id: str, cause: str, fix: str = "") -> None:
        """But not for ever."""
        for question in group.questions:
            question.failures += 1
        spent = [question for question in group.questions if question.failures >= self._load.attempts]
        if spent:
            what = f"teacher server {server.url}, request {request_id}, the last of {self._load.attempts}: {cause}"
            self._fail(spent, TeacherLostError(what, fix or "See the server's own log, then resume the run"))
        self._put_back([group])

    def _refuse(self, server: _Server, group: _Group, request_id: str, error: Refused) -> None:
        """Another server may answer it; the same will not."""
        group.avoid.add(server.number)
        self._set_aside(server, str(error), down=False)
        if len(group.avoid) < len(self._servers):
            self._once_more(server, group, request_id, str(error), error.fix)
        else:
            what = f"teacher server {server.url}, request {request_id}: {error}"
            self._fail(group.questions, TeacherLostError(what, error.fix))

    def _ask_for_more(self, server: _Server, group: _Group, request_id: str) -> None:
        """Of the first K some lie outside of the shared vocabulary: K of those inside are wanted."""
        if self._spare < _MOST_SPARE:
            self._spare = max(8, 2 * self._spare)
            self._put_back([group])
            return
        what = f"teacher server {server.url}, request {request_id}: of {_MOST_SPARE} tokens too few are shared with the student"
        self._fail(group.questions, TeacherLostError(what, "Use a teacher with the student's vocabulary"))

    def _answer(self, questions: list[_Question], answers: list[Answer]) -> None:
        for question, answer in zip(questions, answers, strict=True):
            if self._settle(question, answered=1):
                question.future.set_result(answer)

    def _fail(self, questions: list[_Question], error: Exception) -> None:
        for question in questions:
            if self._settle(question, failed=1):
                question.future.set_exception(error)
        gone = set(questions)
        with self._lock:
            self._fresh = deque(question for question in self._fresh if question not in gone)
        left = [_Group([q for q in group.questions if q not in gone], group.avoid) for group in self._again]
        self._again = deque(group for group in left if group.questions)

    def _settle(self, question: _Question, answered: int = 0, failed: int = 0) -> bool:
        with self._lock:
            if question not in self._open:
                return False
            self._open.remove(question)
            counts = self._counts
            self._counts = replace(counts, answered=counts.answered + answered, failed=counts.failed + failed)
            return True

    def _count(self, retries: int = 0, invalid: int = 0, splits: int = 0, outside: int = 0, waited_s: float = 0.0) -> None:
        with self._lock:
            old = self._counts
            self._counts = replace(
                old,
                retries=old.retries + retries,
                invalid=old.invalid + invalid,
                splits=old.splits + splits,
                outside=old.outside + outside,
                waited_s=old.waited_s + waited_s,
            )

    # One request

    async def _exchange(self, server: _Server, group: _Group, request_id: str) -> list[Answer]:
        """The group's answers, the canary's being what it was."""
        assert server.facts is not None
        questions = [question for question in group.questions if question in self._open]
        sequences = [question.asked for question in questions] + [self._canary_ids]
        positions = [question.positions for question in questions] + [list(range(len(self._canary_ids) - 1))]
        answers = await self._questioned(server, sequences, positions, request_id, server.facts)
        self._compare_canary(answers[-1])
        by_question = dict(zip(questions, answers, strict=False))
        return [by_question.get(question, self._nothing()) for question in group.questions]

    async def _questioned(
        self,
        server: _Server,
        sequences: list[list[int]],
        positions: list[list[int]],
        request_id: str,
        facts: ServerFacts,
    ) -> list[Answer]:
        wanted = self._wanted
        body = self._dialect.write(facts.model, sequences, wanted, request_id)
        raw = await server.connections.post(self._dialect.path, body, request_id, _most_bytes(sequences, wanted))
        return await asyncio.to_thread(self._understood, raw, sequences, positions, wanted, request_id, facts)

    @property
    def _wanted(self) -> Wanted:
        if self._top_k is None:
            return Wanted(self._vocabulary + self._spare, whole=True)
        return Wanted(self._top_k + self._spare)

    def _understood(
        self,
        raw: bytes,
        sequences: list[list[int]],
        positions: list[list[int]],
        wanted: Wanted,
        request_id: str,
        facts: ServerFacts,
    ) -> list[Answer]:
        reply = self._dialect.read(parsed(raw), sequences, positions, wanted)
        _check_source(reply, sequences, request_id, facts)
        answers = []
        for heard, sequence, places in zip(reply.heard, sequences, positions, strict=True):
            check_labels(heard, [sequence[place + 1] for place in places])
            answer, outside = checked(heard, torch.tensor(places), self._top_k, self._vocabulary)
            self._count(outside=outside)
            answers.append(answer)
        return answers

    def _compare_canary(self, answer: Answer) -> None:
        assert self._canary is not None
        moved = drift(self._canary, answer)
        if moved > self._tolerance:
            raise BadAnswer(f"the model is another one: known log-probabilities differ by {moved:.3g} nat in the mean")

    def _request_id(self) -> str:
        return f"speckd-{self._nonce}-{next(self._numbers)}"

    def _check_ids(self, ids: list[int]) -> None:
        place = next((i for i, token in enumerate(ids) if not 0 <= token < self._vocabulary), None)
        if place is not None:
            what = f"token {ids[place]} at position {place} lies outside of the shared vocabulary of {self._vocabulary}"
            raise VocabularyError(what, "Use a teacher with the student's vocabulary")

    def _check_length(self, question: _Question) -> None:
        needed = len(question.asked) + 1
        for server in self._servers:
            longest = server.facts.longest if server.facts else None
            if longest is not None and needed > longest:
                raise DataError(
                    f"a sequence of {needed - 1} tokens is too long for the teacher server {server.url} ({longest - 1})",
                    f"Start it with {self._dialect.lengthen(needed)}, or lower max_length",
                )

    def _nothing(self) -> Answer:
        width = self._vocabulary if self._top_k is None else self._top_k
        ids = None if self._top_k is None else torch.empty(0, width, dtype=torch.int64)
        return Answer(torch.empty(0, dtype=torch.int64), ids, torch.empty(0, width), torch.empty(0))

    # The start

    async def _probe_all(self, longest: int, texts: Many[tuple[str, list[int]]]) -> list[ServerFacts]:
        deadline = time.monotonic() + self._timeouts.ready_s
        served = await asyncio.gather(*(self._ready(server, deadline) for server in self._servers))
        facts = []
        for server, offered in zip(self._servers, served, strict=True):
            server.facts = await self._probed(server, offered, longest, texts)
            server.failures, server.until, server.down_since = 0, 0.0, None
            facts.append(server.facts)
        return facts

    async def _ready(self, server: _Server, deadline: float) -> list[ServedModel]:
        """Its models, once it is up."""
        while True:
            try:
                raw = await server.connections.get("/v1/models", self._request_id())
                return _models(parsed(raw))
            except Refused as error:
                raise ConfigError(f"teacher server {server.url}: {error}", error.fix) from None
            except (Unreachable, Broken, BadAnswer) as error:
                self._set_aside(server, str(error), error.after_s if isinstance(error, Unreachable) else 0.0)
                if server.until > deadline:
                    what = f"teacher server {server.url} is not ready after {self._timeouts.ready_s:g} s: {error}"
                    raise TeacherLostError(what, "Start it, or take it out of the list") from None
                await asyncio.sleep(server.until - time.monotonic())

    async def _probed(
        self, server: _Server, offered: list[ServedModel], longest: int, texts: Many[tuple[str, list[int]]]
    ) -> ServerFacts:
        model = self._chosen(server, offered)
        if model.longest is not None and model.longest < longest + 1:
            raise CapabilityError(
                f"teacher server {server.url} takes {model.longest - 1} tokens, and the longest sequence has {longest}",
                f"Start it with {self._dialect.lengthen(longest + 1)}, or lower max_length",
            )
        told = await self._tokenizes_alike(server, model.name, texts)
        facts = ServerFacts(server.url, model.name, model.longest, False, False, told, 0.0)
        try:
            return await self._answers_well(server, facts)
        except BadAnswer as error:
            what = f"teacher server {server.url} does not answer as a teacher must: {error}"
            raise CapabilityError(what, "Start it with the dialect's defaults, or mend its version") from None
        except (Unreachable, Broken) as error:
            what = f"teacher server {server.url} breaks at the first question: {error}"
            raise TeacherLostError(what, "See the server's own log") from None

    def _chosen(self, server: _Server, offered: list[ServedModel]) -> ServedModel:
        names = [model.name for model in offered]
        if self._model is None and len(offered) == 1:
            return offered[0]
        if self._model not in names:
            what = (
                f"teacher server {server.url} offers {', '.join(names) or 'no model'}; wanted: {self._model or 'the only one'}"
            )
            raise ConfigError(what, "Name one of these as the teacher, or start the server with that model")
        return offered[names.index(self._model)]

    async def _tokenizes_alike(self, server: _Server, model: str, texts: Many[tuple[str, list[int]]]) -> bool:
        """Whether it could be asked."""
        for text, expected in texts:
            body = {"model": model, "prompt": text, "add_special_tokens": False}
            try:
                raw = await server.connections.post("/tokenize", body, self._request_id(), MESSAGE_BYTES + 64 * len(text))
            except Refused:
                return False
            except (Unreachable, Broken, BadAnswer) as error:
                raise TeacherLostError(f"teacher server {server.url} breaks at /tokenize: {error}", "See its own log") from None
            found = _tokens(parsed(raw))
            if found != expected:
                raise VocabularyError(
                    f"teacher server {server.url} has the wrong tokenizer: {text!r:.40} is {found!s:.40}, not {expected!s:.40}",
                    "Serve a teacher with the student's tokenizer",
                )
        return bool(texts)

    async def _answers_well(self, server: _Server, facts: ServerFacts) -> ServerFacts:
        """The canary's answer, alone and beside others, with as many log-probabilities as wanted, and the same everywhere."""
        facts = await self._with_echoes(server, facts)
        everywhere = list(range(len(self._canary_ids) - 1))
        other = self._canary_ids[::-1]
        try:
            alone, *_ = await self._questioned(server, [self._canary_ids], [everywhere], self._request_id(), facts)
            both = [other, self._canary_ids, other]
            beside = (await self._questioned(server, both, [everywhere] * 3, self._request_id(), facts))[1]
        except TooFewInside:
            if self._spare >= _MOST_SPARE:
                what = f"of teacher server {server.url}'s first {_MOST_SPARE} tokens too few are shared with the student"
                raise VocabularyError(what, "Use a teacher with the student's vocabulary") from None
            self._spare = max(8, 2 * self._spare)
            return await self._answers_well(server, facts)
        noise = drift(alone, beside)
        if noise > self._tolerance:
            raise CapabilityError(
                f"teacher server {server.url} gives one question two answers, {noise:.3g} nat apart",
                "Start it in batch-invariant mode or without prefix caching, or raise the tolerance",
            )
        if self._canary is None:
            self._canary = alone
        self._compare_canary(alone)
        return replace(facts, noise=noise)

    async def _with_echoes(self, server: _Server, facts: ServerFacts) -> ServerFacts:
        """How its responses can be told apart, and that there are as many log-probabilities as wanted."""
        wanted, request_id = self._wanted, self._request_id()
        places = list(range(len(self._canary_ids) - 1))
        most = _most_bytes([self._canary_ids], wanted)
        body = self._dialect.write(facts.model, [self._canary_ids], wanted, request_id)
        try:
            raw = await server.connections.post(self._dialect.path, body, request_id, most)
        except Refused as error:
            raise await self._why_refused(server, facts, wanted, error) from None
        reply = self._dialect.read(parsed(raw), [self._canary_ids], [places], wanted)
        tokens, request = reply.heard[0].token_ids is not None, reply.request_id == request_id
        if not (tokens or request):
            what = f"teacher server {server.url} repeats neither tokens nor the request's id: answers could be mixed up unseen"
            raise CapabilityError(what, "Use a newer version of the server (vLLM 0.10.2 or later)")
        return replace(facts, repeats_tokens=tokens, repeats_request=request)

    async def _why_refused(self, server: _Server, facts: ServerFacts, wanted: Wanted, error: Refused) -> SpeckdError:
        """The same with one log-probability tells whether their number is the reason."""
        request_id = self._request_id()
        body = self._dialect.write(facts.model, [self._canary_ids], Wanted(1), request_id)
        try:
            await server.connections.post(self._dialect.path, body, request_id, MESSAGE_BYTES)
        except (Refused, Unreachable, Broken, BadAnswer):
            return ConfigError(f"teacher server {server.url}: {error}", error.fix)
        what = f"teacher server {server.url} gives fewer than {wanted.count} log-probabilities a token ({error})"
        return CapabilityError(what, f"Start it with {self._dialect.allow(wanted.count)}, or lower the teacher's top K")


def _most_bytes(sequences: list[list[int]], wanted: Wanted) -> int:
    """Of an answer to them; a server's own vocabulary may be somewhat larger than the shared one."""
    entries = 2 * wanted.count + 4096 if wanted.whole else wanted.count + 2
    return sum(map(len, sequences)) * entries * _ENTRY_BYTES + MESSAGE_BYTES


def _models(reply: Any) -> list[ServedModel]:
    offered = []
    for card in spoken.field(reply, "data", list):
        longest = card.get("max_model_len") if isinstance(card, dict) else None
        offered.append(ServedModel(spoken.field(card, "id", str), longest if isinstance(longest, int) else None))
    return offered


def _tokens(reply: Any) -> list[int]:
    return list(spoken.field(reply, "tokens", list))


def _check_source(reply: Reply, sequences: list[list[int]], request_id: str, facts: ServerFacts) -> None:
    """The response is to this request, of this model, about these tokens."""
    if reply.model is not None and reply.model != facts.model:
        raise BadAnswer(f"it is by the model '{reply.model:.60}', not '{facts.model}'")
    if facts.repeats_request and reply.request_id != request_id:
        raise BadAnswer(f"it is to another request ({reply.request_id!s:.60})")
    for number, (heard, sequence) in enumerate(zip(reply.heard, sequences, strict=True)):
        if heard.token_ids != sequence and (facts.repeats_tokens or heard.token_ids is not None):
            raise BadAnswer(f"answer {number} is about other tokens than were asked")
