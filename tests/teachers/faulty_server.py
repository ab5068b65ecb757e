"""A scripted teacher's server that can misbehave in any way a server, a proxy or a network does, down to TCP."""

import asyncio
import gzip
import json
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any, Self

import numpy as np

from tests.teachers.toy import VOCABULARY, Toy, tokenized

_STALL_S = 30.0  # longer than any client of the tests waits


@dataclass(eq=False)
class Call:
    """One question: what was asked, what a good server answers, and the means to answer otherwise."""

    server: "FaultyServer"
    writer: asyncio.StreamWriter
    body: dict[str, Any]
    headers: dict[str, str]
    good: Any
    draws: np.random.Generator

    async def send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.writer.write(framed(body, status, headers))
        await self.writer.drain()

    async def send_json(self, reply: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        await self.send(json.dumps(reply).encode(), status, headers)

    async def send_good(self) -> None:
        await self.send_json(self.good)

    @property
    def raw(self) -> bytes:
        return framed(json.dumps(self.good).encode())

    def somewhere(self) -> dict[str, Any]:
        """A dictionary of log-probabilities at one position of one answer."""
        choice = self.good["choices"][self.draws.integers(len(self.good["choices"]))]["prompt_logprobs"]
        return choice[self.draws.integers(1, len(choice))]


Fault = Callable[[Call], Awaitable[None]]


def framed(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> bytes:
    """A response as it goes over the wire."""
    lines = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
    head = "\r\n".join([f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in lines.items())])
    return f"{head}\r\n\r\n".encode() + body


def reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN."""
    with suppress(OSError):  # it may be gone already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@dataclass(eq=False)
class FaultyServer:
    """A vLLM or SGLang server of a toy model, with a fault at some of its answers.

    `fault` strikes with the chance `share` after `start` answers; `seed` decides which. `cap`: most log-probabilities a token;
    `longest`: most tokens.
    """

    toy: Toy = field(default_factory=Toy)
    fault: Fault | None = None
    share: float = 0.3
    start: int = 0
    seed: int = 0
    cap: int = 10**9
    longest: int = 4096
    model: str = "toy"
    tokenize: Callable[[str], list[int]] = tokenized
    repeats: bool = True
    answered: int = 0
    struck: int = 0
    seen_headers: list[dict[str, str]] = field(default_factory=list)
    seen_tokens: list[int] = field(default_factory=list)
    waiting: "tuple[Call, asyncio.Future[Any]] | None" = None
    first: Any = None

    def __post_init__(self) -> None:
        self._draws = np.random.default_rng(self.seed)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._listening: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(self, *exception: object) -> None:
        asyncio.run_coroutine_threadsafe(self.die(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        self._listening = await asyncio.start_server(self._connection, sock=self._socket)

    async def die(self, back_after_s: float | None = None) -> None:
        """As when a process is killed: no listener, every connection reset; back on the same port after a while, if at all."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        for writer in list(self._writers):
            reset(writer)
        if back_after_s is not None:
            self._loop.call_later(back_after_s, lambda: self._loop.create_task(self._come_back()))
        for task in asyncio.all_tasks(self._loop) - {asyncio.current_task()}:
            if back_after_s is None:
                task.cancel()

    async def _come_back(self) -> None:
        if self._listening is None:
            self._socket = socket.create_server(("127.0.0.1", self.port))
            await self._listen()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not writer.is_closing():
                await self._request(reader, writer)
        self._writers.discard(writer)
        writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path = head[0].split(" ")[1]
        call = Call(self, writer, json.loads(body) if body else {}, headers, None, self._draws)
        self.seen_headers.append(headers)
        match path:
            case "/v1/models":
                await call.send_json({"data": [{"id": self.model, "max_model_len": self.longest}]})
            case "/tokenize":
                await call.send_json({"tokens": self.tokenize(call.body["prompt"])})
            case "/v1/completions" | "/generate":
                await self._answer(call, path == "/generate")
            case _:
                await call.send_json({"detail": "Not Found"}, 404)

    async def _answer(self, call: Call, sglang: bool) -> None:
        sequences = call.body["input_ids"] if sglang else call.body["prompt"]
        count = call.body["top_logprobs_num"] if sglang else call.body["prompt_logprobs"]
        if count > self.cap or max(map(len, sequences)) + 1 > self.longest:
            text = f"Requested prompt logprobs of {count}, which is greater than max allowed: {self.cap}"
            await call.send_json({"error": {"message": text, "code": 400}}, 400)
            return
        self.seen_tokens.append(sum(map(len, sequences)))
        call.good = (_sglang if sglang else _vllm)(self, call)
        self.first = self.first or call.good
        self.answered += 1
        if self.fault is not None and self.answered > self.start and self._draws.random() < self.share:
            self.struck += 1
            await self.fault(call)
        else:
            await call.send_good()


def _vllm(server: FaultyServer, call: Call) -> dict[str, Any]:
    count = call.body["prompt_logprobs"]
    choices = []
    for index, tokens in enumerate(call.body["prompt"]):
        entries: list[Any] = [None]
        for position in range(len(tokens) - 1):
            row = server.toy.log_probs(tokens, position)
            order = np.argsort(-row)
            label = tokens[position + 1]
            ranks = {label: int((row >= row[label]).sum())}
            ranks |= {int(token): rank for rank, token in enumerate(order[: len(order) if count < 0 else count], 1)}
            entries.append({str(t): {"logprob": float(row[t]), "rank": r, "decoded_token": chr(t)} for t, r in ranks.items()})
        choice = {"index": index, "text": "x", "prompt_logprobs": entries}
        choices.append({**choice, "prompt_token_ids": list(tokens)} if server.repeats else choice)
    name = f"cmpl-{call.headers['x-request-id']}" if server.repeats else "cmpl-0"
    return {"id": name, "model": server.model, "choices": choices}


def _sglang(server: FaultyServer, call: Call) -> list[Any]:
    replies = []
    for tokens, rid in zip(call.body["input_ids"], call.body["rid"], strict=True):
        own: list[Any] = [[None, tokens[0], None]]
        top: list[Any] = [None]
        for position in range(len(tokens) - 1):
            row = server.toy.log_probs(tokens, position)
            own.append([float(row[tokens[position + 1]]), tokens[position + 1], None])
            top.append([[float(row[t]), int(t), None] for t in np.argsort(-row)[: call.body["top_logprobs_num"]]])
        replies.append({"text": "", "meta_info": {"id": rid, "input_token_logprobs": own, "input_top_logprobs": top}})
    return replies


# Time and TCP


async def latency(call: Call) -> None:
    await asyncio.sleep(0.1 * call.draws.random())
    await call.send_good()


async def silence(call: Call) -> None:
    await asyncio.sleep(_STALL_S)


async def stall_in_headers(call: Call) -> None:
    call.writer.write(call.raw[:30])
    await asyncio.sleep(_STALL_S)


async def stall_in_body(call: Call) -> None:
    call.writer.write(call.raw[: len(call.raw) // 2])
    await asyncio.sleep(_STALL_S)


async def drip(call: Call) -> None:
    for byte in call.raw:
        call.writer.write(bytes([byte]))
        await call.writer.drain()
        await asyncio.sleep(0.02)


async def reset_at_a_byte(call: Call) -> None:
    call.writer.write(call.raw[: call.draws.integers(len(call.raw))])
    with suppress(ConnectionError):
        await call.writer.drain()
    reset(call.writer)


async def end_at_a_byte(call: Call) -> None:
    call.writer.write(call.raw[: call.draws.integers(len(call.raw))])
    await call.writer.drain()
    call.writer.close()


async def die_for_good(call: Call) -> None:
    await call.server.die()


async def fail_and_die(call: Call) -> None:
    """An engine that crashes at a question: its front end says so, and ends."""
    await call.send_json({"error": {"message": "EngineCore encountered an issue"}}, 500)
    await call.server.die()


async def die_and_return(call: Call) -> None:
    await call.server.die(back_after_s=0.1 + 0.2 * call.draws.random())


# HTTP


async def half_json(call: Call) -> None:
    whole = json.dumps(call.good).encode()
    await call.send(whole[: call.draws.integers(1, len(whole))])


async def content_length_too_small(call: Call) -> None:
    body = json.dumps(call.good).encode()
    await call.send(body, headers={"Content-Length": str(len(body) // 2)})


async def content_length_too_large(call: Call) -> None:
    body = json.dumps(call.good).encode()
    await call.send(body, headers={"Content-Length": str(len(body) + 100)})
    call.writer.close()


async def chunked_garbage(call: Call) -> None:
    call.writer.write(b'HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"id"\r\nzz\r\n\r\n')
    await call.writer.drain()


async def no_http(call: Call) -> None:
    call.writer.write(b"\x00\x15SSH-2.0-nothing\r\n\r\n")
    await call.writer.drain()
    call.writer.close()


_BOMB = gzip.compress(bytes(50_000_000))


async def gzip_bomb(call: Call) -> None:
    await call.send(_BOMB, headers={"Content-Encoding": "gzip"})


async def endless_body(call: Call) -> None:
    call.writer.write(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(1000):
        call.writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
        await call.writer.drain()


async def html(call: Call) -> None:
    await call.send(b"<html><body>Welcome to the proxy</body></html>", headers={"Content-Type": "text/html"})


async def redirect(call: Call) -> None:
    await call.send(b"", 307, {"Location": "http://192.0.2.1/v1/completions"})


async def too_many_requests(call: Call) -> None:
    await call.send_json({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.02"})


async def unavailable_with_a_date(call: Call) -> None:
    await call.send_json({"error": "starting"}, 503, {"Retry-After": format_datetime(datetime.now(UTC), usegmt=True)})


async def retry_after_a_day(call: Call) -> None:
    await call.send_json({}, 503, {"Retry-After": "86400"})


def status(code: int) -> Fault:
    """That status, in vLLM's form of an error."""

    async def fault(call: Call) -> None:
        await call.send_json({"error": {"message": f"a {code}\nof this server", "code": code}}, code)

    return fault


async def out_of_memory(call: Call) -> None:
    """Every request of more than one sequence beside the canary."""
    many = len(call.body["prompt"]) > 2
    await (call.send_json({"error": {"message": "EngineCore is out of memory"}}, 500) if many else call.send_good())


async def too_large(call: Call) -> None:
    many = len(call.body["prompt"]) > 2
    await (call.send_json({"error": {"message": "too large"}}, 413) if many else call.send_good())


# Answers to something else


async def twice(call: Call) -> None:
    call.writer.write(call.raw)
    await call.send_good()


async def replayed(call: Call) -> None:
    await call.send_json(call.server.first)


async def replayed_under_the_right_name(call: Call) -> None:
    await call.send_json({**call.server.first, "id": call.good["id"]})


async def exchanged(call: Call) -> None:
    """With the next request that comes, whole."""
    await call.send_json(await _partner(call))


async def exchanged_under_the_right_names(call: Call) -> None:
    """The other's numbers, said to be about these tokens."""
    other = await _partner(call)
    choices = [
        {**own, "prompt_logprobs": another["prompt_logprobs"]}
        for own, another in zip(call.good["choices"], other["choices"], strict=False)
    ]
    await call.send_json({**call.good, "choices": choices + call.good["choices"][len(choices) :]})


async def _partner(call: Call) -> Any:
    waiting = call.server.waiting
    if waiting is not None and not waiting[1].done():
        call.server.waiting = None
        waiting[1].set_result(call.good)
        return waiting[0].good
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    call.server.waiting = (call, future)
    with suppress(TimeoutError):
        return await asyncio.wait_for(future, 0.05)
    return call.server.first


async def choices_in_disorder(call: Call) -> None:
    """Right: the index counts, not the place."""
    await call.send_json({**call.good, "choices": call.good["choices"][::-1]})


async def choices_renumbered(call: Call) -> None:
    """Wrong: the numbers of one answer on another."""
    choices = call.good["choices"]
    for i, choice in enumerate(reversed(choices)):
        choice["index"] = i
    await call.send_good()


async def choices_exchanged_without_names(call: Call) -> None:
    """The neighbours' numbers, as when rows of a batch are mixed up."""
    choices = call.good["choices"]
    numbers = [choice["prompt_logprobs"] for choice in choices]
    for choice, other in zip(choices, numbers[1:] + numbers[:1], strict=True):
        choice["prompt_logprobs"] = other
    await call.send_good()


async def choice_missing(call: Call) -> None:
    await call.send_json({**call.good, "choices": call.good["choices"][:-1]})


async def choice_twice(call: Call) -> None:
    await call.send_json({**call.good, "choices": [*call.good["choices"][:-1], call.good["choices"][0]]})


async def tokens_not_repeated(call: Call) -> None:
    for choice in call.good["choices"]:
        del choice["prompt_token_ids"]
    await call.send_good()


async def other_request(call: Call) -> None:
    await call.send_json({**call.good, "id": "cmpl-speckd-0"})


async def other_model_name(call: Call) -> None:
    await call.send_json({**call.good, "model": "toy-2"})


async def other_model(call: Call) -> None:
    """New weights under the old name."""
    await call.send_json(_vllm(_twin(call, Toy(seed=99)), call))


async def other_model_slightly(call: Call) -> None:
    """The next checkpoint of a training: 0.05 nat away."""
    for choice in call.good["choices"]:
        for entry in choice["prompt_logprobs"][1:]:
            for item in entry.values():
                item["logprob"] -= 0.05
    await call.send_good()


async def other_tokenizer(call: Call) -> None:
    """The ids are another vocabulary's."""
    for choice in call.good["choices"]:
        for i, entry in enumerate(choice["prompt_logprobs"]):
            if entry is not None:
                choice["prompt_logprobs"][i] = {str((int(token) + 1) % VOCABULARY): item for token, item in entry.items()}
    await call.send_good()


def _twin(call: Call, toy: Toy) -> Any:
    @dataclass(frozen=True)
    class Twin:
        toy: Toy
        model: str = call.server.model
        repeats: bool = True

    return Twin(toy)


# Wrong lengths and numbers


async def one_token_short(call: Call) -> None:
    for choice in call.good["choices"]:
        choice["prompt_logprobs"].pop()
    await call.send_good()


async def shifted_by_one(call: Call) -> None:
    """The right length, each entry one place late."""
    for choice in call.good["choices"]:
        entries = choice["prompt_logprobs"]
        choice["prompt_logprobs"] = [None, entries[-1], *entries[1:-1]]
    await call.send_good()


async def nothing_somewhere(call: Call) -> None:
    entries = call.good["choices"][0]["prompt_logprobs"]
    entries[call.draws.integers(1, len(entries))] = None
    await call.send_good()


async def something_first(call: Call) -> None:
    entries = call.good["choices"][0]["prompt_logprobs"]
    entries[0] = entries[1]
    await call.send_good()


async def one_entry_less(call: Call) -> None:
    entry = call.somewhere()
    first = min(entry, key=lambda token: entry[token]["rank"])
    entry.pop(first)
    await call.send_good()


async def ranks_exchanged(call: Call) -> None:
    entry = call.somewhere()
    first, second, *_ = sorted(entry, key=lambda token: entry[token]["rank"])
    entry[first]["rank"], entry[second]["rank"] = 2, 1
    await call.send_good()


async def id_out_of_range(call: Call) -> None:
    entry = call.somewhere()
    entry[str(10**30)] = entry.pop(next(iter(entry)))
    await call.send_good()


async def id_of_padding(call: Call) -> None:
    """An id that the shared vocabulary has not, in the place of one that it has."""
    for choice in call.good["choices"]:
        for entry, token in zip(choice["prompt_logprobs"][1:], choice["prompt_token_ids"][1:], strict=True):
            wrong = next(iter(t for t in entry if t != str(token)))
            entry[str(VOCABULARY + 3)] = entry.pop(wrong)
    await call.send_good()


async def id_negative(call: Call) -> None:
    entry = call.somewhere()
    entry["-3"] = entry.pop(next(iter(entry)))
    await call.send_good()


def number(value: Any) -> Fault:
    """That value in the place of a log-probability."""

    async def fault(call: Call) -> None:
        for choice in call.good["choices"]:
            for entry in choice["prompt_logprobs"][1:]:
                next(iter(entry.values()))["logprob"] = value
        await call.send_good()

    return fault


async def sums_to_more(call: Call) -> None:
    """Σp = 1.5, every p below 1."""
    for choice in call.good["choices"]:
        for entry in choice["prompt_logprobs"][1:]:
            total = sum(np.exp(item["logprob"]) for item in entry.values())
            for item in entry.values():
                item["logprob"] = float(np.log(1.5 / len(entry))) if total else 0.0
    await call.send_good()


async def raw_logits(call: Call) -> None:
    for choice in call.good["choices"]:
        for entry in choice["prompt_logprobs"][1:]:
            for item in entry.values():
                item["logprob"] += 5.0
    await call.send_good()


async def low_logits(call: Call) -> None:
    """Logits that happen to be all below zero."""
    for choice in call.good["choices"]:
        for entry in choice["prompt_logprobs"][1:]:
            for item in entry.values():
                item["logprob"] -= 20.0
    await call.send_good()


async def wrong_shape(call: Call) -> None:
    shapes = [[], 3, None, {"choices": 7}, {**call.good, "choices": [3] * len(call.good["choices"])}, {"choices": None}, "x"]
    await call.send_json(shapes[call.draws.integers(len(shapes))])


async def nested_deeply(call: Call) -> None:
    await call.send(b"[" * 100_000)
