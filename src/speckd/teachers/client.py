"""Teachers' servers, asked together: who is asked what and when, what is done when one fails, and which answers are believed.

A thread of its own runs the requests, so that questions can be asked ahead of need. Nothing is answered in part, or guessed: a
question ends with its answer, checked, or with an error.
"""

import asyncio
import hashlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable
from collections.abc import Sequence as Many
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from speckd.errors import ConfigError, DataError, TeacherLostError
from speckd.teachers.answers import Answer
from speckd.teachers.conversation import Conversation, ServerFacts
from speckd.teachers.dialect import BadAnswer, Dialect, TooFewInside
from speckd.teachers.exchange import Broken, Connections, Refused, Timeouts, Unreachable, key, server_url, tls_of
from speckd.types import Capabilities

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


@dataclass(eq=False)
class _Question:
    token_ids: list[int]
    positions: list[int]
    future: "Future[Answer]"
    failures: int = 0

    @property
    def length(self) -> int:
        """Tokens sent: no more of the sequence than what the positions' answers depend on."""
        return self.positions[-1] + 2

    @property
    def asked(self) -> list[int]:
        return self.token_ids[: self.length]


@dataclass(eq=False)
class _Group:
    """Questions that go in one request. `avoid`: servers that have answered them wrongly or refused them."""

    questions: list[_Question]
    avoid: set[int] = field(default_factory=set)

    @property
    def tokens(self) -> int:
        return sum(question.length for question in self.questions)


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
        top_k = None if top_k is None else min(top_k, vocabulary)
        self._talk = Conversation(dialect, vocabulary, top_k, model, tolerance)
        secret, tls = key(), tls_of(addresses)
        connections = [Connections(address, self._timeouts, secret, tls) for address in addresses]
        self._servers = [_Server(i, each, self._load.tokens) for i, each in enumerate(connections)]
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
        self._talk.choose_canary(texts, remembered)
        return self._wait_for(self._start(longest, texts))

    @property
    def capabilities(self) -> Capabilities:
        """What can be asked of the answers."""
        return Capabilities(self._talk.top_k)

    @property
    def models(self) -> list[str]:
        """Names of what the servers hold, as they said when they were probed."""
        return sorted({server.facts.model for server in self._servers if server.facts is not None})

    @property
    def canary(self) -> Answer:
        """What the servers said of the canary at the start. To be kept with a checkpoint, and handed to `probe` at a resume."""
        if self._talk.canary is None:
            raise RuntimeError("the servers were not probed")
        return self._talk.canary

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
        if any(server.facts is None for server in self._servers):
            raise RuntimeError("the servers were not probed")
        ids, places = token_ids.tolist(), positions.tolist()
        self._talk.check_ids(ids)
        if any(b <= a for a, b in itertools.pairwise([-1, *places, len(ids) - 1])):
            raise ValueError("positions must ascend and have a token after them")
        future: Future[Answer] = Future()
        future.set_running_or_notify_cancel()
        if not places:
            future.set_result(self._talk.nothing())
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
            return replace(self._counts, requests=sent, received_bytes=received, outside=self._talk.outside)

    def close(self) -> None:
        """Ends the thread; what is still open fails."""
        self._closed = True
        if self._loop is None or self._thread is None:
            return
        with suppress(RuntimeError, TimeoutError):  # ended already, or a connection that will not
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(timeout=10)
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()
        self._loop = self._thread = None

    def __enter__(self) -> "ServerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_length(self, question: _Question) -> None:
        needed = question.length + 1
        for server in self._servers:
            longest = server.facts.longest if server.facts else None
            if longest is not None and needed > longest:
                raise DataError(
                    f"a sequence of {needed - 1} tokens is too long for the teacher server {server.url} ({longest - 1})",
                    f"Start it with {self._talk.dialect.lengthen(needed)}, or lower max_length",
                )

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

    async def _start(self, longest: int, texts: Many[tuple[str, list[int]]]) -> list[ServerFacts]:
        """One after the other, so that the first gives the canary's answer."""
        deadline = time.monotonic() + self._timeouts.ready_s
        for server in self._servers:
            server.facts = await self._talk.start(server.connections, deadline, longest, texts)
        return [server.facts for server in self._servers if server.facts is not None]

    async def _end(self) -> None:
        self._fail(list(self._open), TeacherLostError("the teacher's servers are no longer asked", "Start the run again"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self._servers:
            await server.connections.close()
        await asyncio.get_running_loop().shutdown_default_executor()

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
            share = -(-sum(question.length for question in self._fresh) // max(1, slots))
            group = _Group([self._fresh.popleft()])
            while self._fresh and group.tokens + self._fresh[0].length <= min(server.budget, share):
                group.questions.append(self._fresh.popleft())
        return group

    async def _serve(self, server: _Server, group: _Group) -> None:
        """One request and what follows from it."""
        request_id = self._talk.new_request_id()
        try:
            answers = await self._answers(server, group, request_id)
        except TooFewInside:
            self._ask_for_more(server, group, request_id)
        except Unreachable as error:
            self._set_aside(server, f"request {request_id}: {error}", error.after_s)
            self._put_back([group])
        except Broken as error:
            self._set_aside(server, f"request {request_id}: {error}")
            server.budget = max(1, min(server.budget, group.tokens) // 2)
            self._split(server, group, request_id, str(error))
        except Refused as error:
            self._refuse(server, group, request_id, error)
        except BadAnswer as error:
            self._count(invalid=1)
            self._set_aside(server, f"request {request_id}: a wrong answer: {error}", down=False)
            group.avoid.add(server.number)
            self._once_more(server, group, request_id, f"a wrong answer: {error}")
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a mistake here must end the run, not hang it
            self._fail(group.questions, error)
        else:
            server.failures, server.until, server.down_since = 0, 0.0, None
            server.budget = min(self._load.tokens, server.budget + self._load.tokens // 16 + 1)
            self._answer(answers)
        finally:
            server.in_flight -= 1
        self._dispatch()

    def _set_aside(self, server: _Server, cause: str, after_s: float = 0.0, down: bool = True) -> None:
        """For a while, as `Timeouts.pause_s` says."""
        server.cause = cause
        if down and server.down_since is None:
            server.down_since = time.monotonic()
        wait = self._timeouts.pause_s(server.failures, self._jitter(server), after_s)
        server.failures += 1
        server.until = time.monotonic() + wait
        asyncio.get_running_loop().call_later(wait, self._dispatch)

    def _jitter(self, server: _Server) -> float:
        """In [0, 1), another one for each process, server and failure, and from no generator that anything else draws from."""
        text = f"{self._talk.nonce} {server.url} {server.failures}"
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
        self._set_aside(server, f"request {request_id}: {error}", down=False)
        if len(group.avoid) < len(self._servers):
            self._once_more(server, group, request_id, str(error), error.fix)
        else:
            what = f"teacher server {server.url}, request {request_id}: {error}"
            self._fail(group.questions, TeacherLostError(what, error.fix))

    def _ask_for_more(self, server: _Server, group: _Group, request_id: str) -> None:
        """Of the first K some lie outside of the shared vocabulary: K of those inside are wanted."""
        if self._talk.widen():
            self._put_back([group])
            return
        what = f"teacher server {server.url}, request {request_id}: too few of its tokens are in the shared vocabulary"
        self._fail(group.questions, TeacherLostError(what, "Use a teacher with the student's vocabulary"))

    async def _answers(self, server: _Server, group: _Group, request_id: str) -> dict[_Question, Answer]:
        assert server.facts is not None
        open_still = [question for question in group.questions if question in self._open]
        sequences = [question.asked for question in open_still]
        positions = [question.positions for question in open_still]
        found = await self._talk.answers(server.connections, server.facts, sequences, positions, request_id)
        return dict(zip(open_still, found, strict=True))

    def _answer(self, answers: dict[_Question, Answer]) -> None:
        for question, answer in answers.items():
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

    def _count(self, retries: int = 0, invalid: int = 0, splits: int = 0, waited_s: float = 0.0) -> None:
        with self._lock:
            old = self._counts
            self._counts = replace(
                old,
                retries=old.retries + retries,
                invalid=old.invalid + invalid,
                splits=old.splits + splits,
                waited_s=old.waited_s + waited_s,
            )
