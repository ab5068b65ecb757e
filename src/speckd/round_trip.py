"""From tokens that a model wrote to a row of a data set, and whether training reads the same tokens out of it again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speckd.sources.writer import Completion
from speckd.trl_internals import common_prefix_length, token_ids

_PROBE = "x"


@dataclass(frozen=True)
class Rendering:
    """How a run makes tokens of its rows. `tokenizer`: the student's, with the run's chat template in it; `stops`: ids after
    which a model is to write no more."""

    tokenizer: Any
    stops: frozenset[int]

    def prompt_ids(self, row: Mapping[str, Any]) -> list[int]:
        """What is to be continued: as in training, up to where the completion's own tokens begin."""
        ids = self._prompt_ids(row)
        ends = isinstance(row["prompt"], str) and not row["prompt"].endswith(self.tokenizer.eos_token)
        while ends and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:  # a tokenizer that ends whatever it is given
            ids.pop()
        return ids

    def row(self, asked: Mapping[str, Any], prompt_ids: list[int], written: Completion) -> dict[str, Any]:
        """The row asked, with the completion in its shape; without the end, which training adds."""
        text = self._text(prompt_ids, written)
        completion: Any = text if isinstance(asked["prompt"], str) else [{"role": "assistant", "content": text}]
        return {**asked, "completion": completion}

    def survives(self, row: Mapping[str, Any], prompt_ids: list[int], written: Completion) -> bool:
        """Does training on the row read prompt and completion as they were written, the end token included?

        Of one that was cut off, up to there: the end that training puts behind it nobody wrote. What a chat template adds
        behind the end token is no matter.
        """
        ids = [*prompt_ids, *written.token_ids.tolist()]
        read = self.trained_ids(row)
        if isinstance(row["prompt"], str) and len(read) != len(ids) + (not written.finished):
            return False
        return read[: len(ids)] == ids

    def trained_ids(self, row: Mapping[str, Any]) -> list[int]:
        """Prompt and completion as TRL's trainer prepares them."""
        prompt, completion, end = row["prompt"], row["completion"], self.tokenizer.eos_token
        if isinstance(prompt, str) and not completion.endswith(end):
            completion += end
        return token_ids(self.tokenizer, prompt + completion, **_template(row))

    def with_template_end(self, row: Mapping[str, Any]) -> "Rendering":
        """With the token by which the chat template ends an answer among the stops."""
        if isinstance(row["prompt"], str):
            return self
        prompt = self._prompt_ids(row)
        answered = self.trained_ids({**row, "completion": [{"role": "assistant", "content": _PROBE}]})
        added = self.tokenizer.added_tokens_decoder
        answer = answered[common_prefix_length(prompt, answered) :]
        end = next((i for i in answer if i in added and added[i].special), None)
        return self if end is None else Rendering(self.tokenizer, self.stops | {end})

    def _prompt_ids(self, row: Mapping[str, Any]) -> list[int]:
        return token_ids(self.tokenizer, row["prompt"], add_generation_prompt=True, **_template(row))

    def _text(self, prompt_ids: list[int], written: Completion) -> str:
        """What stands behind the prompt: a tokenizer may decode a text's first word without the space before it."""
        ids = written.token_ids.tolist()
        ids = ids[:-1] if written.finished and ids and ids[-1] in self.stops else ids
        before, whole = self._decoded(prompt_ids), self._decoded([*prompt_ids, *ids])
        return whole[len(before) :] if whole.startswith(before) else self._decoded(ids)

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def template_end(tokenizer: Any, row: Mapping[str, Any]) -> frozenset[int]:
    """The token by which the chat template ends an answer to a row of a data set; none where the row is no conversation."""
    turns = row.get("prompt") or row.get("messages") or ""
    if isinstance(turns, str) or tokenizer.chat_template is None:
        return frozenset()
    answered = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    asked = turns if row.get("prompt") or not answered else turns[: answered[-1]]
    present = {name: value for name, value in row.items() if value is not None}
    return Rendering(tokenizer, frozenset()).with_template_end({**present, "prompt": asked}).stops


def with_template(tokenizer: Any, path: str | None, template_of: Any) -> Any:
    """The tokenizer with the run's chat template. `template_of`: the tokenizer of a folder or hub id that `path` may be."""
    if path is None:
        return tokenizer
    if Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return tokenizer
    other = template_of(path)
    tokenizer.chat_template = other.chat_template
    if other.eos_token in tokenizer.get_vocab():
        tokenizer.eos_token = other.eos_token
    return tokenizer


def _template(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says to its chat template; a plain text has none."""
    if isinstance(row["prompt"], str):
        return {}
    return {**({"tools": row["tools"]} if row.get("tools") else {}), **(row.get("chat_template_kwargs") or {})}
