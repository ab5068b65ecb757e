"""Training on text that the student writes: TRL's `GKDTrainer` (lmbda 1) and `DistillationTrainer` against `SpecKDTrainer`.

    python benchmarks/on_policy.py
    python benchmarks/on_policy.py --vocabulary 8000 --steps 4 --repeats 1

Same random models, same prompts in the same order, same number of new tokens; forward KL; every trainer in a process of its
own, one after the other, over and over; medians. Tokens are the supervised ones of each step, counted where the loss is
computed. Prints tables and writes them with every number to `benchmarks/results/HARDWARE-DATE-on-policy.json`.

Two shapes: a step as one batch, and the same step as micro-batches. TRL writes micro-batch by micro-batch; we write once for
the whole step. The share of a step that goes into writing is ours, from the log (`generation_share`).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from speckd.arguments import SpecKDConfig
from speckd.recipe_book import recipe_text
from speckd.trainer import SpecKDTrainer
from trainers import (
    RESULTS,
    WARM_UP,
    Ends,
    Work,
    both_models,
    common,
    forget_peak,
    hardware,
    memory,
    rows,
    shape,
    word_tokenizer,
)

GKD, DISTILLATION, UNGATED, GATED = (
    "TRL GKDTrainer, lmbda 1",
    "TRL DistillationTrainer",
    "speckd, student's text, ungated",
    "speckd, student's text, Top-5, mask",
)
RECIPES = {UNGATED: "ungated", GATED: "paper-v1"}


@dataclass(frozen=True)
class Written:
    """`work.batch` rows a step, in `micro` micro-batches, `new` tokens each."""

    title: str
    work: Work
    micro: int
    new: int

    def settings(self, output: str) -> dict[str, Any]:
        size = self.work.batch // self.micro
        return common(self.work, output) | {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": self.micro,
        }

    def prompts(self) -> list[list[int]]:
        return [row["prompt"] for row in rows(self.work)]


def collated(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What `GKDTrainer` wants: prompts padded on the left, and a completion that it will not use."""
    prompts = [torch.tensor(example["prompt_ids"]) for example in examples]
    flipped = pad_sequence([p.flip(0) for p in prompts], batch_first=True).flip(1)
    masks = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True).flip(1)
    return {
        "input_ids": flipped,
        "attention_mask": masks,
        "labels": flipped,
        "prompts": flipped,
        "prompt_attention_mask": masks,
    }


def gkd(given: Written, output: str, seen: list[int]) -> GKDTrainer:
    class Counted(GKDTrainer):
        def compute_loss(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            seen.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return super().compute_loss(model, inputs, *more, **named)

    student, teacher = both_models(given.work)
    settings = GKDConfig(
        **given.settings(output), lmbda=1.0, beta=0.0, temperature=1.0, max_new_tokens=given.new, max_length=given.work.longest
    )
    data = Dataset.from_list([{"prompt_ids": ids, "input_ids": ids} for ids in given.prompts()])
    return Counted(
        model=student,
        teacher_model=teacher,
        args=settings,
        data_collator=collated,
        train_dataset=data,
        processing_class=word_tokenizer(given.work.vocabulary),
    )


def distillation(given: Written, output: str, seen: list[int]) -> DistillationTrainer:
    class Counted(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            seen.append(int(inputs["completion_mask"].sum()))
            return super().compute_loss(model, inputs, *more, **named)

    student, teacher = both_models(given.work)
    settings = DistillationConfig(
        **given.settings(output),
        beta=0.0,
        temperature=1.0,
        shuffle_dataset=False,
        max_completion_length=given.new,
        disable_dropout=True,
    )
    return Counted(
        model=student,
        teacher_model=teacher,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in ids)} for ids in given.prompts()]),
        processing_class=word_tokenizer(given.work.vocabulary),
    )


