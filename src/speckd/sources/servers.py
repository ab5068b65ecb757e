"""Several servers that do the same work: jobs are shared among them, and what one of them fails at another does.

The exchange, its limits and what each way to fail means are `teachers/exchange.py`'s. A thread of its own runs the requests.
"""

import asyncio
import hashlib
import itertools
import secrets
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from speckd.errors import ConfigError, TeacherLostError
from speckd.teachers.client import Load
from speckd.teachers.dialect import BadAnswer
from speckd.teachers.exchange import Broken, Connections, Refused, Timeouts, Unreachable, key, server_url, tls_of

_T = TypeVar("_T")
#: One job for one server, under a request's id.
Ask = Callable[[Connections, str], Awaitable[_T]]
_PAUSE_S = 0.02


@dataclass(eq=False)
class Server:
    """One of them. `until`: when it may be asked again; `down_since`: since when it has not answered (monotonic clock)."""

    connections: Connections
    failures: int = 0
    until: float = 0.0
    down_since: float | None = None
    cause: str = ""

    @property
    def url(self) -> str:
        return self.connections.url


@dataclass(eq=False)
class _Job(Generic[_T]):
    ask: Ask[_T]
    avoid: set[Server] = field(default_factory=set)
    failures: int = 0
    done: bool = False
    answer: _T | None = None


