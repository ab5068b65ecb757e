"""The LoRA student's own base as its teacher: the losses of a separate copy, no second copy, and nothing left switched."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from speckd.arguments import SpecKDConfig
from speckd.dry_run import step_facts
from speckd.errors import CapabilityError
from speckd.head import LMHead
from speckd.memory_report import _run_shape
from speckd.run import adapter_of
from speckd.settings import load_settings
from speckd.tasks import build_tokenizer
from speckd.teachers.base import without_adapter
from speckd.trainer import SpecKDTrainer
from tests.tiny import common_flags, log_of, run_cli, task_rows, write_model
from tests.trainer.conftest import World
from tests.trainer.test_invariance import require_same

LORA = "--use_peft true --lora_r 4 --lora_target_modules q_proj v_proj --max_steps 4 --label_loss_weight 0.5".split()
UNGATED = "--gate none --rejected mask".split()


@pytest.fixture(scope="module")
def dropping(world: World) -> Path:
    """A student with dropout of its own, and a head that is padded."""
    return write_model(world.place / "dropping", seed=1, dropout=0.3, width=256)


def with_base(student: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [*common_flags(student, None, data, output), "--teacher", "base", *LORA, *more]


def with_copy(student: Path, data: Path, output: Path, *more: str) -> list[str]:
    """The same with the base once more, from another folder."""
    copy = student.parent / f"{student.name}-copy"
    shutil.copytree(student, copy, dirs_exist_ok=True)
    return [*common_flags(student, copy, data, output), *LORA, *more]


def require_same_adapter(a: Path, b: Path) -> None:
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    assert all(torch.allclose(value, right[name], rtol=1e-5, atol=1e-6) for name, value in left.items())


@pytest.mark.parametrize(
    "more",
    [[], UNGATED, ["--gradient_checkpointing", "true"], ["--packing", "true", "--max_length", "128"]],
    ids=["label-ratio", "ungated", "checkpointing", "packed"],
)
def test_it_says_what_a_copy_of_the_base_says(dropping: Path, world: World, tmp_path: Path, more: list[str]) -> None:
    held_out = ["--eval_dataset", str(world.data), "--lora_dropout", "0.2", *more]
    assert run_cli(with_base(dropping, world.data, tmp_path / "base", *held_out)) == 0
    assert run_cli(with_copy(dropping, world.data, tmp_path / "copy", *held_out)) == 0
    require_same(log_of(tmp_path / "base"), log_of(tmp_path / "copy"), 1e-6)
    require_same_adapter(tmp_path / "base", tmp_path / "copy")
    found, wanted = (json.loads((tmp_path / name / "results.json").read_text())["end"] for name in ("base", "copy"))
    assert found == {name: pytest.approx(value, rel=1e-6) for name, value in wanted.items()}
    assert found["kl"] > 1e-6  # the student has left its base


@pytest.mark.parametrize("more", [[], ["--bf16", "true"]], ids=["float32", "bf16"])
def test_lora_begins_as_its_base(world: World, tmp_path: Path, more: list[str]) -> None:
    assert run_cli(with_base(world.student, world.data, tmp_path / "out", *UNGATED, *more)) == 0
    first, last = log_of(tmp_path / "out")[0], log_of(tmp_path / "out")[-1]
    assert abs(first["divergence"]) < 1e-7 and last["divergence"] > 1e-6 and first["tar"] == 1


def test_two_processes_are_one(world: World, tmp_path: Path) -> None:
    """Switching the adapter off and on lies outside DDP's forward, and leaves its hooks where they were."""
    own = [world.student, world.data]
    assert run_cli(with_base(*own, tmp_path / "one", "--lora_dropout", "0", "--per_device_train_batch_size", "8")) == 0
    flags = with_base(*own, tmp_path / "two", "--lora_dropout", "0", "--per_device_train_batch_size", "4")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "speckd", "train"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-20_000:]
    require_same(log_of(tmp_path / "two"), log_of(tmp_path / "one"))
    require_same_adapter(tmp_path / "two", tmp_path / "one")


def adapted(folder: Path, **more: Any) -> Any:
    config = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, task_type="CAUSAL_LM", **more)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


def test_modes_and_gradients_come_back_as_they_were(dropping: Path) -> None:
    student = adapted(dropping, modules_to_save=["lm_head"]).train()
    odd = student.get_base_model().get_decoder().layers[0].mlp.eval()  # somebody's own choice
    frozen = next(p for name, p in student.named_parameters() if "lora_A" in name).requires_grad_(False)
    modes = {name: module.training for name, module in student.named_modules()}
    learning = {name: p.requires_grad for name, p in student.named_parameters()}
    with without_adapter(student):
        assert not any(module.training for module in student.modules())
    assert modes == {name: module.training for name, module in student.named_modules()} and not odd.training
    assert learning == {name: p.requires_grad for name, p in student.named_parameters()} and not frozen.requires_grad
    ids = torch.arange(20, 60)[None]
    assert not torch.equal(*(student(input_ids=ids).logits for _ in range(2)))  # its dropout is on


def test_the_heads_of_base_and_student_are_told_apart(dropping: Path) -> None:
    student = adapted(dropping, modules_to_save=["lm_head"])
    with torch.no_grad():
        student.get_base_model().get_output_embeddings().modules_to_save["default"].weight.add_(1)
    base = AutoModelForCausalLM.from_pretrained(dropping).get_output_embeddings().weight
    with without_adapter(student):
        assert torch.equal(LMHead.from_model(student.get_base_model()).weight, base)
    assert torch.equal(LMHead.from_model(student.get_base_model()).weight, base + 1)


def trainer_of(world: World, model: Any, output: Path) -> SpecKDTrainer:
    args = SpecKDConfig(output_dir=str(output), use_cpu=True, max_steps=1, save_strategy="no", teacher="base")
    tokenizer = build_tokenizer()
    return SpecKDTrainer(model, None, args, Dataset.from_list(task_rows(8)), processing_class=tokenizer)


def test_the_teachers_weights_are_the_students(world: World, tmp_path: Path, caplog) -> None:
    trainer = trainer_of(world, adapted(world.student), tmp_path / "out")
    head = trainer.source._base.head  # type: ignore[union-attr]
    assert head.weight.data_ptr() == trainer.student.get_output_embeddings().weight.data_ptr()
    assert "the student starts as its teacher" in caplog.text  # no label loss
    trainer.train()
    assert trainer.student.training


@pytest.mark.parametrize(("bias", "said"), [(None, "has no adapter to switch off"), ("lora_only", "own biases")])
def test_students_without_a_base_to_go_back_to_are_refused(world: World, tmp_path: Path, bias: str | None, said: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.student) if bias is None else adapted(world.student, bias=bias)
    with pytest.raises(CapabilityError, match=said):
        trainer_of(world, model, tmp_path / "out")


def test_the_plan_counts_no_second_model(world: World, tmp_path: Path) -> None:
    facts = []
    for flags in (with_base, with_copy):
        settings = load_settings(None, None, flags(world.student, world.data, tmp_path / "out"))
        rows = Dataset.from_list(task_rows(8))
        facts.append(step_facts(_run_shape(settings, adapter_of(settings.model), (rows, rows), build_tokenizer())))
    base, copy = facts
    assert base.teacher == 0 < copy.teacher and base.teacher_forward.kept == copy.teacher_forward.kept > 0
    assert base.evaluation.teacher.peak > 0  # type: ignore[union-attr]
