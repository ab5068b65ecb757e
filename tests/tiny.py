"""Tiny models, data and runs: everything a test of `speckd train` needs, made on the spot."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speckd.cli import main
from speckd.tasks import build_tokenizer, stream


def write_model(
    folder: Path, seed: int, hidden: int = 16, layers: int = 1, dropout: float = 0.0, width: int | None = None
) -> Path:
    """A random Llama over the tasks' vocabulary, with its tokenizer. `width`: rows of the head, to pad the vocabulary."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=width or len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        attention_dropout=dropout,
        tie_word_embeddings=True,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts and completions of uneven lengths."""
    return [{"prompt": e.prompt, "completion": f" {e.completion}"} for e in islice(stream("train", 2, seed), count)]


def common_flags(student: Path, teacher: Path | None, data: Path, output: Path) -> list[str]:
    flags = f"--model_name_or_path {student} --dataset_name {data} --output_dir {output} --logging_steps 1 --disable_tqdm true"
    flags += " --learning_rate 1e-2 --lr_scheduler_type constant --train_sampling_strategy sequential --save_strategy no"
    flags += " --use_cpu true --gradient_checkpointing false"
    return flags.split() + (["--teacher_model_name_or_path", str(teacher)] if teacher else [])


def run_cli(flags: list[str]) -> int:
    return main(["train", *flags])


def log_of(output: Path) -> list[dict[str, float]]:
    """The logged training steps."""
    entries = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]
