"""A pretrained teacher on real text: every method from one starting student, with a clean and with a scrambled teacher.

    python benchmarks/real_text.py --teacher ../shared/models/stories260K --data ../shared/data/tinystories --out runs/real-text

Each run is `speckd train` itself, in a process of its own. A run that has finished is not run again, so a killed benchmark goes
on where it stopped. Prints and writes tables (held-out, mean and spread over seeds), every run and a picture of TAR.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from real_measures import Answers, measure, teacher_texts
from speckd.over_seeds import paired

METHODS = {
    "SFT": ["--recipe", "sft"],
    "ungated": ["--recipe", "ungated"],
    "Top-5, mask": ["--recipe", "paper-v1"],
    "Spec-5, mask": ["--recipe", "paper-v1", "--gate", "spec", "--gate_options", '{"candidates": 5}'],
    "Top-5, label": ["--recipe", "top-k-label"],
    "label ratio, label": ["--recipe", "label-ratio"],
    "trust, label": ["--gate", "trust", "--rejected", "label"],
    "hybrid LK": ["--recipe", "lk-hybrid"],
    "hybrid LK, trust, label": ["--recipe", "lk-hybrid", "--gate", "trust", "--rejected", "label"],
}
#: Those that reject nothing.
GATELESS = ("SFT", "ungated", "hybrid LK")
TEACHERS = {"clean": 0.0, "25 % scrambled": 0.25}
MEASURES = {
    "nll": "NLL", "kl": "KL", "agreement": "agreement", "alpha": "α", "tar": "TAR", "tau": "τ", "rouge_l": "ROUGE-L"
}  # fmt: skip
#: Stories go on from their first words: τ along the teacher's own greedy text, ROUGE-L of the student's against the story's.
STORIES = {"TinyStories": Answers("rouge", "rouge_l", 60, 40)}
PROMPT_WORDS, COMPLETION_WORDS = 20, 40
PROMPT = "Once upon a time, there was a little dog named Max. One day,"


@dataclass(frozen=True)
class Run:
    method: str
    teacher: str
    seed: int

    def folder(self, out: Path) -> Path:
        name = f"{self.method}-{self.teacher}-seed{self.seed}"
        return out / "".join(c if c.isalnum() else "-" for c in name)


def fresh_student(teacher: Path, folder: Path, seed: int) -> int:
    """Writes a randomly initialised student of a quarter of stories260K's parameters, with its tokenizer; returns its size."""
    known = LlamaConfig.from_pretrained(teacher)
    config = LlamaConfig(
        vocab_size=known.vocab_size,
        hidden_size=48,
        intermediate_size=92,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=known.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=known.bos_token_id,
        eos_token_id=known.eos_token_id,
        pad_token_id=known.pad_token_id,
    )
    set_seed(seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return model.num_parameters()


def train(args: argparse.Namespace, student: Path, folder: Path, seed: int, steps: int, method: list[str]) -> None:
    """`speckd train`, unless its folder holds a finished run."""
    if (folder / "results.json").exists():
        return
    command = [sys.executable, "-m", "speckd", "train", *method]
    settings = {
        "model_name_or_path": student,
        "teacher_model_name_or_path": args.teacher,  # of SFT, for evaluation only
        "dataset_name": args.data / "train.jsonl",
        "eval_dataset": args.data / "dev.jsonl",
        "eval_rows": 100,
        "output_dir": folder,
        "max_length": 256,
        "per_device_train_batch_size": 16,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "max_steps": steps,
        "logging_steps": 5,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "seed": seed,
        "overwrite_output_dir": True,
    }
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    print(" ".join(command), flush=True)
    with (args.out / "runs.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)


def sample(folder: Path, tokens: int = 60) -> str:
    """The model's greedy continuation of a fixed prompt."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)[0]
    return tokenizer.decode(ids, skip_special_tokens=True)


def write_stories(data: Path, out: Path) -> None:
    """The dev stories, cut in two: what is given, and what it goes on with."""
    lines = []
    for line in (data / "dev.jsonl").read_text(encoding="utf-8").splitlines():
        words = json.loads(line)["text"].split(" ")
        if len(words) >= PROMPT_WORDS + COMPLETION_WORDS:
            given, rest = words[:PROMPT_WORDS], words[PROMPT_WORDS : PROMPT_WORDS + COMPLETION_WORDS]
            lines.append(json.dumps({"prompt": " ".join(given), "completion": " " + " ".join(rest)}))
    (out / "TinyStories.jsonl").write_text("\n".join(lines[:100]) + "\n", encoding="utf-8")


def measure_stories(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """`tau` and `rouge_l` of a model; kept beside it."""
    path = folder / "measures.json"
    if not path.is_file():
        texts = teacher_texts(args.teacher, args.out, args.out / "teacher-texts.json", tuple(STORIES))
        found = measure(folder, args.teacher, args.out, texts, STORIES)["TinyStories"]
        path.write_text(json.dumps({"tau": found["tau"], "rouge_l": found["answers"], "asked": found["asked"]}) + "\n")
    return dict(json.loads(path.read_text()))


def finals(out: Path, run: Run) -> dict[str, float]:
    folder = run.folder(out)
    end: dict[str, float] = json.loads((folder / "results.json").read_text())["end"]
    return end | json.loads((folder / "measures.json").read_text())


def write_results(out: Path, seeds: list[int]) -> None:
    """Every run's measures in one file."""
    runs = [Run(method, teacher, seed) for seed in seeds for method, teacher in _cells()]
    lines = [json.dumps({**vars(run), "measures": finals(out, run)}) for run in runs]
    (out / "results.jsonl").write_text("\n".join(lines) + "\n")


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def table(out: Path, seeds: list[int]) -> str:
    lines = ["| method | teacher | " + " | ".join(MEASURES.values()) + " |", "|---|---|" + "---|" * len(MEASURES)]
    for method, teacher in _cells():
        runs = [finals(out, Run(method, teacher, seed)) for seed in seeds]
        cells = [spread([run[name] for run in runs]) for name in MEASURES]
        lines.append(f"| {method} | {'–' if method == 'SFT' else teacher} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def difference(out: Path, seeds: list[int], run: tuple[str, str], base: tuple[str, str], measure: str) -> str:
    """Mean over seeds of run − base, paired by seed, with a 95 % t-interval."""
    ours, theirs = ({seed: finals(out, Run(*cell, seed))[measure] for seed in seeds} for cell in (run, base))
    gap = paired(ours, theirs)
    return f"{gap.mean:+.3f}" if math.isnan(gap.low) else f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def differences(out: Path, seeds: list[int]) -> str:
    columns = [
        (t, base, name)
        for t in TEACHERS
        for base, name in (("ungated", "nll"), ("SFT", "nll"), ("ungated", "alpha"), ("ungated", "tau"))
    ]
    head = [f"{t}: {MEASURES[name]} − that of {base}" for t, base, name in columns]
    lines = ["| method | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for method in [m for m in METHODS if m not in ("SFT", "ungated")]:
        cells = []
        for teacher, base, name in columns:
            other = (base, "clean" if base == "SFT" else teacher)
            cells.append(difference(out, seeds, (method, teacher), other, name))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells() -> list[tuple[str, str]]:
    return [(m, t) for t, m in product(TEACHERS, METHODS) if not (m == "SFT" and t != "clean")]


def draw_tar(out: Path, seed: int) -> None:
    """TAR in training of one seed's gated runs, clean and scrambled side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, teacher in zip(axes, TEACHERS, strict=True):
        for method, style in zip([m for m in METHODS if m not in GATELESS], cycle(("-", "--", "-.", ":")), strict=False):
            lines = (Run(method, teacher, seed).folder(out) / "training_log.jsonl").read_text().splitlines()
            points = [(e["step"], e["tar"]) for e in map(json.loads, lines) if "tar" in e]
            axis.plot(*zip(*points, strict=True), style, label=method)
        axis.set(title=f"{teacher} teacher", xlabel="optimizer step", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("token acceptance rate in training\n(soft gate: mean weight)")
    axes[0].legend()
    figure.suptitle(f"stories260K → a quarter of its size, TinyStories, seed {seed}")
    figure.savefig(out / "tar.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and dev.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--start_steps", type=int, default=500, help="SFT steps of the common start")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_stories(args.data, args.out)
    for seed in args.seeds:
        fresh, start = args.out / f"fresh-seed{seed}", args.out / f"start-seed{seed}"
        size = fresh_student(args.teacher, fresh, seed)
        print(f"seed {seed}: a student of {size:,} parameters", flush=True)
        train(args, fresh, start, seed, args.start_steps, METHODS["SFT"])
        for method, teacher in _cells():
            scrambled = ["--scrambled_teacher_fraction", str(TEACHERS[teacher])]
            folder = Run(method, teacher, seed).folder(args.out)
            train(args, start, folder, seed, args.steps, METHODS[method] + scrambled)
            measure_stories(args, folder)
    write_results(args.out, args.seeds)
    first = args.seeds[0]
    lines = [table(args.out, args.seeds), "", differences(args.out, args.seeds), ""]
    lines += [f"n = {len(args.seeds)} seeds (± standard deviation); the teacher's own NLL on the same tokens: "]
    lines[-1] += f"{finals(args.out, Run('ungated', 'clean', first))['teacher_nll']:.3f}."
    lines += ["", "Greedy samples, seed " + str(first), ""]
    lines += [
        f"- fresh: {sample(args.out / f'fresh-seed{first}')!r}",
        f"- SFT start: {sample(args.out / f'start-seed{first}')!r}",
    ]
    for method, teacher in _cells():
        lines.append(f"- {method}, {teacher}: {sample(Run(method, teacher, first).folder(args.out))!r}")
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    draw_tar(args.out, first)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