def ours(given: Written, output: str, seen: list[int], recipe: str) -> SpecKDTrainer:
    class Counted(SpecKDTrainer):
        def compute_loss(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
            seen.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return super().compute_loss(model, inputs, *more, **named)

    student, teacher = both_models(given.work)
    settings = given.settings(output) | yaml.safe_load(recipe_text(recipe)) | {"max_length": given.work.longest}
    settings |= {"sequence_source": "student", "max_completion_length": given.new, "collapse_patience": 0}
    tokenizer = word_tokenizer(given.work.vocabulary)
    data = [{"input_ids": [*ids, 1], "labels": [-100] * len(ids) + [1]} for ids in given.prompts()]
    return Counted(
        model=student,
        teacher_model=teacher,
        args=SpecKDConfig(**settings),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        teacher_processing_class=tokenizer,
    )


def run_one(name: str, given: Written) -> dict[str, Any]:
    """In a process of its own."""
    seen: list[int] = []
    others: dict[str, Callable[[Written, str, list[int]], Any]] = {GKD: gkd, DISTILLATION: distillation}
    with tempfile.TemporaryDirectory() as output:
        trainer = others[name](given, output, seen) if name in others else ours(given, output, seen, RECIPES[name])
        ends = Ends()
        trainer.add_callback(ends)
        forget_peak()
        loaded = memory("VmRSS")
        trainer.train()
        peak = memory("VmHWM") - loaded
    tokens = sum(seen[WARM_UP * given.micro :])
    shares = [entry["generation_share"] for entry in trainer.state.log_history if "generation_share" in entry]
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / (ends.at[-1] - ends.at[WARM_UP - 1]),
        "tokens_per_cpu_second": tokens / (ends.cpu[-1] - ends.cpu[WARM_UP - 1]),
        "peak_bytes": peak,
        "generation_share": statistics.mean(shares[WARM_UP:]) if shares else None,
    }


def in_its_own_process(name: str, given: Written) -> dict[str, Any]:
    print(f"{given.title}: {name}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = ["--one", name, "--given", json.dumps(asdict(given)), "--report", str(report)]
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(report.read_text())


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    def middle(name: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[name])

    first = next(iter(runs))
    lines = [f"| trainer | tokens/s | lowest, highest | × {first} | × by CPU time | peak above the models, MiB | writing |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, own in runs.items():
        speeds, share = [run["tokens_per_second"] for run in own], own[0]["generation_share"]
        cells = [name, f"{middle(name, 'tokens_per_second'):,.0f}", f"{min(speeds):,.0f}, {max(speeds):,.0f}"]
        cells += [f"{middle(name, key) / middle(first, key):.2f}" for key in ("tokens_per_second", "tokens_per_cpu_second")]
        cells += [f"{middle(name, 'peak_bytes') / 2**20:,.0f}", "not measured" if share is None else f"{share:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--steps", type=int, default=5, help=f"of each run, the first {WARM_UP} to warm up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="rows a step")
    parser.add_argument("--new", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--student", type=shape, default=(256, 4), help="width x layers, such as 256x4")
    parser.add_argument("--teacher", type=shape, default=(512, 8))
    for inner in ("--one", "--given", "--report"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        values = json.loads(args.given)
        given = Written(**values | {"work": Work(**values["work"])})
        Path(args.report).write_text(json.dumps(run_one(args.one, given)))
        return
    work = Work(
        "", args.vocabulary, args.batch, prompt=48, completion=8, longest=256, steps=args.steps, acceptance=0.6,
        student=args.student, teacher=args.teacher,
    )  # fmt: skip
    whole = Written(f"{args.batch} rows of {args.new} tokens, one batch, vocabulary {args.vocabulary:,}", work, 1, args.new)
    found = []
    for given in (whole, replace(whole, title=whole.title.replace("one batch", "4 micro-batches"), micro=4)):
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (GKD, DISTILLATION, UNGATED, GATED)}
        for _ in range(args.repeats):
            for name, own in runs.items():
                own.append(in_its_own_process(name, given))
        print(f"\n{given.title}\n\n{table(runs)}\n", flush=True)
        found.append({"given": asdict(given), "runs": runs, "table": table(runs)})
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "speckd")}
    facts = {"hardware": hardware(), "date": date.today().isoformat(), "threads": torch.get_num_threads(), "versions": packages}
    file = RESULTS / f"{facts['hardware']}-{facts['date']}-on-policy.json"
    file.write_text(json.dumps(facts | {"repeats": args.repeats, "tables": found}, indent=1) + "\n")
    print(f"{facts['hardware']}, {facts['threads']} threads, {packages}: every number is in {file}.")


if __name__ == "__main__":
    main()