class Servers:
    """
    Args:
        urls: their addresses.
        timeouts, load: how long to wait, and how many requests at a time to one server.

    Raises:
        ConfigError: an address, number or key that cannot be used.
    """

    def __init__(self, urls: Sequence[str], timeouts: Timeouts | None = None, load: Load | None = None) -> None:
        addresses = [server_url(url) for url in urls]
        if not addresses or len(set(addresses)) < len(addresses):
            raise ConfigError("the servers that write are none, or one is named twice", "Name each server once")
        self.timeouts, self.load = timeouts or Timeouts(), load or Load()
        secret, tls = key(), tls_of(addresses)
        self.all = [Server(Connections(address, self.timeouts, secret, tls)) for address in addresses]
        self._nonce, self._numbers = secrets.token_hex(4), itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def share(self, asks: Sequence[Ask[_T]]) -> list[_T]:
        """Does every job once, on whichever server; the answers in the jobs' order.

        Raises:
            TeacherLostError: no server answers any more, or one job fails wherever it is tried.
        """
        return self._wait_for(self._shared([_Job(ask) for ask in asks]))

    def each(self, ask: Ask[_T], patience_s: float | None = None) -> list[_T]:
        """Does one job on every server, one after the other, waiting for those that are not up yet; with `patience_s` no longer
        than that for all together, else up to `Timeouts.ready_s` for each.

        Raises:
            TeacherLostError: one is not to be had.
            ConfigError: one refuses.
        """
        try:
            return self._wait_for(self._on_each(ask), patience_s)
        except TimeoutError:
            raise TeacherLostError(f"the servers have not answered for {patience_s:g} s", "See their own logs") from None

    def close(self) -> None:
        """Ends connections and thread."""
        if self._loop is None or self._thread is None:
            return
        with suppress(RuntimeError, TimeoutError):
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()
        self._loop = self._thread = None

    # The thread

    def _wait_for(self, work: "Coroutine[Any, Any, _T]", longest_s: float | None = None) -> _T:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="speckd-writers", daemon=True)
            self._thread.start()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(longest_s)
        finally:
            future.cancel()  # where the wait was interrupted

    async def _end(self) -> None:
        for server in self.all:
            await server.connections.close()

    async def _on_each(self, ask: Ask[_T]) -> list[_T]:
        return [await self._patiently(server, ask) for server in self.all]

    async def _patiently(self, server: Server, ask: Ask[_T]) -> _T:
        deadline, pause = time.monotonic() + self.timeouts.ready_s, self.timeouts.backoff_s
        while True:
            try:
                return await ask(server.connections, self._request_id())
            except Refused as error:
                raise ConfigError(f"server {server.url}: {error}", error.fix) from None
            except (Unreachable, Broken, BadAnswer) as error:
                if time.monotonic() + pause > deadline:
                    what = f"server {server.url} is not ready after {self.timeouts.ready_s:g} s: {error}"
                    raise TeacherLostError(what, "Start it, or take it out of the list") from None
            await asyncio.sleep(pause)
            pause = min(2 * pause, self.timeouts.longest_backoff_s)

    async def _shared(self, jobs: "list[_Job[_T]]") -> list[_T]:
        for server in self.all:
            server.failures, server.until, server.down_since = 0, 0.0, None
        waiting = deque(jobs)
        workers = [
            asyncio.ensure_future(self._work(server, first, waiting, jobs))
            for server in self.all
            for first in [True] + [False] * (self.load.concurrency - 1)
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [job.answer for job in jobs]  # type: ignore[misc]

    async def _work(self, server: Server, first: bool, waiting: "deque[_Job[_T]]", jobs: "list[_Job[_T]]") -> None:
        """Until all is done. One worker alone tries a server that has failed."""
        while not all(job.done for job in jobs):
            self._require_some_server()
            resting = time.monotonic() < server.until or (server.failures > 0 and not first)
            job = None if resting else self._next(server, waiting)
            if job is None:
                await asyncio.sleep(_PAUSE_S)
            else:
                await self._do(server, job, waiting)

    def _next(self, server: Server, waiting: "deque[_Job[_T]]") -> "_Job[_T] | None":
        """One that has failed here is tried again here only if no other server is up."""
        others = [other for other in self.all if other.down_since is None]
        for job in waiting:
            if server not in job.avoid or all(other in job.avoid for other in others):
                waiting.remove(job)
                return job
        return None

    async def _do(self, server: Server, job: "_Job[_T]", waiting: "deque[_Job[_T]]") -> None:
        request_id = self._request_id()
        try:
            job.answer = await job.ask(server.connections, request_id)
            job.done, server.failures, server.down_since = True, 0, None
            return
        except Unreachable as error:
            self._set_aside(server, f"request {request_id}: {error}", error.after_s)
        except Broken as error:
            self._set_aside(server, f"request {request_id}: {error}")
            self._count_failure(server, job, request_id, str(error))
        except BadAnswer as error:
            self._set_aside(server, f"request {request_id}: a wrong answer: {error}", down=False)
            self._count_failure(server, job, request_id, f"a wrong answer: {error}")
        except Refused as error:
            job.avoid.add(server)
            if len(job.avoid) == len(self.all):
                raise TeacherLostError(f"server {server.url}, request {request_id}: {error}", error.fix) from None
        waiting.appendleft(job)

    def _count_failure(self, server: Server, job: "_Job[_T]", request_id: str, cause: str) -> None:
        job.failures += 1
        job.avoid.add(server)
        if job.failures >= self.load.attempts:
            what = f"server {server.url}, request {request_id}, the last of {self.load.attempts}: {cause}"
            raise TeacherLostError(what, "See the server's own log, then start again")

    def _set_aside(self, server: Server, cause: str, after_s: float = 0.0, down: bool = True) -> None:
        """For a while, as `Timeouts.pause_s` says."""
        server.cause = cause
        if down and server.down_since is None:
            server.down_since = time.monotonic()
        digest = hashlib.blake2b(f"{self._nonce} {server.url} {server.failures}".encode(), digest_size=4).digest()
        wait = self.timeouts.pause_s(server.failures, int.from_bytes(digest) / 2**32, after_s)
        server.failures += 1
        server.until = time.monotonic() + wait

    def _require_some_server(self) -> None:
        now, patience = time.monotonic(), self.timeouts.patience_s
        if all(server.down_since is not None and now - server.down_since > patience for server in self.all):
            causes = "; ".join(f"{server.url}: {server.cause}" for server in self.all)
            raise TeacherLostError(
                f"no server that writes has answered for {patience:g} s ({causes})", "Start one, then start again"
            )

    def _request_id(self) -> str:
        return f"speckd-{self._nonce}-{next(self._numbers)}"
