"""`python -m speckd.quickstart.train_teacher --out DIR`: how the shipped teacher was made.

Plain AdamW on an endless stream of tasks of levels 1 and 2, loss on completions, cosine schedule. About twenty minutes on two
cores. Writes a Transformers folder with float16 weights and a manifest (hash, recipe, accuracy on 300 test tasks of level 2).
"""

import argparse
import json
import math
import sys
from itertools import islice
from pathlib import Path

import torch
import transformers
from rich.progress import track

from speckd.errors import SpeckdError
from speckd.quickstart.data import collate, encode
from speckd.quickstart.evaluation import accuracy, generate_greedy
from speckd.quickstart.models import digest, llama, load_teacher
from speckd.tasks import build_tokenizer, distinct, stream

MIXTURE = ("instruction", "math", "instruction", "code")  # instruction is the hardest to learn
SHAPE = {"hidden": 144, "layers": 4, "heads": 6}


LEVEL, TEST_EXAMPLES = 2, 300


def train(steps: int, batch_size: int, learning_rate: float, seed: int) -> tuple[object, object]:
    tokenizer = build_tokenizer()
    model = llama(len(tokenizer), seed=seed, **SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
    streams = [stream("train", level, seed, MIXTURE) for level in (1, 2, 2, 2)]
    for step in track(range(steps), description="training the teacher"):
        rate = min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * max(rate, 0.01)
        examples = [e for source in streams for e in islice(source, batch_size // len(streams))]
        batch, mask = collate(encode(examples, tokenizer), tokenizer.pad_token_id)
        loss = model(input_ids=batch.input_ids, attention_mask=mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    return model, tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        print(f"error: {args.out} exists. Choose another --out", file=sys.stderr)
        return SpeckdError.exit_code
    model, tokenizer = train(args.steps, args.batch_size, args.learning_rate, args.seed)
    model.half().save_pretrained(args.out)  # type: ignore[attr-defined]
    tokenizer.save_pretrained(args.out)  # type: ignore[attr-defined]
    manifest = {"sha256": digest(args.out), "recipe": {k: v for k, v in vars(args).items() if k != "out"}}
    (args.out / "manifest.json").write_text(json.dumps(manifest))
    teacher, tokenizer = load_teacher(args.out)
    manifest["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    manifest["parameters"] = teacher.num_parameters()
    examples = distinct("test", TEST_EXAMPLES, LEVEL)
    answers = generate_greedy(teacher, encode(examples, tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    manifest["test_accuracy"] = accuracy(examples, tokenizer.batch_decode(answers))
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(json.dumps(manifest, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
