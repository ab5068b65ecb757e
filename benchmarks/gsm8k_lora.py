"""A realistic vocabulary (GPT-2's 50,257 entries) and LoRA on GSM8K: small random models, SFT for both, then LoRA distillation.

    python benchmarks/gsm8k_lora.py --tokenizer ../shared/models/gpt2_tokenizer --data ../shared/data/gsm8k --out runs/gsm8k

It shows that the path works end to end at that width; models this small do not solve GSM8K, and nothing here claims so.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

SHAPES = {"teacher": (96, 3), "student": (64, 2)}


def fresh(name: str, tokenizer_folder: Path, folder: Path) -> Path:
    """A random Llama of the given name's shape over the tokenizer's vocabulary; the student's head is padded to 50,304 rows."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    hidden, layers = SHAPES[name]
    set_seed(0)
    config = LlamaConfig(
        vocab_size=50_304 if name == "student" else len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(args: argparse.Namespace, model: Path, output: Path, *more: str) -> dict:
    settings = {
        "model_name_or_path": model,
        "dataset_name": args.data / "train.jsonl",
        "eval_dataset": args.data / "dev.jsonl",
        "eval_rows": 40,
        "dataset_prompt_column": "question",
        "dataset_completion_column": "answer",
        "output_dir": output,
        "overwrite_output_dir": True,
        "max_steps": args.steps,
        "max_length": 256,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 10,
        "save_strategy": "no",
        "gradient_checkpointing": False,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    began = time.time()
    subprocess.run([sys.executable, "-m", "speckd", "train", *words, *more], check=True)
    found = json.loads((output / "results.json").read_text())
    return found | {"seconds": time.time() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    fresh_models = {name: fresh(name, args.tokenizer, args.out / f"fresh-{name}") for name in SHAPES}
    tuned = {}
    for name in SHAPES:
        tuned[name] = args.out / f"sft-{name}"
        print(f"SFT of the {name}", train(args, fresh_models[name], tuned[name], "--recipe", "sft")["end"], flush=True)
    lora = ["--use_peft", "true", "--lora_r", "8", "--lora_alpha", "16", "--lora_target_modules", "all-linear"]
    teacher = ["--teacher_model_name_or_path", str(tuned["teacher"])]
    for recipe in ("ungated", "label-ratio", "paper-v1"):
        found = train(args, tuned["student"], args.out / f"lora-{recipe}", "--recipe", recipe, *teacher, *lora)
        print(recipe, json.dumps({k: found[k] for k in ("start", "end", "seconds")}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"peak memory of the largest run: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
