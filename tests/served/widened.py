"""The same function with wider heads: vLLM's attention on a CPU has no kernels for heads as narrow as a small model's."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

_TIMES = 4


def widen(source: Path, out: Path) -> Path:
    """Writes a Llama with heads four times as wide and the same outputs.

    Dimension i of d is rotated with base^(−2i/d), as is dimension 4i of 4d: there the old rows of queries and keys go,
    and zeros between them. Scores are divided by √(4d) then, so queries are doubled, which rounds nothing.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM) and not model.config.attention_bias
    width = model.config.head_dim
    state = {name: _wider(name, tensor, width) for name, tensor in model.state_dict().items()}
    model.config.head_dim = _TIMES * width
    model.config.dtype = torch.float32
    wide = LlamaForCausalLM(model.config)
    wide.load_state_dict(state)
    wide.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, out / name)
    assert json.loads((out / "config.json").read_text())["head_dim"] == _TIMES * width
    return out


def _wider(name: str, tensor: Tensor, width: int) -> Tensor:
    place = torch.arange(width // 2) * _TIMES
    rotated = torch.cat([place, place + _TIMES * width // 2])
    if "q_proj" in name:
        return _spread(2 * tensor, width, rotated)
    if "k_proj" in name:
        return _spread(tensor, width, rotated)
    if "v_proj" in name:
        return _spread(tensor, width, torch.arange(width))
    if "o_proj" in name:
        return _spread(tensor.T, width, torch.arange(width)).T.contiguous()
    return tensor


def _spread(rows: Tensor, width: int, places: Tensor) -> Tensor:
    """[heads · d, H] -> [heads · 4d, H], each head's rows at those places."""
    heads = rows.view(-1, width, rows.shape[1])
    wide = rows.new_zeros(len(heads), _TIMES * width, rows.shape[1])
    wide[:, places] = heads
    return wide.reshape(-1, rows.shape[1])
