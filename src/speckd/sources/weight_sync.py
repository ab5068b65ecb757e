"""A student's weights on the servers that write for it: how old they may be, and how they get there.

Two ways, both of stock vLLM (read against 0.32), and both through a folder that trainer and servers can read:

- `Adapters`, for a LoRA student: each state is loaded under a name of its own, and every answer says by its model's name which
  state wrote it. A prefix cache cannot mix states, for vLLM keeps it by adapter.
- `WholeModels`, for any student: the servers pause, reload their weights in place and go on (vLLM's development mode).

Until every server confirms, and says of a text what the student says of it in this process, none is asked for anything: a
server may well answer that all is loaded where it is not.
"""

import itertools
import logging
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from speckd.errors import CapabilityError, ConfigError, SpeckdError
from speckd.sources.server_writer import ServerWriter
from speckd.teachers.conversation import offered_models
from speckd.teachers.dialect import Wanted
from speckd.teachers.exchange import MESSAGE_BYTES, Connections, Refused, parsed
from speckd.teachers.vllm import VLLM

logger = logging.getLogger(__name__)

_LAST_WAIT_S = 5.0
#: Writes the student as `save_pretrained` does, into a new folder.
Save = Callable[[Path], None]


@dataclass(frozen=True)
class Canary:
    """A text by which it is seen that a server's weights are the student's.

    `token_ids`: [T] int64; `log_probs`: what the student says now, [T − 1], of each token after the first; `tolerance`: nats in
    the mean over the tokens that a server may be off, for it rounds otherwise. Weights that are older by less are not noticed.
    """

    token_ids: Tensor
    log_probs: Callable[[], Tensor]
    tolerance: float = 0.1

    def check(self, writer: ServerWriter) -> None:
        """
        Raises:
            CapabilityError: a server says something else.
        """
        own, model, ids = self.log_probs().double().cpu(), str(writer.model), self.token_ids.tolist()
        dialect, wanted = VLLM(), Wanted(1)

        async def ask(connections: Connections, request_id: str) -> Tensor:
            body = dialect.write(model, [ids], wanted, request_id)
            raw = await connections.post(dialect.path, body, request_id, MESSAGE_BYTES + 1024 * len(ids))
            (heard,) = dialect.read(parsed(raw), [ids], [list(range(len(ids) - 1))], wanted).heard
            return torch.tensor(heard.labels, dtype=torch.float64)

        for server, said in zip(writer.servers.all, writer.servers.each(ask), strict=True):
            off = float((said - own).abs().mean())
            if not off <= self.tolerance:
                raise CapabilityError(
                    f"server {server.url} says that it holds the student's weights, but is {off:.3g} nat off in the mean",
                    "Use a newer vLLM, a LoRA student (Adapters), or a model whose head is not tied to its embedding",
                )


class WeightSync(Protocol):
    """Keeps the servers' weights at most so many optimizer steps behind the student's."""

    @property
    def weights_step(self) -> int | None:
        """Of which optimizer step the servers' weights are; None before the first synchronisation."""
        ...

    def sync(self, step: int) -> None:
        """To be called before a step's text is asked for; `step`: optimizer steps that were made.

        Raises:
            SpeckdError: a server cannot take the weights.
        """
        ...


class _Loading(Protocol):
    """How one state gets from a folder into the servers."""

    def load(self, writer: ServerWriter, folder: Path, step: int) -> None: ...

    def unload(self, writer: ServerWriter, patience_s: float) -> None:
        """At the end, takes out of the servers what is of no use to others."""
        ...


