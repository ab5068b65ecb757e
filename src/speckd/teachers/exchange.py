"""One request to a server: a connection, its limits, and what each way to fail means for who asked."""

import asyncio
import email.utils
import ipaddress
import json
import os
import re
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from speckd.errors import ConfigError
from speckd.teachers.dialect import BadAnswer

#: Where the servers' key comes from, and from nowhere else.
KEY_VARIABLE = "SPECKD_TEACHER_API_KEY"
#: Bytes of a response that is no answer, at most.
MESSAGE_BYTES = 1 << 18


@dataclass(frozen=True)
class Timeouts:
    """How long to wait, all in seconds.

    `connect_s`, `read_s`: for a connection, and between two pieces of a response (the first comes when all is computed);
    `request_s`: for a whole request; `ready_s`: at the start, until the servers are up; `patience_s`: how long all may be down;
    `backoff_s`, `longest_backoff_s`: a failed server is left alone for the first, then twice as long, up to the second.
    """

    connect_s: float = 10.0
    read_s: float = 120.0
    request_s: float = 300.0
    ready_s: float = 300.0
    patience_s: float = 600.0
    backoff_s: float = 0.2
    longest_backoff_s: float = 30.0

    def __post_init__(self) -> None:
        wrong = [name for name, value in vars(self).items() if not 0 < value < float("inf")]
        if wrong:
            raise ConfigError(f"{wrong[0]} of the teacher's servers is {getattr(self, wrong[0])}", "Give seconds above 0")

    def pause_s(self, failures: int, share: float, at_least: float) -> float:
        """How long to leave a server alone: twice as long each time, and from half (`share` 0) to all of that (1), so that
        clients do not come back together; `at_least` what it asked for itself, up to the longest."""
        wait = min(self.longest_backoff_s, self.backoff_s * 2 ** min(failures, 30))
        return max(wait * (0.5 + 0.5 * share), min(at_least, self.longest_backoff_s))


class Unreachable(Exception):
    """Nothing was asked: the server cannot be reached, or is busy. `after_s`: when it asks to be tried again."""

    def __init__(self, cause: str, after_s: float = 0.0) -> None:
        super().__init__(cause)
        self.after_s = after_s


class Broken(Exception):
    """A request that ended without a whole response: a smaller one may pass."""


class Refused(Exception):
    """The server will not answer this, however often it is asked."""

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(cause)
        self.fix = fix


def server_url(text: str) -> str:
    """An address as it is used: without a trailing slash or `/v1`, which a request adds itself.

    Raises:
        ConfigError: it is no http(s) address, or holds more than host, port and path.
    """
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, TypeError):
        raise ConfigError("a teacher server's address cannot be read", "Write it as http://host:8000") from None
    if url.userinfo:
        raise ConfigError(f"the address of the teacher server {url.host} holds a password", f"Put a key in {KEY_VARIABLE}")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise ConfigError(f"{_shown(text)} is no teacher server's address", "Write it as http://host:8000")
    return str(url).rstrip("/").removesuffix("/v1").rstrip("/")


def _shown(address: str) -> str:
    """What of a refused address can hold no secret: nothing where it may name a user, else all before a query or fragment."""
    if "@" in address:
        return "what holds an '@'"
    bare = re.split(r"[?#]", address, maxsplit=1)[0]
    return f"'{bare}'" if bare == address else f"'{bare}' with a query or fragment"


