"""A real small model behind the tests' scripted server: what vLLM would answer, and whatever can go wrong with it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from speckd.tasks import build_tokenizer
from tests.teachers.faulty_server import Fault, FaultyServer


@dataclass(frozen=True)
class ServedModel:
    """Log-probabilities of a causal language model; a sequence's rows are computed once."""

    model: Any
    known: dict[tuple[int, ...], np.ndarray] = field(default_factory=dict)

    def log_probs(self, tokens: list[int], position: int) -> np.ndarray:
        key = tuple(tokens)
        if key not in self.known:
            with torch.no_grad():
                logits = self.model(torch.tensor([tokens])).logits[0]
            self.known[key] = logits.double().log_softmax(-1).numpy()
        return self.known[key][position]


def served(folder: Path, fault: Fault | None = None, share: float = 0.3, start: int = 0, seed: int = 0) -> FaultyServer:
    tokenizer = build_tokenizer()
    return FaultyServer(
        toy=ServedModel(AutoModelForCausalLM.from_pretrained(folder).eval()),  # type: ignore[arg-type]
        fault=fault,
        share=share,
        start=start,
        seed=seed,
        tokenize=lambda text: tokenizer.encode(text, add_special_tokens=False),
    )
