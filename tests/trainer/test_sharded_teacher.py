"""A teacher cut over two processes: each holds half of its layers, and the student learns what it learns from the whole."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from speckd.dry_run import BatchShape, ModelShape, RunShape, step_facts
from speckd.errors import CapabilityError
from speckd.teachers.sharding import shard
from tests.tiny import common_flags, log_of, run_cli, write_model
from tests.trainer.conftest import World
from tests.trainer.test_invariance import require_same, require_same_weights

SCRIPT = Path(__file__).with_name("sharded_run.py")
without_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: a teacher under ZeRO-3 was NOT tested (pip install deepspeed)",
)


def two_processes(flags: list[str], folder: Path) -> tuple[list[dict[str, Any]], str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT), str(folder)]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=240, check=False, cwd=SCRIPT.parents[2])
    assert done.returncode == 0, done.stderr[-20_000:]
    return [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in (0, 1)], done.stderr


@pytest.mark.parametrize("how", ["fsdp2", pytest.param("zero3", marks=without_deepspeed)])
def test_the_student_learns_what_it_learns_from_the_whole_teacher(world: World, tmp_path: Path, how: str) -> None:
    held_out = ["--eval_dataset", str(world.data), "--max_steps", "4"]
    flags = [*common_flags(world.student, world.teacher, world.data, tmp_path / "one"), *held_out]
    assert run_cli([*flags, "--per_device_train_batch_size", "8"]) == 0
    flags = [*common_flags(world.student, world.teacher, world.data, tmp_path / "two"), *held_out]
    facts, said = two_processes([*flags, "--per_device_train_batch_size", "4", "--teacher_sharding", how], tmp_path)
    for fact in facts:
        assert fact["world"] == 2 and fact["ddp"] == "DistributedDataParallel"
        assert all(fact["dtensors"]) if how == "fsdp2" else fact["visible"] == 0
        assert 2 * fact["local"] == fact["whole"] > 0
        assert fact["head"] == [256, 32] and fact["head_is_embedding"] == (how == "fsdp2")  # tied, and kept whole
        assert not fact["training"] and not fact["learning"] and fact["sharing"] == [False]
    assert said.count("Teacher: cut over 2 processes") == 1 and f"({how})" in said
    size = 28_832 if how == "fsdp2" else 28_832 + 256 * 32  # DeepSpeed cuts the embeddings, so the head is a copy
    assert f"Teacher: {size:,} parameters, torch.float32, on cpu" in said
    require_same(log_of(tmp_path / "two"), log_of(tmp_path / "one"), 1e-5)
    require_same_weights(tmp_path / "two", tmp_path / "one", 1e-6)
    found, wanted = (json.loads((tmp_path / name / "results.json").read_text())["end"] for name in ("two", "one"))
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in wanted.items()}


def test_a_mixture_of_teachers_in_pieces(world: World, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=7, hidden=24)
    both = ["--teachers", json.dumps({"a": str(world.teacher), "b": str(other)}), "--teacher_mixture", '{"a": 2, "b": 1}']
    both += ["--max_steps", "2"]
    flags = [*common_flags(world.student, None, world.data, tmp_path / "one"), *both]
    assert run_cli([*flags, "--per_device_train_batch_size", "8"]) == 0
    flags = [*common_flags(world.student, None, world.data, tmp_path / "two"), *both, "--teacher_sharding", "fsdp2"]
    facts, _ = two_processes([*flags, "--per_device_train_batch_size", "4"], tmp_path)
    assert all(all(fact["dtensors"]) for fact in facts)
    require_same(log_of(tmp_path / "two"), log_of(tmp_path / "one"), 1e-5)
    require_same_weights(tmp_path / "two", tmp_path / "one", 1e-6)


def test_what_was_placed_or_quantised_is_not_cut() -> None:
    model = torch.nn.Linear(2, 2)
    model.hf_device_map = {"": "cpu"}  # type: ignore[assignment]
    with pytest.raises(CapabilityError, match="a quantised teacher, or one with a device_map, is not cut"):
        shard(model, "fsdp2", torch.device("cpu"))


def test_the_plan_counts_a_piece_and_the_head() -> None:
    from transformers import LlamaConfig

    def shape(hidden: int) -> ModelShape:
        config = LlamaConfig(
            vocab_size=100, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
        return ModelShape(config, {"dtype": torch.float32})

    def teacher_bytes(pieces: int) -> int:
        batch = BatchShape(2, 8)
        run = RunShape(shape(16), shape(32), batch, torch.device("cpu"), chunk=16, vocabulary=100, teacher_pieces=pieces)
        return step_facts(run).teacher

    head = 4 * 100 * 32
    assert teacher_bytes(2) - head == (teacher_bytes(1) - head) // 2
