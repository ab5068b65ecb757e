"""What `speckd train` says it will need, beside what it then takes: small random models on the device at hand.

    python benchmarks/memory_plan.py --cases plain,lora --out runs/memory-plan

Each case is `speckd train` itself for three steps, in a process of its own, twice: with a malloc that gives back all that is
freed, which shows what is in use, and as it is. On a CPU the measure is the highest resident memory after the plan was said,
less what was resident then (Linux only); on a GPU, the most that PyTorch allocated. Models are made once and kept.
"""

import argparse
import json
import logging
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from speckd.memory_plan import MIB
from speckd.memory_report import Foreseen

COMMON = (
    "--max_steps 3 --logging_steps 1 --save_strategy no --disable_tqdm true --overwrite_output_dir true "
    "--train_sampling_strategy sequential"
)
#: glibc serves what is smaller than a moving threshold from a heap that it seldom shrinks; fixed, every tensor is given back.
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072"}


_OFF = "--gradient_checkpointing false"


@dataclass(frozen=True)
class Size:
    """A Llama: `hidden` wide, `layers` deep, `words` in its vocabulary."""

    hidden: int
    layers: int
    words: int = 32_000
    tied: bool = True
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"h{self.hidden}-l{self.layers}-v{self.words}-{'tied' if self.tied else 'untied'}-{self.dtype}"


@dataclass(frozen=True)
class Case:
    """A student, a teacher, a batch of `rows` of up to `tokens`, and further flags."""

    student: Size
    teacher: Size
    rows: int
    tokens: int
    flags: str = _OFF
    held_out: bool = False


_SMALL, _MIDDLE, _LARGE, _LARGER = Size(256, 4), Size(512, 6), Size(768, 12), Size(768, 14)
_WIDE, _WIDER, _WIDE_UNTIED = Size(256, 4, 152_064), Size(384, 4, 152_064), Size(256, 4, 152_064, tied=False)
CASES = {
    "small": Case(_SMALL, _MIDDLE, 8, 128),
    "middle": Case(_MIDDLE, _LARGE, 4, 256),
    "long": Case(_SMALL, _MIDDLE, 2, 1024),
    "many rows": Case(_SMALL, _MIDDLE, 32, 64),
    "large": Case(_LARGE, _LARGER, 2, 256),
    "checkpointing": Case(_MIDDLE, _LARGE, 8, 256, "--gradient_checkpointing true"),
    "accumulation": Case(_MIDDLE, _LARGE, 2, 256, f"{_OFF} --gradient_accumulation_steps 2"),
    "sgd": Case(_MIDDLE, _LARGE, 2, 256, f"{_OFF} --optim sgd"),
    "adamw not fused": Case(_MIDDLE, _LARGE, 2, 256, f"{_OFF} --optim adamw_torch"),
    "adafactor": Case(_MIDDLE, _LARGE, 2, 256, f"{_OFF} --optim adafactor"),
    "lora": Case(_MIDDLE, _LARGE, 4, 256, f"{_OFF} --use_peft true"),
    "lora checkpointing": Case(_MIDDLE, _LARGE, 8, 256, "--gradient_checkpointing true --use_peft true"),
    "bf16 autocast": Case(_MIDDLE, _LARGE, 4, 256, f"{_OFF} --bf16 true"),
    "bf16 weights": Case(_MIDDLE, _LARGE, 4, 256, f"{_OFF} --dtype bfloat16"),
    "packing": Case(_MIDDLE, _LARGE, 2, 256, f"{_OFF} --packing true --max_length 256"),
    "152k words": Case(_WIDE, _WIDER, 4, 128),
    "152k words untied": Case(_WIDE_UNTIED, _WIDER, 4, 128),
    "152k words lora": Case(_WIDE, _WIDER, 4, 256, f"{_OFF} --use_peft true"),
    "budget of 64 MiB": Case(_WIDE, _WIDER, 4, 128, f"{_OFF} --loss_memory_budget 64MiB"),
    "large held-out batch": Case(_SMALL, _MIDDLE, 1, 256, "--use_peft true --per_device_eval_batch_size 16", held_out=True),
    "sft": Case(_MIDDLE, _LARGE, 4, 256, f"{_OFF} --recipe sft"),
}


