"""Small random models of several architectures."""

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)


def random_model(
    kind: str, seed: int, vocabulary: int, hidden: int = 16, layers: int = 2, spread: float = 0.5, **more: Any
) -> Any:
    """`spread`: of the weights, and so how uneven the distributions are. `more`: of the configuration."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": spread,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary,
            n_embd=hidden,
            n_layer=layers,
            n_head=2,
            n_positions=64,
            initializer_range=spread,
            bos_token_id=None,
            eos_token_id=None,
            **more,
        )
        return GPT2LMHeadModel(config).eval()
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**shape, sliding_window=4, **more)).eval()
    if kind == "gemma2":  # every other layer attends to a window
        return Gemma2ForCausalLM(Gemma2Config(**shape, sliding_window=4, head_dim=8, **more)).eval()
    config_type, model_type = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    return model_type(config_type(**shape, **more)).eval()
