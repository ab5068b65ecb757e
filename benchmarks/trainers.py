"""Whole trainers on the same work: TRL's `GKDTrainer` (off-policy, forward KL) against `SpecKDTrainer`, ungated and gated.

    python benchmarks/trainers.py
    python benchmarks/trainers.py --vocabulary 32000 --steps 4 --repeats 1 --feed-distillation

Same random models, same rows in the same order, same settings; every trainer in a process of its own, one after the other,
over and over; medians. Prints tables and writes them with every number to `benchmarks/results/HARDWARE-DATE-trainers.json`.
Ends with exit code 1 where the ungated loss curve is not GKD's.

What makes it the same work: GKD's `lmbda=0` never lets the student write; its `beta=0` is KL(teacher ‖ student); its loss has
no temperature, whatever `temperature` says; it divides the sum by the supervised tokens of the whole optimizer step, as we
do. It is given TRL's collator for tokenised rows in place of its default one for chats, so that batches are alike. Precision
(float32 on a CPU, bfloat16 compute on a GPU) and the absence of gradient checkpointing are the same for all.

The models are random, but not unrelated: on a share of the vocabulary (`--acceptance`) both predict the same token, on the
rest the student predicts another, so that the Top-5 gate has that share to accept.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from speckd.arguments import SpecKDConfig
from speckd.recipe_book import recipe_text
from speckd.trainer import SpecKDTrainer

RESULTS = Path(__file__).parent / "results"
GKD, FED, UNGATED, MASK, LABEL, PACKED = (
    "TRL GKDTrainer",
    "TRL DistillationTrainer, fed",
    "speckd, ungated",
    "speckd, Top-5, mask",
    "speckd, label ratio, label",
    "speckd, ungated, packed",
)
RECIPES = {UNGATED: "ungated", MASK: "paper-v1", LABEL: "label-ratio", PACKED: "ungated"}
#: Largest relative difference between the ungated loss curves, by the precision of the products.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
WARM_UP = 2
ON_POLICY = (
    "NOT COMPARED AS IT IS: TRL's DistillationTrainer has no off-policy setting (the student writes every completion), so it "
    "cannot do this work. --feed-distillation puts the data's completions in the place of its generation, which TRL does not "
    "support, and runs the rest of it."
)


@dataclass(frozen=True)
class Work:
    """What every trainer of one table is given. Lengths are medians, in tokens."""

    title: str
    vocabulary: int
    batch: int
    prompt: int
    completion: int
    longest: int
    steps: int
    acceptance: float
    student: tuple[int, int]  # width, layers
    teacher: tuple[int, int]
    packed_length: int = 1024
    learning_rate: float = 1e-3


# ---- models and data: the same in every process ----------------------------------------------------------------------------


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def random_model(shape: tuple[int, int], vocabulary: int, seed: int, strange: torch.Tensor) -> LlamaForCausalLM:
    """A Llama that gives about half of its probability to one token: the input itself, or for a strange one its neighbour."""
    width, layers = shape
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight.normal_()
        head = embeddings * (math.log(vocabulary) / width)
        head[strange] = head[strange.roll(1)]
        model.get_output_embeddings().weight.copy_(head)
    return model


def both_models(work: Work) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    tokens = torch.randperm(work.vocabulary, generator=torch.Generator().manual_seed(0))
    strange = tokens[: round((1 - work.acceptance) * work.vocabulary)]
    student = random_model(work.student, work.vocabulary, 1, strange)
    return student, random_model(work.teacher, work.vocabulary, 2, strange[:0])


def rows(work: Work) -> list[dict[str, list[int]]]:
    """One epoch of `steps` batches: prompts and completions of log-normal lengths, uniform tokens."""
    draw = torch.Generator().manual_seed(3)

    def lengths(middle: int, longest: int) -> list[int]:
        drawn = (math.log(middle) + 0.5 * torch.randn(work.batch * work.steps, generator=draw)).exp()
        return drawn.round().clamp(4, longest).long().tolist()

    def tokens(length: int) -> list[int]:
        return torch.randint(3, work.vocabulary, (length,), generator=draw).tolist()

    prompts, completions = lengths(work.prompt, work.longest // 2), lengths(work.completion, work.longest // 2)
    return [{"prompt": tokens(p), "completion": [*tokens(c - 1), 1]} for p, c in zip(prompts, completions, strict=True)]


def with_labels(data: list[dict[str, list[int]]]) -> Dataset:
    return Dataset.from_list(
        [
            {"input_ids": [*row["prompt"], *row["completion"]], "labels": [-100] * len(row["prompt"]) + row["completion"]}
            for row in data
        ]
    )


# ---- trainers --------------------------------------------------------------------------------------------------------------


def common(work: Work, output: str) -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    return {
        "output_dir": output,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": work.batch,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "bf16": gpu,
        "use_cpu": not gpu,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": gpu,
        "seed": 0,
    }


def gkd(work: Work, output: str) -> GKDTrainer:
    student, teacher = both_models(work)
    settings = GKDConfig(**common(work, output), lmbda=0.0, beta=0.0, max_length=work.longest)
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=settings,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
        train_dataset=with_labels(rows(work)),
        processing_class=word_tokenizer(work.vocabulary),
    )


class _Fed(DistillationTrainer):
    """The data's completions where the student would write its own; TRL promises nothing about this method."""

    completions: dict[tuple[int, ...], list[int]]

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, has_tool_images: bool = False
    ) -> list[list[int]]:
        return [self.completions[tuple(ids)] for ids in prompt_ids]


