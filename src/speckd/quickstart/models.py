"""The shipped teacher and the students that learn from it."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from speckd.errors import SpeckdError

TEACHER = Path(str(files("speckd") / "quickstart" / "teacher"))


def llama(vocabulary_size: int, hidden: int, layers: int, heads: int, seed: int) -> Any:
    """A freshly initialised small Llama with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def quiet_loading() -> None:
    """No bar for every load and save of a model that takes milliseconds."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def load_teacher(folder: Path = TEACHER) -> tuple[Any, Any]:
    """The shipped teacher in float32, and its tokenizer, after checking the weights' hash.

    Raises:
        SpeckdError: the weights are missing or are not the ones that the manifest names.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        expected = json.loads((folder / "manifest.json").read_text())["sha256"]
        found = digest(folder)
    except FileNotFoundError as error:
        raise SpeckdError(f"the quickstart's teacher is incomplete: {error.filename} is missing", "Reinstall speckd") from None
    if found != expected:
        raise SpeckdError(
            f"the quickstart's teacher has hash {found[:12]}…, its manifest says {expected[:12]}…",
            "Reinstall speckd, or train it anew: python -m speckd.quickstart.train_teacher --out DIR",
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(folder)
