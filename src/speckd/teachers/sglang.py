"""SGLang's dialect: `/generate` with `input_ids` and `return_logprob`.

Written from SGLang's public documentation and tested against a scripted server that follows it, not yet against a real one.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

from speckd.teachers.dialect import BadAnswer, Heard, Reply, Wanted, field, number


@dataclass(frozen=True)
class SGLang:
    """An SGLang server. A sequence's log-probabilities are asked for from its first token on, and nothing is generated."""

    path: str = "/generate"

    def write(self, model: str, sequences: Many[list[int]], wanted: Wanted, request_id: str) -> dict[str, Any]:
        """`rid` names each sequence, and is repeated with its answer."""
        return {
            "rid": [f"{request_id}-{i}" for i in range(len(sequences))],
            "input_ids": list(sequences),
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": wanted.count,
            "return_text_in_logprobs": False,
        }

    def read(self, reply: Any, sequences: Many[list[int]], positions: Many[list[int]], wanted: Wanted) -> Reply:
        """A list in the order of the questions; entries are [log-probability, id, text], with null for the first token."""
        if not isinstance(reply, list) or len(reply) != len(sequences):
            raise BadAnswer(f"it is no list of {len(sequences)} answers")
        heard = [_heard(*each, wanted) for each in zip(reply, sequences, positions, strict=True)]
        named = {(name or "").rpartition("-")[0] for name in (one.request_id for one in heard)}
        numbers = [(one.request_id or "").rpartition("-")[2] for one in heard]
        whole = len(named) == 1 and numbers == [str(i) for i in range(len(heard))]
        return Reply(None, named.pop() if whole else None, heard)

    def allow(self, wanted: Wanted) -> str:
        return f"a limit of at least {wanted.count} for top_logprobs_num"

    def lengthen(self, tokens: int) -> str:
        return f"--context-length {tokens}"


def _heard(answer: Any, sequence: list[int], positions: list[int], wanted: Wanted) -> Heard:
    facts = field(answer, "meta_info", dict)
    own, top = field(facts, "input_token_logprobs", list), field(facts, "input_top_logprobs", list)
    if not len(own) == len(top) == len(sequence):
        raise BadAnswer(f"it has log-probabilities for {len(own)} and {len(top)} tokens of {len(sequence)}")
    repeated = [_pair(entry)[1] for entry in own]
    rows = [_row(top[position + 1], wanted) for position in positions]
    labels = [number(_pair(own[position + 1])[0]) for position in positions]
    name = facts.get("id")
    return Heard(
        repeated, name if isinstance(name, str) else None, [ids for ids, _ in rows], [values for _, values in rows], labels
    )


def _row(entries: Any, wanted: Wanted) -> tuple[list[int], list[float]]:
    if not isinstance(entries, list) or len(entries) != wanted.count:
        raise BadAnswer(f"it has not {wanted.count} most probable tokens")
    pairs = [_pair(entry) for entry in entries]
    return [token for _, token in pairs], [number(value) for value, _ in pairs]


def _pair(entry: Any) -> tuple[Any, int]:
    """(log-probability, token id) of one entry."""
    if not isinstance(entry, list) or len(entry) < 2 or isinstance(entry[1], bool) or not isinstance(entry[1], int):
        raise BadAnswer(f"an entry is {entry!r:.40}")
    return entry[0], entry[1]
