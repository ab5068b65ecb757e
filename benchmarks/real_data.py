"""Real text of four kinds with a teacher that `speckd train` made: which method learns most from it, source by source.

    python benchmarks/real_data.py --data ../shared/data --out runs/real-data --seeds 3 --steps 100

GSM8K, MAWPS, MBPP and Dolly, all in one training set. The teacher (2.2 million parameters) learns them by `--recipe sft`, and
so does each seed's start (0.3 million); every method of a seed goes on from that start with the same data order, with the clean
teacher and with one that is wrong at a quarter of the positions. Each run is `speckd train` in this process, one thread. What
is finished is not run again, so a killed benchmark goes on where it stopped. Writes results.json and table.md after every run.
"""

import argparse
import json
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from real_measures import measure, teacher_texts
from real_sources import SOURCES, write
from real_tables import Found, tables
from speckd.cli import main as speckd
from speckd.quickstart.models import quiet_loading

TEACHER_SHAPE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
STUDENT_SHAPE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4}
ENTRIES, LONGEST, HELD_OUT = 2000, 160, 40

SFT = "SFT"
METHODS: Mapping[str, list[str]] = {
    SFT: ["--recipe", "sft"],
    "ungated": ["--recipe", "ungated"],
    "Top-5, mask": ["--recipe", "paper-v1"],
    "Top-5, β = 0.01": ["--recipe", "paper-v2-top-k"],
    "Spec-5, mask": ["--recipe", "paper-v1", "--gate", "spec", "--gate_options", '{"candidates": 5}'],
    "label ratio": ["--recipe", "label-ratio"],
    "trust": ["--gate", "trust", "--rejected", "label"],
    "hybrid LK": ["--recipe", "lk-hybrid"],
    "trust, hybrid LK": ["--recipe", "lk-hybrid", "--gate", "trust", "--rejected", "label"],
}
TEACHERS = {"clean": 0.0, "25 % scrambled": 0.25}


@dataclass(frozen=True)
class Job:
    """One run."""

    seed: int
    method: str
    teacher: str

    @property
    def name(self) -> str:
        words = f"{self.method} {self.teacher} seed{self.seed}".replace("β = ", "").replace("%", "")
        return "-".join("".join(c if c.isalnum() else " " for c in words).split())


def jobs(seeds: int) -> Iterator[Job]:
    """Seed by seed, so that a table of some seeds is soon there; SFT asks no teacher."""
    for seed in range(seeds):
        for teacher, fraction in TEACHERS.items():
            for method in METHODS:
                if method != SFT or not fraction:
                    yield Job(seed, method, teacher)


# ---- training --------------------------------------------------------------------------------------------------------------


def fresh(out: Path, name: str, shape: Mapping[str, int], seed: int) -> Path:
    """A randomly initialised Llama with the benchmark's tokenizer."""
    folder = out / "fresh" / name
    if (folder / "config.json").is_file():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(out / "data" / "tokenizer")
    config = LlamaConfig(
        **shape,
        num_key_value_heads=shape["num_attention_heads"],
        vocab_size=len(tokenizer),
        max_position_embeddings=2 * LONGEST,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    print(f"{name}: {model.num_parameters():,} parameters", flush=True)
    return folder


def train(out: Path, name: str, student: Path, settings: Mapping[str, Any], method: list[str]) -> Path:
    """`speckd train` into `runs/NAME`, unless that holds a finished run; what it prints goes to `logs/NAME.txt`.

    Raises:
        SystemExit: it failed; the log says why.
    """
    folder = out / "runs" / name
    if (folder / "results.json").is_file():
        return folder
    steps = settings["max_steps"]
    given = {
        "model_name_or_path": student,
        "dataset_name": out / "data" / "train.jsonl",
        "output_dir": folder,
        "max_length": LONGEST,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 10),
        "logging_steps": 10,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    began, cpu = time.perf_counter(), time.process_time()
    words = ["train", *method, *(word for key, value in given.items() for word in (f"--{key}", str(value)))]
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with (out / "logs" / f"{name}.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            code = speckd(words)
        except Exception:
            traceback.print_exc()
            code = 1
    if code:
        raise SystemExit(f"*** {name} ended with exit code {code}: see {out / 'logs' / f'{name}.txt'}")
    seconds, of_cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f"{name}: {steps} steps in {seconds:.0f} s ({of_cpu:.0f} s of CPU)", flush=True)
    return folder


def made_teacher(out: Path, args: argparse.Namespace) -> Path:
    """The one model that is long in the making, so with checkpoints to go on from."""
    settings = {
        "max_steps": args.teacher_steps,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": args.batch_size,
        "save_steps": 50,
        "save_total_limit": 1,
        "resume_from_checkpoint": True,
        "seed": 0,
    }
    return train(out, "teacher", fresh(out, "teacher", TEACHER_SHAPE, 0), settings, METHODS[SFT])


def student_settings(args: argparse.Namespace, seed: int, steps: int, rate: float) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "learning_rate": rate,
        "per_device_train_batch_size": args.batch_size,
        "save_strategy": "no",
        "overwrite_output_dir": True,
        "seed": seed,
    }


