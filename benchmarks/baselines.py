"""Every baseline, plain and with the paper's gate, on the three families of tasks: one table, paired by seed.

    python benchmarks/baselines.py --out runs/baselines --seeds 5 --steps 200

The shipped teacher; students of 70 thousand parameters, which start from the same weights for all methods of a seed (SFT). Each
run is `speckd train` with a recipe and nothing else of its own, two at a time. What is finished is not run again, so a killed
benchmark goes on where it stopped. Writes results.json, table.md and baselines.png.
"""

import argparse
import json
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from speckd.cli import main as speckd
from speckd.over_seeds import interval
from speckd.quickstart.compare import STUDENT, TEST_EXAMPLES, measure
from speckd.quickstart.data import encode
from speckd.quickstart.evaluation import generate_greedy
from speckd.quickstart.models import TEACHER, llama, load_teacher, quiet_loading
from speckd.tasks import distinct
from speckd.tasks.__main__ import write as write_tasks

LEVEL, ROWS, BATCH_SIZE, START_STEPS = 2, 2400, 24, 800
NEW_TOKENS = 48  # the teacher needs 16 on average
PLAIN, GATE = "plain", "speckd"
DATA, TEACHER_TEXT = "data.jsonl", "teacher-text.jsonl"

#: recipe -> what it is trained on. Those that write their own text take the prompts of the data.
BASELINES = {
    "sft": DATA,
    "seqkd": TEACHER_TEXT,
    "kd": DATA,
    "reverse-kl": DATA,
    "imitkd": DATA,
    "gkd": DATA,
    "minillm": DATA,
    "distillm": DATA,
    "distillm-2": TEACHER_TEXT,
    "skd": DATA,
    "taid": DATA,
    "abkd": DATA,
    "akl": DATA,
    "todi": DATA,
    "distillspec": DATA,
    "lk-alpha": DATA,
    "lk-hybrid": DATA,
}
#: measure -> (its name, is more better?)
MEASURES = {
    "kl": ("KL", False),
    "nll": ("NLL", False),
    "agreement": ("agreement", True),
    "alpha": ("α", True),
    "tau": ("τ", True),
    "accuracy": ("accuracy", True),
}


@dataclass(frozen=True)
class Job:
    """One run; the start of a seed where `recipe` is None."""

    seed: int
    recipe: str | None = None
    gated: bool = False

    @property
    def name(self) -> str:
        return f"{self.recipe or 'start'}{'+' + GATE if self.gated else ''}-seed{self.seed}"


def jobs(recipes: Sequence[str], seeds: int) -> Iterator[Job]:
    """Seed by seed, so that a table of some seeds is soon there."""
    for seed in range(seeds):
        for recipe in recipes:
            yield Job(seed, recipe)
            if recipe != "sft":  # which asks no teacher
                yield Job(seed, recipe, gated=True)


# ---- one run, in a worker --------------------------------------------------------------------------------------------------


def run(job: Job, out: Path, steps: int, rate: float) -> dict[str, Any]:
    """Trains and measures, unless that is done; returns the job's result."""
    folder = out / "runs" / job.name
    done = folder / "measures.json"
    if done.is_file():
        return json.loads(done.read_text())
    torch.set_num_threads(1)
    quiet_loading()
    began = time.perf_counter()
    with (out / "logs" / f"{job.name}.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            code = speckd(["train", *flags(job, out, folder, steps, rate)])
        except BaseException:
            traceback.print_exc()
            raise
    if code != 0:
        raise RuntimeError(f"{job.name} ended with exit code {code}: see logs/{job.name}.txt")
    found: dict[str, Any] = {"job": vars(job), "seconds": round(time.perf_counter() - began, 1)}
    if job.recipe is not None:
        teacher, tokenizer = load_teacher()
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        texts = json.loads((out / "teacher-answers.json").read_text())
        found["measures"] = measure(student, teacher, tokenizer, texts)
    done.write_text(json.dumps(found) + "\n")
    return found


def flags(job: Job, out: Path, folder: Path, steps: int, rate: float) -> list[str]:
    recipe = (job.recipe or "sft") + (f"+{GATE}" if job.gated else "")
    student = out / ("runs" if job.recipe else "fresh") / (Job(job.seed).name if job.recipe else f"seed{job.seed}")
    settings = {
        "model_name_or_path": student,
        "teacher_model_name_or_path": TEACHER,
        "dataset_name": out / BASELINES.get(job.recipe or "sft", DATA),
        "output_dir": folder,
        "overwrite_output_dir": True,
        "max_steps": steps if job.recipe else START_STEPS,
        "learning_rate": rate if job.recipe else 4e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": (steps if job.recipe else START_STEPS) // 10,
        "per_device_train_batch_size": BATCH_SIZE,
        "max_length": 128,
        "max_completion_length": NEW_TOKENS,
        "logging_steps": 10,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": job.seed,
        "data_seed": 1000 + job.seed,
    }
    return ["--recipe", recipe, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


# ---- what all runs share ---------------------------------------------------------------------------------------------------


def prepare(out: Path, seeds: int, recipes: Sequence[str]) -> None:
    """Data, fresh students, the teacher's answers to the test, and its text where a recipe learns from it."""
    for name in ("runs", "logs", "fresh"):
        (out / name).mkdir(parents=True, exist_ok=True)
    quiet_loading()
    if not (out / DATA).exists():
        write_tasks(out / "tasks", {"train": ROWS}, LEVEL, 0)
        (out / "tasks" / "train.jsonl").rename(out / DATA)
    teacher, tokenizer = load_teacher()
    for seed in range(seeds):
        folder = out / "fresh" / f"seed{seed}"
        if not folder.exists():
            llama(len(tokenizer), seed=seed, **STUDENT).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    answers = out / "teacher-answers.json"
    if not answers.exists():
        asked = encode(distinct("test", TEST_EXAMPLES, LEVEL), tokenizer)
        answers.write_text(json.dumps(generate_greedy(teacher, asked, tokenizer.eos_token_id, tokenizer.pad_token_id)))
    if any(BASELINES[recipe] == TEACHER_TEXT for recipe in recipes) and not (out / TEACHER_TEXT).exists():
        words = ["write", "--model_name_or_path", str(out / "fresh" / "seed0"), "--teacher_model_name_or_path", str(TEACHER)]
        words += ["--dataset_name", str(out / DATA), "--output", str(out / TEACHER_TEXT), "--use_cpu", "true"]
        if speckd([*words, "--max_completion_length", "64", "--max_length", "128"]):
            raise SystemExit("*** the teacher could not write: see above")


def train_all(out: Path, wanted: list[Job], steps: int, rate: float, workers: int) -> list[dict[str, Any]]:
    found, seeds = [], sorted({job.seed for job in wanted})
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(run, [Job(seed) for seed in seeds], *([value] * len(seeds) for value in (out, steps, rate))))
        pending = {pool.submit(run, job, out, steps, rate): job for job in wanted}
        for number, future in enumerate(as_completed(pending), 1):
            try:
                found.append(future.result())
                print(f"{number} of {len(wanted)}: {pending[future].name}, {found[-1]['seconds']} s", flush=True)
            except Exception as error:  # the others go on; what is missing is said in the table
                print(f"*** {pending[future].name}: {error}", flush=True)
    return found


# ---- what they show --------------------------------------------------------------------------------------------------------


def values(found: list[dict[str, Any]], recipe: str, gated: bool, name: str) -> dict[int, float]:
    """By seed."""
    own = [one for one in found if (one["job"]["recipe"], one["job"]["gated"]) == (recipe, gated)]
    return {one["job"]["seed"]: one["measures"][name] for one in own}


def cell(own: dict[int, float]) -> str:
    if not own:
        return "not run"
    deviation = f" ± {statistics.stdev(own.values()):.3f}" if len(own) > 1 else ""
    return f"{statistics.mean(own.values()):.3f}{deviation}"


def gap(gated: dict[int, float], plain: dict[int, float], more_is_better: bool) -> str:
    """Gated − plain, paired by seed, with its 95 % t-interval, and which way that is."""
    gaps = [gated[seed] - plain[seed] for seed in sorted(gated.keys() & plain.keys())]
    if len(gaps) < 2:
        return "–"
    mean, half = interval(gaps)
    clear = abs(mean) > half
    word = ("better" if (mean > 0) == more_is_better else "worse") if clear else "="
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] {word}"


