"""Completions by vLLM's servers: `/v1/completions` with token ids, read against vLLM 0.32.

Each prompt is a request of its own, with a seed made of who asks. A server draws with its own generator and rounds by what else
is in its batch: its text is reproducible only as far as the server is, and never equals what this process would draw.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speckd.errors import CapabilityError, ConfigError, VocabularyError
from speckd.randomness import philox
from speckd.sources.servers import Ask, Servers
from speckd.sources.writer import Completion, Draws, Prompt, Sampling
from speckd.teachers.client import Load
from speckd.teachers.conversation import offered_models
from speckd.teachers.dialect import BadAnswer, ServedModel, field
from speckd.teachers.exchange import MESSAGE_BYTES, Connections, Timeouts, parsed

PATH = "/v1/completions"
_STREAM = 7  # of the seeds, apart from other draws
_BYTES_PER_TOKEN = 64
_NEVER = -100.0  # the least that a server adds to a logit


class ServerWriter:
    """
    Args:
        urls: the servers' addresses; they must hold the same weights.
        stops: token ids that end a completion, beside those of the served model's own configuration.
        vocabulary: ids from there on are not to be written.
        model: the served model's name; None for the only one that is no adapter.
        suppressed: [n] int64, other ids that are not to be written, such as tokens that the teacher lacks; some at most, for
            every request holds them.
        timeouts, load: how long to wait, and how many requests at a time to one server.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        stops: frozenset[int],
        vocabulary: int,
        model: str | None = None,
        timeouts: Timeouts | None = None,
        load: Load | None = None,
        suppressed: Tensor | None = None,
    ) -> None:
        self.servers = Servers(urls, timeouts, load)
        self.model = model
        self._stops, self._vocabulary = stops, vocabulary
        self._suppressed = frozenset(() if suppressed is None else suppressed.tolist())

    def probe(self, longest: int) -> None:
        """Waits until the servers are up; finds the model's name. `longest`: tokens of prompt and completion together.

        Raises:
            TeacherLostError, ConfigError, CapabilityError: a server that cannot write what will be asked.
        """
        for server, offered in zip(self.servers.all, self.servers.each(_offered), strict=True):
            model = self._chosen(server.url, offered)
            if model.longest is not None and model.longest < longest:
                raise CapabilityError(
                    f"server {server.url} takes {model.longest} tokens with their completion, and {longest} may be needed",
                    f"Start it with --max-model-len {longest}, or lower max_completion_length",
                )
            self.model = model.name

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, draws: Draws) -> list[Completion]:
        """As `Writer` says, but for the draws, which are the server's own.

        Raises:
            TeacherLostError: no server can be asked, or what they say cannot be believed.
        """
        if self.model is None:
            raise RuntimeError("the servers were not probed")
        return self.servers.share([self._ask(self.model, prompt, sampling, draws) for prompt in prompts])

    def close(self) -> None:
        self.servers.close()

    def _chosen(self, url: str, offered: list[ServedModel]) -> ServedModel:
        whole = [model for model in offered if not model.adapted]  # adapters may be left from a run that was killed
        if self.model is None and len(whole) == 1:
            return whole[0]
        found = next((model for model in offered if model.name == self.model), None)
        if found is None:
            names = ", ".join(model.name for model in offered) or "no model"
            what = f"server {url} offers {names}; wanted: {self.model or 'the only one'}"
            raise ConfigError(what, "Name one of these in teacher_server_model, or start the server with that model")
        return found

    def _ask(self, model: str, prompt: Prompt, sampling: Sampling, draws: Draws) -> Ask[Completion]:
        ids = prompt.token_ids.tolist()
        body = _body(model, ids, sampling, seed_of(prompt, draws), sorted(self._stops))
        if self._suppressed:
            body["logit_bias"] = {str(token): _NEVER for token in sorted(self._suppressed)}
        most = MESSAGE_BYTES + _BYTES_PER_TOKEN * (len(ids) + sampling.max_completion_length)

        async def ask(connections: Connections, request_id: str) -> Completion:
            raw = await connections.post(PATH, {**body, "request_id": request_id}, request_id, most)
            try:
                return self._read(parsed(raw), model, ids, sampling.max_completion_length, request_id)
            except BadAnswer:
                await connections.close()  # one of them may hold more of the same
                raise

        return ask

    def _read(self, reply: Any, model: str, prompt: list[int], limit: int, request_id: str) -> Completion:
        choice = _only_choice(reply, model, request_id)
        if field(choice, "prompt_token_ids", list) != prompt:
            raise BadAnswer("it continues other tokens than were asked")
        ids, reason = field(choice, "token_ids", list), field(choice, "finish_reason", str)
        if not all(isinstance(i, int) and i >= 0 for i in ids) or len(ids) > limit:
            raise BadAnswer(f"it has {len(ids)} tokens of at most {limit}, or some that are none")
        foreign = next((i for i in ids if i >= self._vocabulary or i in self._suppressed), None)
        if foreign is not None:
            shared = self._vocabulary - len(self._suppressed)
            raise VocabularyError(
                f"a server wrote token {foreign}, outside of the shared vocabulary of {shared}",
                "Serve a model with the student's tokens",
            )
        if reason not in ("stop", "length") or (reason == "length" and len(ids) < limit) or (reason == "stop" and not ids):
            raise BadAnswer(f"it ends for the reason '{reason:.20}' after {len(ids)} tokens of at most {limit}")
        return Completion(torch.tensor(ids, dtype=torch.int64), reason == "stop")


def seed_of(prompt: Prompt, draws: Draws) -> int:
    """63 bits for a server's generator: a function of who asks, whichever server is asked, and when."""
    words = philox(draws.seed, tuple(torch.tensor(word) for word in (prompt.sample, 0, draws.turn, _STREAM << 20)))  # type: ignore[arg-type]
    return (int(words[0]) << 31) | (int(words[1]) >> 1)


async def _offered(connections: Connections, request_id: str) -> list[ServedModel]:
    return offered_models(parsed(await connections.get("/v1/models", request_id)))


def _body(model: str, ids: list[int], sampling: Sampling, seed: int, stops: list[int]) -> dict[str, Any]:
    """All the settings that a server's own defaults could change are given."""
    return {
        "model": model,
        "prompt": ids,
        "max_tokens": sampling.max_completion_length,
        "min_tokens": 0,
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "stop_token_ids": stops,
        "ignore_eos": False,
        "add_special_tokens": False,
        "return_token_ids": True,
    }


def _only_choice(reply: Any, model: str, request_id: str) -> dict[str, Any]:
    choices = field(reply, "choices", list)
    if len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswer(f"it has {len(choices)} completions of one prompt")
    if field(reply, "model", str) != model:
        raise BadAnswer(f"it is by the model '{reply['model']:.60}', not '{model}'")
    if field(reply, "id", str).removeprefix("cmpl-") != request_id:
        raise BadAnswer(f"it is to another request ({reply['id']:.60})")
    return choices[0]