def make_model(place: Path, size: Size) -> Path:
    folder = place / size.name
    if (folder / "config.json").exists():
        return folder
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, size.words)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=size.words,
        hidden_size=size.hidden,
        intermediate_size=11 * size.hidden // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=max(1, size.hidden // 256),
        tie_word_embeddings=size.tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(size.hidden + size.layers)
    LlamaForCausalLM(config).to(getattr(torch, size.dtype)).save_pretrained(folder)
    return folder


def make_data(place: Path, case: Case) -> Path:
    """Every second row is of full length, the others of at least half of it."""
    path, draw = place / f"{case.tokens}-{case.student.words}.jsonl", random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for row in range(96):
            length = case.tokens - 1 if row % 2 == 0 else draw.randrange(case.tokens // 2, case.tokens)
            text = " ".join(f"w{draw.randrange(3, case.student.words)}" for _ in range(length))
            file.write(json.dumps({"text": text}) + "\n")
    return path


# ---- one case, in its own process ------------------------------------------------------------------------------------------


def resident(key: str) -> int:
    """Bytes, of Linux's account of this process: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


class Listener(logging.Handler):
    """Catches the plan when it is said, and measures from there on."""

    def __init__(self) -> None:
        super().__init__()
        self.foreseen: Foreseen | None = None
        self.before = 0

    def emit(self, record: logging.LogRecord) -> None:
        said = record.args[0] if isinstance(record.args, tuple) and record.args else None
        if not isinstance(said, Foreseen):
            return
        self.foreseen = said
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM from here on
        self.before = resident("VmRSS")

    def taken(self) -> int:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM") - self.before


def run_one(flags: list[str]) -> None:
    from speckd.run import train  # TRL is imported here and not by the process that waits

    listener, logger = Listener(), logging.getLogger("speckd")
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    train(None, None, flags)
    assert listener.foreseen is not None, "nothing was foreseen"
    plan = listener.foreseen.plan
    found = {"planned": plan.peak.total, "in_use": plan.peak.in_use, "taken": listener.taken(), "moment": plan.moment}
    found["moments"] = {name: {**vars(parts), "total": parts.total} for name, parts in plan.moments.items()}
    print(json.dumps(found))


# ---- all of them -----------------------------------------------------------------------------------------------------------


def run(name: str, place: Path, environment: dict[str, str]) -> dict:
    """Planned and taken bytes of one case."""
    case = CASES[name]
    student, teacher, data = make_model(place, case.student), make_model(place, case.teacher), make_data(place, case)
    words = [*COMMON.split(), "--model_name_or_path", str(student), "--dataset_name", str(data)]
    words += ["--teacher_model_name_or_path", str(teacher), "--output_dir", str(place / "student")]
    words += ["--per_device_train_batch_size", str(case.rows), *case.flags.split()]
    words += ["--eval_dataset", str(data), "--eval_rows", "16"] if case.held_out else []
    words += [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    command = [sys.executable, __file__, "--one", json.dumps(words)]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def line(name: str, found: dict, exact: dict) -> str:
    cells = [name, found["moment"].removeprefix("the ")]
    for planned, taken in ((exact["in_use"], exact["taken"]), (found["planned"], found["taken"])):
        cells += [f"{planned / MIB:,.0f}", f"{taken / MIB:,.0f}", f"{planned / taken:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/memory-plan"), help="models, data and results.json")
    parser.add_argument("--cases", default=",".join(CASES), help="separated by commas; default: all")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        run_one(given.one)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    results = {}
    print("| case | peak in | in use, MiB: planned | taken | ratio | with holes, MiB: planned | taken | ratio |")
    print("| --- | --- | --: | --: | --: | --: | --: | --: |")
    for name in given.cases.split(","):
        results[name] = {"usual": run(name, given.out, {}), "exact": run(name, given.out, EXACT_MALLOC)}
        print(line(name, results[name]["usual"], results[name]["exact"]), flush=True)
    (given.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    in_use = [both["exact"]["in_use"] / both["exact"]["taken"] for both in results.values()]
    whole = [both["usual"]["planned"] / both["usual"]["taken"] for both in results.values()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{len(results)} cases, {device}, torch {torch.__version__}. Planned / taken: {min(in_use):.2f} to ", end="")
    print(f"{max(in_use):.2f} of what is in use, {min(whole):.2f} to {max(whole):.2f} with what the allocator keeps.")


if __name__ == "__main__":
    main()