def fed_distillation(work: Work, output: str) -> DistillationTrainer:
    student, teacher = both_models(work)
    settings = DistillationConfig(
        **common(work, output), beta=0.0, shuffle_dataset=False, max_completion_length=work.longest, disable_dropout=True
    )
    data = rows(work)
    trainer = _Fed(
        model=student,
        teacher_model=teacher,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": " ".join(f"w{i}" for i in row["prompt"])} for row in data]),
        processing_class=word_tokenizer(work.vocabulary),
    )
    trainer.completions = {tuple(row["prompt"]): row["completion"] for row in data}
    return trainer


def ours(work: Work, output: str, recipe: str, packed: bool = False) -> SpecKDTrainer:
    student, teacher = both_models(work)
    settings = common(work, output) | yaml.safe_load(recipe_text(recipe)) | {"max_length": work.longest}
    if packed:
        settings |= {"packing": True, "max_length": work.packed_length, "per_device_train_batch_size": 1}
    tokenizer = word_tokenizer(work.vocabulary)
    return SpecKDTrainer(
        model=student,
        teacher_model=teacher,
        args=SpecKDConfig(**settings),
        train_dataset=with_labels(rows(work)),
        processing_class=tokenizer,
        teacher_processing_class=tokenizer,
    )


def build(name: str, work: Work, output: str) -> Any:
    others: dict[str, Callable[[Work, str], Any]] = {GKD: gkd, FED: fed_distillation}
    return others[name](work, output) if name in others else ours(work, output, RECIPES[name], packed=name == PACKED)


# ---- one trainer, in its own process ---------------------------------------------------------------------------------------


class Ends(TrainerCallback):
    """When each step ended, on the device; and the CPU time of the process until then, which a busy machine distorts less."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.cpu: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.at.append(time.perf_counter())
        self.cpu.append(time.process_time())


def memory(what: str) -> int:
    """Bytes, resident (`VmRSS`) or the most that were (`VmHWM`); on a GPU allocated there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if what == "VmHWM" else torch.cuda.memory_allocated()
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def run_one(name: str, work: Work) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as output:
        trainer = build(name, work, output)
        ends = Ends()
        trainer.add_callback(ends)
        forget_peak()
        loaded = memory("VmRSS")
        trainer.train()
        peak = memory("VmHWM") - loaded
    batch = trainer.args.per_device_train_batch_size
    data = trainer.train_dataset if name != FED else with_labels(rows(work))  # it has prompts only
    measured = [len(ids) for ids in data["input_ids"]][WARM_UP * batch :]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens_per_second": sum(measured) / (ends.at[-1] - ends.at[WARM_UP - 1]),
        "tokens_per_cpu_second": sum(measured) / (ends.cpu[-1] - ends.cpu[WARM_UP - 1]),
        "step_seconds": [later - earlier for earlier, later in zip(ends.at, ends.at[1:], strict=False)],
        "peak_bytes": peak,
        "loss": [entry["loss"] for entry in logged],
        "tar": statistics.mean(entry["tar"] for entry in logged) if "tar" in logged[0] else None,
    }


# ---- all of them -----------------------------------------------------------------------------------------------------------