def table(found: list[dict[str, Any]], recipes: Sequence[str]) -> str:
    plain = ["| baseline | " + " | ".join(f"{name}, plain | {name}, +SpecKD" for name, _ in MEASURES.values()) + " |"]
    plain.append("|---" * (1 + 2 * len(MEASURES)) + "|")
    gaps = ["| baseline | " + " | ".join(name for name, _ in MEASURES.values()) + " |", "|---" * (1 + len(MEASURES)) + "|"]
    for recipe in recipes:
        cells, differences = [], []
        for name, (_, more) in MEASURES.items():
            both = [values(found, recipe, gated, name) for gated in (False, True)]
            cells += [cell(both[0]), "–" if recipe == "sft" else cell(both[1])]
            differences.append(gap(both[1], both[0], more))
        plain.append(f"| {recipe} | " + " | ".join(cells) + " |")
        if recipe != "sft":
            gaps.append(f"| {recipe} | " + " | ".join(differences) + " |")
    return "\n".join(
        [
            "Held-out tasks; mean ± standard deviation over the seeds. KL (nats a token), agreement, α = Σ min(p, q), NLL: on "
            "the tasks' own answers; τ: tokens per teacher call, the student drafting 5; accuracy: mean of three families.\n",
            *plain,
            "\n+SpecKD − plain, paired by seed, 95 % t-interval; 'better' and 'worse' where it excludes 0:\n",
            *gaps,
        ]
    )


def draw(found: list[dict[str, Any]], recipes: Sequence[str], path: Path) -> None:
    """The paired differences in KL and τ."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [recipe for recipe in recipes if recipe != "sft"]
    figure, axes = plt.subplots(1, 3, figsize=(11, 0.32 * len(shown) + 1.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("kl", "tau", "accuracy"), strict=True):
        for place, recipe in enumerate(shown):
            both = [values(found, recipe, gated, name) for gated in (True, False)]
            gaps = [both[0][seed] - both[1][seed] for seed in sorted(both[0].keys() & both[1].keys())]
            if gaps:
                mean, half = interval(gaps)
                axis.errorbar(mean, place, xerr=half, fmt="o", color="tab:blue", capsize=3)
        axis.axvline(0, color="black", linewidth=0.8)
        title, more = MEASURES[name]
        axis.set_title(f"{title}: +SpecKD − plain ({'right' if more else 'left'} is better)", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(shown)), shown)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", choices=BASELINES, default=list(BASELINES))
    args = parser.parse_args()
    prepare(args.out, args.seeds, args.recipes)
    found = train_all(args.out, list(jobs(args.recipes, args.seeds)), args.steps, args.learning_rate, args.workers)
    (args.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    text = table(found, args.recipes)
    (args.out / "table.md").write_text(text + "\n")
    draw(found, args.recipes, args.out / "baselines.png")
    print(f"\n{text}\n\nEvery number: {args.out / 'results.json'}; picture: {args.out / 'baselines.png'}")


if __name__ == "__main__":
    main()
