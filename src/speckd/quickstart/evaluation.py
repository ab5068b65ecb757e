"""The quickstart's measures, all on held-out tasks under one fixed rule."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from speckd.quickstart.data import Encoded
from speckd.tasks import FAMILIES, Example, verify_all

DRAFT_LENGTH = 5
MAX_NEW_TOKENS = 64


@torch.no_grad()
def generate_greedy(model: Any, encoded: Sequence[Encoded], end: int, pad: int) -> list[list[int]]:
    """Greedy completions without the end token, all prompts in one batch, padded on the left."""
    length = max(e.prompt_length for e in encoded)
    ids, mask = torch.full((len(encoded), length), pad), torch.zeros((len(encoded), length), dtype=torch.long)
    for row, e in enumerate(encoded):
        ids[row, length - e.prompt_length :] = torch.tensor(e.ids[: e.prompt_length])
        mask[row, length - e.prompt_length :] = 1
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
    )[:, length:]
    return [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in out.tolist()]


def accuracy(examples: Sequence[Example], completions: Sequence[str]) -> dict[str, float]:
    """Share of right completions by family, and `accuracy`, the mean over families."""
    verdicts = verify_all(examples, completions)
    found = {}
    for family in FAMILIES:
        own = [v for v, e in zip(verdicts, examples, strict=True) if e.family == family]
        found[family] = sum(own) / len(own)
    return {"accuracy": sum(found.values()) / len(found), **found}


def block_efficiency(matches: Sequence[Tensor], draft_length: int = DRAFT_LENGTH) -> float:
    """τ, tokens per teacher call, of greedy speculative decoding.

    Under greedy verification the output is the teacher's own greedy text, and a drafted token is kept iff it equals it: so the
    run of matches decides, exactly.

    Args:
        matches: for each text, [n] bool: the student's argmax given the teacher's prefix is the teacher's token.
    """
    tokens = calls = 0
    for text in matches:
        place = 0
        while place < len(text):
            window = text[place : place + draft_length].tolist()
            kept = window.index(False) if False in window else len(window)
            place += min(kept + 1, len(text) - place)
            calls += 1
        tokens += len(text)
    return tokens / calls