def tls_of(urls: list[str]) -> ssl.SSLContext:
    """What certificates are verified with. To read the authorities takes 40 ms; where no address is https none is trusted."""
    if any(httpx.URL(url).scheme == "https" for url in urls):
        return httpx.create_ssl_context()
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own, which no proxy can reach."""
    host = httpx.URL(url).host
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def key() -> str:
    """The servers' key, or nothing.

    Raises:
        ConfigError: the variable holds what cannot be one.
    """
    found = os.environ.get(KEY_VARIABLE, "")
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise ConfigError(f"{KEY_VARIABLE} holds something other than a key", "Set it to the key alone")
    return found


def parsed(raw: bytes) -> Any:
    """A body as JSON.

    Raises:
        BadAnswer: it is none.
    """
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise BadAnswer(f"it is no JSON: {raw[:40]!r}") from None


@dataclass(eq=False)
class Connections:
    """Those to one server, each never shared by two requests. `requests`, `received_bytes`: until now.

    Nothing compressed is accepted, no redirect is followed, TLS certificates are verified, and this machine's own addresses are
    reached without a proxy.
    """

    url: str
    timeouts: Timeouts
    key: str
    tls: ssl.SSLContext
    requests: int = 0
    received_bytes: int = 0
    _idle: list[httpx.AsyncClient] = field(default_factory=list)

    async def get(self, path: str, request_id: str) -> bytes:
        """A small response's body; raises as `post` does."""
        return await self._request("GET", path, None, request_id, MESSAGE_BYTES)

    async def post(self, path: str, body: dict[str, Any], request_id: str, most_bytes: int) -> bytes:
        """A response's body.

        Raises:
            Unreachable, Broken, Refused, BadAnswer: what it ended with instead.
        """
        content = json.dumps(body, separators=(",", ":")).encode()
        return await self._request("POST", path, content, request_id, most_bytes)

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().aclose()

    async def _request(self, method: str, path: str, content: bytes | None, request_id: str, most_bytes: int) -> bytes:
        client = self._idle.pop() if self._idle else self._client()
        try:
            async with asyncio.timeout(self.timeouts.request_s):
                raw = await self._transfer(client, method, path, content, request_id, most_bytes)
        except BaseException as error:
            await client.aclose()  # what is left in a connection would be read as the next answer
            meaning = _meaning(error, self.timeouts)
            if meaning is error:
                raise
            raise meaning from error
        self._idle.append(client)
        return raw

    async def _transfer(
        self, client: httpx.AsyncClient, method: str, path: str, content: bytes | None, request_id: str, most_bytes: int
    ) -> bytes:
        self.requests += 1
        headers = {"X-Request-Id": request_id}
        async with client.stream(method, path.lstrip("/"), content=content, headers=headers) as response:
            if response.status_code == httpx.codes.OK:
                return await self._body(response, most_bytes)
            told = b""
            with suppress(BadAnswer, httpx.HTTPError):  # the status says enough
                told = await self._body(response, MESSAGE_BYTES)
            raise _failure(response, told)

    async def _body(self, response: httpx.Response, most_bytes: int) -> bytes:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise BadAnswer("it came compressed, which was not asked for")
        pieces, size = [], 0
        async for piece in response.aiter_raw():
            size += len(piece)
            self.received_bytes += len(piece)
            if size > most_bytes:
                raise BadAnswer(f"it is longer than the {most_bytes} bytes that any answer can have")
            pieces.append(piece)
        return b"".join(pieces)

    def _client(self) -> httpx.AsyncClient:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return httpx.AsyncClient(
            base_url=self.url + "/",
            headers=headers,
            verify=self.tls,
            trust_env=not is_loopback(self.url),
            follow_redirects=False,
            timeout=httpx.Timeout(self.timeouts.read_s, connect=self.timeouts.connect_s),
            limits=httpx.Limits(max_connections=1),
        )


def _meaning(error: BaseException, wait: Timeouts) -> BaseException:
    """What an exception of the network means for the question."""
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)):
        return Unreachable(f"no connection ({str(error) or type(error).__name__})")
    if isinstance(error, TimeoutError):
        return Broken(f"no whole response in {wait.request_s:g} s")
    if isinstance(error, httpx.TimeoutException):
        return Broken(f"silence for {wait.read_s:g} s")
    if isinstance(error, httpx.HTTPError):
        return Broken(f"a broken connection ({str(error) or type(error).__name__})")
    return error


_FIXES = {
    400: "See the message; for vLLM, a larger --max-logprobs or --max-model-len may be needed",
    401: f"Put the server's key in {KEY_VARIABLE}",
    403: f"Put the server's key in {KEY_VARIABLE}",
    404: "Check the address (without /v1), the dialect and the model's name",
    405: "Check the address (without /v1) and the dialect",
    422: "Use a newer version of the server, or check the dialect",
}
_BUSY = (429, 503)


def _failure(response: httpx.Response, told: bytes) -> Exception:
    """A status that is not 200, as what it means for the question."""
    status = response.status_code
    cause = f"HTTP {status}{_message(told)}"
    if status in _BUSY:
        return Unreachable(cause, _after_s(response.headers.get("retry-after", "")))
    if status >= 500 or status in (408, 413):
        return Broken(cause)
    if response.has_redirect_location:
        return Refused(f"HTTP {status}, a redirect, which is not followed", "Give the server's final address")
    return Refused(cause, _FIXES.get(status, "Check the address and the dialect"))


def _message(body: bytes) -> str:
    """The server's own words, in one short line."""
    with suppress(BadAnswer, AttributeError):
        reply = parsed(body)
        told = reply.get("error", reply)
        text = told.get("message") or told.get("detail") if isinstance(told, dict) else told
        if text:
            return ": " + " ".join(str(text).split())[:200]
    return ""


def _after_s(header: str) -> float:
    """Seconds of a Retry-After, in either of its forms; 0 if it is neither."""
    with suppress(ValueError):
        return max(0.0, float(header)) if float(header) < float("inf") else 0.0
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    return 0.0
