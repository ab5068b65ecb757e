"""vLLM's dialect: `/v1/completions` with token ids and `prompt_logprobs`, read against vLLM 0.32."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

from speckd.teachers.dialect import BadAnswer, Heard, Reply, Wanted, field, number

#: JSON has no −inf, so vLLM writes this instead.
_IMPOSSIBLE = -9999.0


@dataclass(frozen=True)
class VLLM:
    """A vLLM server. Its `prompt_logprobs` are those of the raw logits at temperature 1, whatever a request's temperature."""

    path: str = "/v1/completions"

    def write(self, model: str, sequences: Many[list[int]], wanted: Wanted, request_id: str) -> dict[str, Any]:
        """All the settings that a server's own defaults could change are given, and one token is generated, the fewest."""
        return {
            "model": model,
            "prompt": list(sequences),
            "prompt_logprobs": -1 if wanted.whole else wanted.count,
            "max_tokens": 1,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "add_special_tokens": False,
            "return_token_ids": True,
            "request_id": request_id,
        }

    def read(self, reply: Any, sequences: Many[list[int]], positions: Many[list[int]], wanted: Wanted) -> Reply:
        """Choices by their index; each is a list with null for the first token, then {id: {logprob, rank}} for each one.

        There are K entries, or one more where the token that follows is not among the first K.
        """
        choices = field(reply, "choices", list)
        by_index = {field(choice, "index", int): choice for choice in choices}
        if len(choices) != len(sequences) or sorted(by_index) != list(range(len(sequences))):
            raise BadAnswer(f"it has {len(choices)} answers, numbered {sorted(by_index)!s:.40}, to {len(sequences)} questions")
        heard = [_heard(by_index[i], sequences[i], positions[i], wanted) for i in range(len(sequences))]
        echoed = reply.get("id")
        return Reply(field(reply, "model", str), echoed.removeprefix("cmpl-") if isinstance(echoed, str) else None, heard)

    def allow(self, wanted: Wanted) -> str:
        return f"--max-logprobs {-1 if wanted.whole else wanted.count}"

    def lengthen(self, tokens: int) -> str:
        return f"--max-model-len {tokens}"


def _heard(choice: dict[str, Any], sequence: list[int], positions: list[int], wanted: Wanted) -> Heard:
    entries = field(choice, "prompt_logprobs", list)
    if len(entries) != len(sequence):
        raise BadAnswer(f"it has log-probabilities for {len(entries)} tokens of {len(sequence)}")
    if entries[0] is not None:
        raise BadAnswer("it has log-probabilities for the first token, which nothing comes before")
    for place, (entry, token) in enumerate(zip(entries[1:], sequence[1:], strict=True), 1):
        if not isinstance(entry, dict) or str(token) not in entry:
            raise BadAnswer(f"token {token} at position {place} is not in it")
    rows = [_ranked(entries[position + 1], str(sequence[position + 1]), wanted) for position in positions]
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and not isinstance(echoed, list):
        raise BadAnswer("its 'prompt_token_ids' is no list")
    labels = [_log_prob(entries[position + 1][str(sequence[position + 1])]) for position in positions]
    return Heard(echoed, None, [ids for ids, _ in rows], [log_probs for _, log_probs in rows], labels)


def _ranked(entry: dict[str, Any], label: str, wanted: Wanted) -> tuple[list[int], list[float]]:
    """The first K by rank; only the token that follows may be there with a later one."""
    count = len(entry) if wanted.whole else wanted.count
    ids: list[int | None] = [None] * count
    log_probs = [0.0] * count
    for key, item in entry.items():
        rank = field(item, "rank", int)
        if 1 <= rank <= count and ids[rank - 1] is None:
            ids[rank - 1], log_probs[rank - 1] = _token(key), _log_prob(item)
        elif key != label or rank <= count:
            raise BadAnswer(f"token {key:.20} has rank {rank} of {count}")
    found = [token for token in ids if token is not None]
    if len(found) < count:
        raise BadAnswer(f"it has {len(found)} of the {count} most probable tokens")
    return found, log_probs


def _token(key: str) -> int:
    if not (key.isascii() and key.isdigit()):
        raise BadAnswer(f"a token id is '{key:.20}'")
    return int(key)


def _log_prob(item: Any) -> float:
    value = number(item.get("logprob") if isinstance(item, dict) else None)
    return float("-inf") if value <= _IMPOSSIBLE else value
