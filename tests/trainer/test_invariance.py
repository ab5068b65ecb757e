"""The same run through the real command line must not change with how its batches are cut, packed or distributed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import common_flags, log_of, run_cli, write_model, write_rows
from tests.trainer.conftest import World

STEPS = 4
METHODS = {
    "label-ratio": [],
    "paper-v2-spec": ["--recipe", "paper-v2-spec"],
    "top-k, mask, weight": ["--recipe", "paper-v1", "--normalizer", "weight"],
    "inverted, residual": "--gate inverted --rejected residual --divergence generalized_jsd --label_loss_weight 0.2".split()
    + ["--gate_options", '{"gate": "top_k", "verify_top_k": 9}'],
}


def train(
    world: World, output: Path, *more: str, data: Path | None = None, student: Path | None = None
) -> list[dict[str, float]]:
    flags = common_flags(student or world.student, world.teacher, data or world.data, output)
    assert run_cli([*flags, "--max_steps", str(STEPS), *more]) == 0
    return log_of(output)


def require_same(found: list[dict[str, float]], wanted: list[dict[str, float]], tolerance: float = 1e-5) -> None:
    assert len(found) == len(wanted) > 0
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        for name in ("loss", "grad_norm", "tar_micro"):
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=1e-7), (step, name)


def require_same_weights(a: Path, b: Path, tolerance: float = 1e-5) -> None:
    left, right = (load_file(folder / "model.safetensors") for folder in (a, b))
    for name, value in left.items():
        assert torch.allclose(value, right[name], rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("method", METHODS)
def test_batch_split_and_chunks_change_nothing(world: World, tmp_path: Path, method: str) -> None:
    cuts = {"8x1": "8 1", "4x2": "4 2", "2x4": "2 4"}
    logs = {}
    for name, cut in cuts.items():
        size, accumulation = cut.split()
        split = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulation]
        logs[name] = train(world, tmp_path / name, *METHODS[method], *split)
    logs["chunks"] = train(world, tmp_path / "chunks", *METHODS[method], "--loss_chunk_size", "3")
    for name in ("4x2", "2x4", "chunks"):
        require_same(logs[name], logs["8x1"])
        require_same_weights(tmp_path / name, tmp_path / "8x1")


def test_a_mean_of_means_would_be_seen(world: World, tmp_path: Path) -> None:
    """Negative control: the micro-batches are uneven enough that averaging per micro-batch is another loss."""
    fine = train(world, tmp_path / "a", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1")
    whole = train(world, tmp_path / "b", "--per_device_train_batch_size", "8")
    mean_of_means = sum(step["loss"] for step in fine[:1])
    assert abs(mean_of_means - whole[0]["loss"]) > 1e-2


@pytest.mark.parametrize("method", ["label-ratio", "paper-v2-spec"])
def test_padding_free_and_packed_are_the_padded_run(world: World, tmp_path: Path, method: str) -> None:
    """Packing changes which samples share a step, so here every step holds the whole data set: eight rows."""
    rows = [json.loads(line) for line in world.data.read_text().splitlines()][:8]
    data = write_rows(tmp_path / "eight.jsonl", rows)
    padded = train(world, tmp_path / "padded", *METHODS[method], "--per_device_train_batch_size", "8", data=data)
    free = ["--padding_free", "true", "--max_length", "null", "--per_device_train_batch_size", "8"]
    require_same(train(world, tmp_path / "free", *METHODS[method], *free, data=data), padded)
    packed = ["--packing", "true", "--max_length", "512", "--per_device_train_batch_size", "1"]
    require_same(train(world, tmp_path / "packed", *METHODS[method], *packed, data=data), padded)
    require_same_weights(tmp_path / "packed", tmp_path / "padded")


@pytest.mark.parametrize(("method", "rows"), [("label-ratio", 24), ("top-k, mask, weight", 22), ("paper-v2-spec", 17)], ids=str)
def test_two_processes_are_one(world: World, tmp_path: Path, method: str, rows: int) -> None:
    """Also where the rows do not divide: the samples that fill up an epoch's last batch are not learnt twice."""
    data = write_rows(tmp_path / "rows.jsonl", [json.loads(line) for line in world.data.read_text().splitlines()][:rows])
    one = train(world, tmp_path / "one", *METHODS[method], "--per_device_train_batch_size", "8", data=data)
    flags = common_flags(world.student, world.teacher, data, tmp_path / "two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "speckd"]
    command += ["train", *flags, *METHODS[method], "--max_steps", str(STEPS), "--per_device_train_batch_size", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-20_000:]
    assert done.stderr.count("Method: ") == 1  # of two processes one speaks
    assert json.loads((tmp_path / "two" / "results.json").read_text())["processes"] == 2
    require_same(log_of(tmp_path / "two"), one)
    require_same_weights(tmp_path / "two", tmp_path / "one")


@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="torch 2.11 cannot load a checkpoint onto the device cpu:0")
def test_two_processes_resume_in_mid_epoch_as_one_run(world: World, tmp_path: Path) -> None:
    """The samples that fill up an epoch's end are known after a resume, too."""
    data = write_rows(tmp_path / "rows.jsonl", [json.loads(line) for line in world.data.read_text().splitlines()][:10])

    def run(output: Path, *more: str) -> list[dict[str, float]]:
        flags = [f for f in common_flags(world.student, world.teacher, data, output) if f not in ("--save_strategy", "no")]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "speckd"]
        command += ["train", *flags, "--per_device_train_batch_size", "2", "--max_steps", "6", "--save_steps", "2", *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-20_000:]
        return log_of(output)

    whole = run(tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    require_same(run(tmp_path / "run", "--resume_from_checkpoint", "true"), whole, 1e-6)


def test_the_plain_loop_gives_the_same_numbers(world: World, tmp_path: Path) -> None:
    trained = train(world, tmp_path / "cli", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3")
    loop = Path(__file__).parents[2] / "examples" / "plain_loop.py"
    command = f"{loop} --model_name_or_path {world.student} --teacher_model_name_or_path {world.teacher} --max_steps {STEPS}"
    command += (
        f" --dataset_name {world.data} --per_device_train_batch_size 8 --learning_rate 1e-3 --output_dir {tmp_path / 'loop'}"
    )
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, timeout=240, check=True)
    looped = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for ours, theirs in zip(trained, looped, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["tar"] == pytest.approx(theirs["tar"], rel=1e-6)
    require_same_weights(tmp_path / "loop", tmp_path / "cli", 1e-6)
    assert len(loop.read_text().splitlines()) <= 150 and "trl" not in loop.read_text()


def test_a_resumed_run_is_the_uninterrupted_one(world: World, tmp_path: Path) -> None:
    """With a stochastic gate and dropout on: the log and the weights are the same bits."""
    student = write_model(tmp_path / "student", seed=1, dropout=0.2)
    flags = ["--recipe", "paper-v2-spec", "--per_device_train_batch_size", "4", "--num_train_epochs", "2"]
    flags += ["--train_sampling_strategy", "random"]

    def run(output: Path, *more: str) -> None:
        own = [f for f in common_flags(student, world.teacher, world.data, output) if f not in ("--save_strategy", "no")]
        assert run_cli([*own, *flags, "--save_strategy", "steps", "--save_steps", "5", *more]) == 0

    run(tmp_path / "whole")
    run(tmp_path / "cut")
    for gone in ("checkpoint-10", "checkpoint-12"):  # as if killed between the first and the second checkpoint
        for file in sorted((tmp_path / "cut" / gone).glob("*")):
            file.unlink()
        (tmp_path / "cut" / gone).rmdir()
    (tmp_path / "cut" / "model.safetensors").unlink()
    run(tmp_path / "cut", "--resume_from_checkpoint", "true")
    whole, resumed = log_of(tmp_path / "whole"), log_of(tmp_path / "cut")
    assert [(e["step"], e["loss"], e["tar"], e["grad_norm"]) for e in whole] == [
        (e["step"], e["loss"], e["tar"], e["grad_norm"]) for e in resumed
    ]
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize(
    "adapter", [[], ["--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj"]], ids=["full", "lora"]
)
def test_a_run_killed_after_its_last_step_ends_as_if_it_had_not_been(world: World, tmp_path: Path, adapter: list[str]) -> None:
    flags = [f for f in common_flags(world.student, world.teacher, world.data, tmp_path) if f not in ("--save_strategy", "no")]
    flags += ["--max_steps", "2", "--save_steps", "2", "--eval_dataset", str(world.data), *adapter]
    assert run_cli(flags) == 0
    weights = next(tmp_path.glob("*model.safetensors"))
    content, results = weights.read_bytes(), json.loads((tmp_path / "results.json").read_text())
    weights.unlink()
    (tmp_path / "results.json").unlink()
    assert run_cli([*flags, "--resume_from_checkpoint", "true"]) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert weights.read_bytes() == content and again["steps"] == 2
    for name, value in results["end"].items():
        assert again["end"][name] == pytest.approx(value, rel=1e-6), name