def made_start(out: Path, args: argparse.Namespace, seed: int) -> Path:
    student = fresh(out, f"student-seed{seed}", STUDENT_SHAPE, seed)
    settings = student_settings(args, 1000 + seed, args.start_steps, 4e-3)
    return train(out, f"start-seed{seed}", student, settings, METHODS[SFT])


def run(out: Path, args: argparse.Namespace, job: Job) -> Path:
    settings = student_settings(args, job.seed, args.steps, args.learning_rate)
    method = list(METHODS[job.method])
    if job.method != SFT:
        settings["teacher_model_name_or_path"] = out / "runs" / "teacher"
        settings["scrambled_teacher_fraction"] = TEACHERS[job.teacher]
    return train(out, job.name, out / "runs" / f"start-seed{job.seed}", settings, method)


# ---- measuring -------------------------------------------------------------------------------------------------------------


def measured(out: Path, folder: Path) -> dict[str, dict[str, float]]:
    """By source; kept beside the model."""
    path = folder / "measures.json"
    if not path.is_file():
        teacher, data = out / "runs" / "teacher", out / "data"
        found = measure(folder, teacher, data, teacher_texts(teacher, data, teacher / "texts.json"))
        path.write_text(json.dumps(found, indent=1) + "\n")
    return dict(json.loads(path.read_text()))


def shown(out: Path, args: argparse.Namespace, counts: Mapping[str, Any], found: list[Found]) -> str:
    """Writes results.json and table.md of what there is so far."""
    own = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key not in ("out", "data")
    }
    (out / "results.json").write_text(
        json.dumps({"settings": own, "rows": counts, "runs": [vars(one) for one in found]}, indent=1) + "\n"
    )
    text = tables(found, list(METHODS), list(TEACHERS))
    (out / "table.md").write_text(text + "\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with gsm8k, mawps, mbpp and dolly")
    parser.add_argument("--out", type=Path, default=Path("runs/real-data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--start-steps", type=int, default=300, help="SFT steps of each seed's start")
    parser.add_argument("--teacher-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_loading()
    out, rows = args.out, args.out / "data" / "rows.json"
    if not rows.is_file():
        counts = write(args.data, out / "data", ENTRIES, LONGEST, HELD_OUT)
        rows.write_text(json.dumps(counts, indent=1) + "\n")
    counts = json.loads(rows.read_text())
    print(", ".join(f"{name}: {counts[name]}" for name in SOURCES), flush=True)
    found = [Found(None, "teacher", "–", measured(out, made_teacher(out, args)))]
    wanted = list(jobs(args.seeds))
    for number, job in enumerate(wanted, 1):
        if all(one.seed != job.seed for one in found):
            found.append(Found(job.seed, "start", "–", measured(out, made_start(out, args, job.seed))))
        found.append(Found(job.seed, job.method, job.teacher, measured(out, run(out, args, job))))
        print(f"{number} of {len(wanted)}: {job.name}", flush=True)
        shown(out, args, counts, found)
    print(shown(out, args, counts, found))


if __name__ == "__main__":
    main()
