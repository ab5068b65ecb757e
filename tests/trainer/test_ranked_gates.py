"""Gates that rank a batch, through `speckd train`: processes rank together, and a reference model is loaded or missed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from speckd.arguments import SpecKDConfig
from speckd.errors import ConfigError, VocabularyError
from speckd.trainer import SpecKDTrainer
from tests.tiny import common_flags, log_of, run_cli, task_rows, write_model, write_rows
from tests.trainer.conftest import World
from tests.trainer.test_invariance import require_same, require_same_weights

ROOT = Path(__file__).parents[2]
#: gate, its options: one number a token; two of them; against a reference; a control.
RANKED = {
    "student_entropy": {"per_sequence": False},
    "tip": {},
    "excess_divergence": {},
    "matched_random": {"gate": "excess_label_loss"},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("reference") / "model", seed=5, hidden=24)


def gate_flags(gate: str, reference: Path) -> list[str]:
    options = RANKED.get(gate, {})
    flags = ["--gate", gate, "--gate_options", json.dumps(options), "--rejected", "mask", "--normalizer", "weight"]
    return [*flags, *(["--reference_model_name_or_path", str(reference)] if "excess" in f"{gate}{options}" else [])]


@pytest.mark.parametrize("gate", ["tip", "matched_random", "trust"])
def test_two_processes_rank_the_batch_of_both(world: World, reference: Path, tmp_path: Path, gate: str) -> None:
    """Held-out rows are odd in number, so that one process's last batch is empty."""
    held_out = write_rows(tmp_path / "held_out.jsonl", task_rows(11, seed=3))
    more = [*gate_flags(gate, reference), "--eval_dataset", str(held_out), "--max_steps", "4"]
    batches = ["--per_device_eval_batch_size", "5", "--per_device_train_batch_size"]
    flags = [*common_flags(world.student, world.teacher, world.data, tmp_path / "one"), *more]
    assert run_cli([*flags, "--per_device_eval_batch_size", "10", "--per_device_train_batch_size", "8"]) == 0
    flags = [*common_flags(world.student, world.teacher, world.data, tmp_path / "two"), *more, *batches, "4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "speckd", "train"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=240, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]
    require_same(log_of(tmp_path / "two"), log_of(tmp_path / "one"), 1e-5)
    require_same_weights(tmp_path / "two", tmp_path / "one", 1e-6)
    found, wanted = (json.loads((tmp_path / name / "results.json").read_text())["end"] for name in ("two", "one"))
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in wanted.items()}


@pytest.mark.parametrize("gate", RANKED)
def test_the_fraction_is_what_is_accepted(world: World, reference: Path, tmp_path: Path, gate: str) -> None:
    flags = [*common_flags(world.student, world.teacher, world.data, tmp_path / "out"), *gate_flags(gate, reference)]
    assert run_cli([*flags, "--max_steps", "2"]) == 0
    rate = log_of(tmp_path / "out")[0]["tar_micro"]
    wanted, slack = {"student_entropy": (0.2, 0.02), "tip": (0.5, 0.02), "excess_divergence": (0.4, 0.02)}.get(gate, (0.6, 0.2))
    assert rate == pytest.approx(wanted, abs=slack)


def test_a_missing_or_idle_reference_is_refused_in_a_line(world: World, reference: Path, tmp_path: Path, capsys) -> None:
    flags = common_flags(world.student, world.teacher, world.data, tmp_path / "out")
    assert run_cli([*flags, "--gate", "excess_divergence"]) == 2
    said = capsys.readouterr().err
    assert "reference_model_name_or_path is not set: excess_divergence compares the student with a third model" in said
    assert run_cli([*flags, "--gate", "tip", "--reference_model_name_or_path", str(reference)]) == 2
    assert "is set, but the gate compares with no third model" in capsys.readouterr().err
    assert run_cli([*flags, "--gate", "excess_divergence", "--reference_model_name_or_path", str(tmp_path / "no")]) == 2
    assert "reference_model_name_or_path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reference_model_may_be_given_and_must_know_the_tokens(world: World, reference: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    student, teacher, third = (AutoModelForCausalLM.from_pretrained(p) for p in (world.student, world.teacher, reference))
    args = SpecKDConfig(output_dir=str(tmp_path), gate="excess_divergence", use_cpu=True, save_strategy="no")
    given = {
        "model": student,
        "teacher_model": teacher,
        "args": args,
        "train_dataset": load_dataset("json", data_files=str(world.data), split="train"),
        "processing_class": AutoTokenizer.from_pretrained(world.student),
    }
    trainer = SpecKDTrainer(**given, reference_model=third)
    assert trainer.reference is not None and trainer.reference.model is third
    assert not third.training and not any(p.requires_grad for p in third.parameters())
    with pytest.raises(ConfigError, match="reference model, and none is given"):
        SpecKDTrainer(**given)
    third.resize_token_embeddings(20)
    with pytest.raises(VocabularyError, match=r"it lacks \d+ of the \d+ tokens in use, first id 20"):
        SpecKDTrainer(**given, reference_model=third)
