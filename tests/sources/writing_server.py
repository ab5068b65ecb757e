"""A scripted server that continues prompts: what it writes is a function of prompt, seed and weights; and it can misbehave."""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from zlib import crc32

END = 1
#: The log-probability that the server gives every token it is asked about.
SAID = -1.5
#: Takes the good reply and may change it; raises to break the connection; returns (status, reply).
Fault = Callable[[dict[str, Any]], tuple[int, Any]]


def continued(prompt: list[int], seed: int, weights: str, limit: int) -> list[int]:
    """Up to `limit` tokens; how many, and which, is drawn by a hash."""
    state = crc32(repr((prompt, seed, weights)).encode())
    length = state % 7
    ids = [2 + (state >> (3 * i)) % 50 for i in range(length)]
    return ids[:limit] if limit <= length else [*ids, END]


@dataclass(eq=False)
class WritingServer:
    """`faults`: of the first answers, None for a good one; `model`: what is served beside the adapters; `lost_answers`: which
    of the other requests, from 1, are done, but not said to be."""

    faults: list[Fault | None] = field(default_factory=list)
    model: str = "toy"
    longest: int = 4096
    asked: list[dict[str, Any]] = field(default_factory=list)
    posted: list[tuple[str, Any]] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)
    weights: str = "first"
    lost_answers: tuple[int, ...] = ()
    connections: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> Self:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                server.connections.append(self.request)
                super().setup()

            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                cards = [{"id": name, "max_model_len": None, "parent": server.model} for name in server.adapters]
                self.answer(200, {"data": [{"id": server.model, "max_model_len": server.longest, "parent": None}, *cards]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if self.path == "/v1/completions":
                    self.complete(body)
                else:
                    server.posted.append((self.path, body))
                    reply = server.administer(self.path, body)
                    self.answer(*((500, {}) if len(server.posted) in server.lost_answers else reply))

            def complete(self, body: dict[str, Any]) -> None:
                server.asked.append(body)
                place = len(server.asked) - 1
                fault = server.faults[place] if place < len(server.faults) else None
                try:
                    self.answer(*(200, server.good(body)) if fault is None else fault(server.good(body)))
                except ConnectionError:
                    self.close_connection = True
                    self.connection.close()

            def answer(self, status: int, reply: Any) -> None:
                data = json.dumps(reply).encode()
                with suppress(OSError):  # who asked may have gone
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=lambda: self._http.serve_forever(0.02), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        for connection in self.connections:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def good(self, body: dict[str, Any]) -> dict[str, Any]:
        if "prompt_logprobs" in body:
            return self.judged(body)
        weights = self.adapters.get(body["model"], self.weights)
        ids = continued(body["prompt"], body["seed"], weights, body["max_tokens"])
        choice = {
            "index": 0,
            "text": "x",
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
            "finish_reason": "stop" if ids[-1:] == [END] else "length",
        }
        return {"id": f"cmpl-{body['request_id']}", "model": body["model"], "choices": [choice]}

    def judged(self, body: dict[str, Any]) -> dict[str, Any]:
        """Each token the most probable one."""
        (ids,) = body["prompt"]
        entries = [None, *({str(token): {"logprob": SAID, "rank": 1}} for token in ids[1:])]
        choice = {"index": 0, "text": "x", "prompt_logprobs": entries, "prompt_token_ids": ids}
        return {"id": f"cmpl-{body['request_id']}", "model": body["model"], "choices": [choice]}

    def administer(self, path: str, body: Any) -> tuple[int, Any]:
        match path:
            case "/v1/load_lora_adapter" if body["lora_name"] in self.adapters:
                return 400, {"error": {"message": "has already been loaded"}}
            case "/v1/unload_lora_adapter" if body["lora_name"] not in self.adapters:
                return 404, {"error": {"message": "cannot be found"}}
            case "/v1/load_lora_adapter":
                self.adapters[body["lora_name"]] = body["lora_path"]
            case "/v1/unload_lora_adapter":
                self.adapters.pop(body["lora_name"])
            case "/collective_rpc":
                self.weights = body["kwargs"]["weights_path"]
            case "/pause?mode=wait" | "/resume":
                pass
            case _:
                return 404, {"detail": "Not Found"}
        return 200, {}


def status(code: int) -> Fault:
    return lambda good: (code, {"error": {"message": "told so"}})


def changed(**values: Any) -> Fault:
    """A wrong value in the reply or in its choice."""

    def fault(good: dict[str, Any]) -> tuple[int, Any]:
        choice = {**good["choices"][0], **{name: value for name, value in values.items() if name in good["choices"][0]}}
        return 200, {**good, "choices": [choice], **{name: value for name, value in values.items() if name in good}}

    return fault


def broken(good: dict[str, Any]) -> tuple[int, Any]:
    raise ConnectionError


def slow(good: dict[str, Any]) -> tuple[int, Any]:
    time.sleep(1.5)  # longer than the tests' clients wait
    return 200, good