def in_its_own_process(name: str, work: Work) -> dict[str, Any]:
    print(f"{work.title}: {name}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, __file__, "--one", name, "--work", json.dumps(asdict(work)), "--report", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(report.read_text())


def compare(work: Work, names: list[str], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Every trainer's runs, interleaved: what disturbs the machine for a while disturbs all."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            runs[name].append(in_its_own_process(name, work))
    return runs


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| trainer | tokens/s | lowest, highest | × GKD | × GKD by CPU time "
        "| peak above the models, MiB | of GKD's | first, last loss | TAR |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def middle(name: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[name])

    def ratio(name: str, key: str) -> str:
        return f"{middle(name, key) / middle(GKD, key):.2f}"

    for name, own in runs.items():
        speeds, loss, tar = [run["tokens_per_second"] for run in own], own[0]["loss"], own[0]["tar"]
        cells = [name, f"{middle(name, 'tokens_per_second'):,.0f}", f"{min(speeds):,.0f}, {max(speeds):,.0f}"]
        cells += [ratio(name, "tokens_per_second"), ratio(name, "tokens_per_cpu_second")]
        cells += [f"{middle(name, 'peak_bytes') / 2**20:,.0f}", ratio(name, "peak_bytes")]
        cells += [f"{loss[0]:.4f}, {loss[-1]:.4f}", "–" if tar is None else f"{tar:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curve_difference(runs: dict[str, list[dict[str, Any]]], name: str) -> float:
    """Largest relative difference between a trainer's loss curve and GKD's, over the steps of all repeats."""
    pairs = zip(runs[GKD], runs[name], strict=True)
    return max(abs(a - b) / abs(a) for theirs, own in pairs for a, b in zip(theirs["loss"], own["loss"], strict=True))


def hardware() -> str:
    """What the numbers were measured on, as part of a file's name."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        known = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = f"{known[1] if known else 'cpu'} {cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def works(args: argparse.Namespace) -> list[tuple[Work, list[str]]]:
    shared = {"steps": args.steps, "acceptance": args.acceptance, "student": args.student, "teacher": args.teacher}
    fed = [FED] if args.feed_distillation else []
    found = []
    for size in args.vocabulary:
        work = Work(f"vocabulary {size:,}", size, args.batch, prompt=80, completion=120, longest=384, **shared)
        found.append((work, [GKD, *fed, UNGATED, MASK, LABEL]))
    size = min(args.vocabulary)
    batch = 6 * args.batch
    short = Work(f"short answers, vocabulary {size:,}", size, batch, prompt=20, completion=14, longest=128, **shared)
    short = replace(short, packed_length=40 * batch)
    return [*found, (short, [GKD, UNGATED, PACKED])]


def shape(text: str) -> tuple[int, int]:
    width, layers = text.split("x")
    return int(width), int(layers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 152_064])
    parser.add_argument("--steps", type=int, default=6, help=f"of each run, the first {WARM_UP} to warm up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="rows a step; six times as many where answers are short")
    parser.add_argument("--acceptance", type=float, default=0.6)
    parser.add_argument("--student", type=shape, default=(256, 4), help="width x layers, such as 256x4")
    parser.add_argument("--teacher", type=shape, default=(512, 8))
    parser.add_argument("--feed-distillation", action="store_true", help="run TRL's DistillationTrainer on the data as well")
    for inner in ("--one", "--work", "--report"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        Path(args.report).write_text(json.dumps(run_one(args.one, Work(**json.loads(args.work)))))
        return 0
    if args.steps < WARM_UP + 2:  # packed, the same rows may make a step less
        parser.error(f"--steps is {args.steps}, and the first {WARM_UP} do not count: give more")
    return report(args)


def report(args: argparse.Namespace) -> int:
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    found, agreed = [], True
    print(ON_POLICY)
    for work, names in works(args):
        runs = compare(work, names, args.repeats)
        print(f"\n{work.title[0].upper()}{work.title[1:]}\n\n{table(runs)}\n")
        differences = {name: curve_difference(runs, name) for name in (UNGATED, FED) if name in runs}
        for name, difference in differences.items():
            agrees = difference <= TOLERANCE[precision]
            agreed &= agrees
            print(
                f"Loss curve of '{name}': {'the same as' if agrees else 'NOT THE SAME AS'} GKD's; largest relative difference "
                f"{difference:.1e}, tolerance {TOLERANCE[precision]:.0e} ({precision})."
            )
        found.append({"work": asdict(work), "runs": runs, "curve_differences": differences, "table": table(runs)})
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "speckd")}
    facts = {
        "hardware": hardware(),
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": packages,
        "repeats": args.repeats,
        "note": ON_POLICY,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{facts['hardware']}-{facts['date']}-trainers.json"
    file.write_text(json.dumps(facts | {"tables": found}, indent=1) + "\n")
    print(f"\n{facts['hardware']}, {facts['threads']} threads, {packages}: every number is in {file}.")
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