class BoundedSync:
    """
    Args:
        writer: probed; its model's name may change.
        save: writes the student.
        folder: which the servers can read too, and nobody else uses: it is removed at the end.
        loading: `Adapters` or `WholeModels`.
        canary: asked after each loading.
        max_staleness: optimizer steps that the servers' weights may be behind; 0: never.
    """

    def __init__(
        self, writer: ServerWriter, save: Save, folder: Path, loading: _Loading, canary: Canary, max_staleness: int = 0
    ) -> None:
        if max_staleness < 0:
            raise ConfigError(f"max_staleness is {max_staleness}", "Give a number of optimizer steps, or 0")
        self._writer, self._save, self._folder, self._loading = writer, save, folder, loading
        self._canary = canary
        self._most = max_staleness
        self._step: int | None = None
        self._written: Path | None = None

    @property
    def weights_step(self) -> int | None:
        return self._step

    def staleness(self, step: int) -> int | None:
        """How many optimizer steps the servers are behind, at that step."""
        return None if self._step is None else step - self._step

    def sync(self, step: int) -> None:
        behind = self.staleness(step)
        if behind is not None and 0 <= behind <= self._most:
            return
        new = self._folder / f"step-{step}"
        shutil.rmtree(new, ignore_errors=True)
        self._save(new)
        self._step = None  # where the loading fails nobody knows what the servers hold
        self._loading.load(self._writer, new, step)
        self._canary.check(self._writer)
        self._step = step
        if self._written is not None and self._written != new:
            shutil.rmtree(self._written, ignore_errors=True)
        self._written = new
        was = "at the start" if behind is None else f"after {behind} steps"
        logger.info("The servers write with the student's weights of step %d (renewed %s).", step, was)

    def close(self) -> None:
        """Leaves nothing behind, as far as the servers can still be asked."""
        with suppress(SpeckdError):
            self._loading.unload(self._writer, _LAST_WAIT_S)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._step = self._written = None


class Adapters:
    """For vLLM started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment.

    `name`: of the student; each state is served under it, its step, and what no other state of this or another run has. Two
    states at a time are in a server (--max-loras 2, so that the next is loaded before the last is gone).
    """

    def __init__(self, name: str = "speckd-student") -> None:
        self._name = f"{name}-{secrets.token_hex(4)}"
        self._numbers = itertools.count()
        self._asked: set[str] = set()  # to be loaded, at any time

    def load(self, writer: ServerWriter, folder: Path, step: int) -> None:
        new = f"{self._name}-{next(self._numbers)}-step-{step}"
        body = {"lora_name": new, "lora_path": str(folder.resolve())}

        async def put(connections: Connections, request_id: str) -> None:
            try:
                await connections.post("/v1/load_lora_adapter", body, request_id, MESSAGE_BYTES)
            except Refused:
                if new not in await self._offered(connections, request_id):  # else an answer was lost, and nothing more
                    raise

        self._asked.add(new)
        writer.servers.each(put)
        writer.model = new
        self._remove_all(writer, self._asked - {new})

    def unload(self, writer: ServerWriter, patience_s: float) -> None:
        self._remove_all(writer, self._asked, patience_s)

    def _remove_all(self, writer: ServerWriter, names: set[str], patience_s: float | None = None) -> None:
        """What of them a server offers: a request that was given up may have been done after the removal."""

        async def remove(connections: Connections, request_id: str) -> None:
            for name in await self._offered(connections, request_id):
                if name in names:
                    await self._remove(connections, request_id, name)

        if names:
            writer.servers.each(remove, patience_s)

    async def _remove(self, connections: Connections, request_id: str, name: str) -> None:
        try:
            await connections.post("/v1/unload_lora_adapter", {"lora_name": name}, request_id, MESSAGE_BYTES)
        except Refused:
            if name in await self._offered(connections, request_id):
                raise

    async def _offered(self, connections: Connections, request_id: str) -> list[str]:
        return [model.name for model in offered_models(parsed(await connections.get("/v1/models", request_id)))]


class WholeModels:
    """For vLLM started with VLLM_SERVER_DEV_MODE=1 in its environment: a server for nobody but this run."""

    def load(self, writer: ServerWriter, folder: Path, step: int) -> None:
        """Requests under way come to their end first; the pause drops what was cached of them."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}

        async def renew(connections: Connections, request_id: str) -> None:
            await connections.post("/pause?mode=wait", {}, request_id, MESSAGE_BYTES)
            await connections.post("/collective_rpc", body, request_id, MESSAGE_BYTES)
            await connections.post("/resume", {}, request_id, MESSAGE_BYTES)

        writer.servers.each(renew)

    def unload(self, writer: ServerWriter, patience_s: float) -> None:
        """The servers keep the last weights: there are no others."""
