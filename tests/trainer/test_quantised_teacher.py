"""A teacher in 4 or 8 bits: loaded where it stays, read as any other. With bitsandbytes where it is, on a CPU, too."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from speckd.arguments import SpecKDConfig
from speckd.errors import CapabilityError, ConfigError
from speckd.tasks import build_tokenizer
from speckd.trainer import SpecKDTrainer, teacher_options
from tests.tiny import common_flags, log_of, run_cli, write_model
from tests.trainer.conftest import World

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: a quantised teacher was NOT tested (pip install bitsandbytes)",
)
FOUR_BITS = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}


@pytest.fixture(scope="module")
def wide(world: World) -> Path:
    """A teacher whose rows are a whole number of bitsandbytes' blocks."""
    return write_model(world.place / "wide", seed=4, hidden=64, layers=2, width=256)


def train(world: World, teacher: Path, output: Path, options: dict[str, Any], *more: str) -> list[dict[str, float]]:
    flags = [*common_flags(world.student, teacher, world.data, output), "--max_steps", "3"]
    flags += ["--share_teacher_prompt", "false", *more]
    assert run_cli([*flags, "--teacher_model_init_kwargs", json.dumps(options)]) == 0
    return log_of(output)


@needs_bitsandbytes
def test_in_4_bits_it_says_what_its_own_rounded_weights_say(world: World, wide: Path, tmp_path: Path, capsys) -> None:
    from bitsandbytes.functional import dequantize_4bit

    coarse = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32, **FOUR_BITS)
    weights = {
        name: dequantize_4bit(p.data, p.quant_state).float()
        for name, p in coarse.named_parameters()
        if hasattr(p, "quant_state")
    }
    assert len(weights) == 14
    plain = AutoModelForCausalLM.from_pretrained(wide)
    plain.load_state_dict(weights, strict=False)
    plain.save_pretrained(tmp_path / "rounded")
    build_tokenizer().save_pretrained(tmp_path / "rounded")
    found = train(world, wide, tmp_path / "found", FOUR_BITS)
    said = capsys.readouterr().err
    assert "Memory: not foreseen" in said and "is quantised" in said and "torch.float32, quantised, on cpu" in said
    rounded, full = train(world, tmp_path / "rounded", tmp_path / "b", {}), train(world, wide, tmp_path / "c", {})

    def apart(other: list[dict[str, float]]) -> float:
        return sum(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(found, other, strict=True)) / len(found)

    assert apart(rounded) < 3e-3 and 4 * apart(rounded) < apart(full)  # on CPUs, bitsandbytes multiplies in bfloat16


@needs_bitsandbytes
def test_in_8_bits_it_is_near_the_teacher(world: World, wide: Path, tmp_path: Path) -> None:
    found, full = train(world, wide, tmp_path / "8", {"load_in_8bit": True}), train(world, wide, tmp_path / "full", {})
    for a, b in zip(found, full, strict=True):
        assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=5e-2)


@needs_bitsandbytes
def test_a_quantised_head_is_refused(world: World, wide: Path, tmp_path: Path, capsys) -> None:
    untied = AutoModelForCausalLM.from_pretrained(wide, tie_word_embeddings=False)
    untied.save_pretrained(tmp_path / "untied")
    build_tokenizer().save_pretrained(tmp_path / "untied")
    options = json.dumps({"quantization_config": {"load_in_8bit": True, "llm_int8_skip_modules": ["embed_tokens"]}})
    flags = common_flags(world.student, tmp_path / "untied", world.data, tmp_path / "out")
    assert run_cli([*flags, "--teacher_model_init_kwargs", options]) == 2
    assert "the teacher's head is quantised" in capsys.readouterr().err


# ---- without bitsandbytes --------------------------------------------------------------------------------------------------


def arguments(output: Path, **more: Any) -> SpecKDConfig:
    return SpecKDConfig(output_dir=str(output), use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True, **more)


@pytest.mark.parametrize("given", [FOUR_BITS, {"load_in_8bit": True}], ids=["config", "shortcut"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_it_is_put_on_its_device_while_it_is_loaded(tmp_path: Path, given: dict[str, Any], device: str | None) -> None:
    options = teacher_options(arguments(tmp_path, teacher_model_init_kwargs=given, teacher_device=device), torch.float32)
    assert options["quantization_config"] == given.get("quantization_config", {"load_in_8bit": True})
    assert options["device_map"] == {"": "cpu"} and "load_in_8bit" not in options
    placed = {**given, "device_map": {"": "meta"}}
    assert teacher_options(arguments(tmp_path, teacher_model_init_kwargs=placed), torch.float32)["device_map"] == {"": "meta"}


def test_two_ways_of_quantising_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="load_in_8bit and quantization_config both quantise the teacher"):
        assert arguments(tmp_path, teacher_model_init_kwargs={**FOUR_BITS, "load_in_8bit": True}).teacher_quantization


def test_it_is_never_moved(world: World, tmp_path: Path, monkeypatch) -> None:
    """Quantised weights may not be: bitsandbytes raises an error, or does worse."""
    teacher = AutoModelForCausalLM.from_pretrained(world.teacher)
    teacher.is_quantized = True
    monkeypatch.setattr(teacher, "to", lambda *_: pytest.fail("it was moved"))
    tokenizer, rows = build_tokenizer(), Dataset.from_json(str(world.data))
    trainer = SpecKDTrainer(
        str(world.student), teacher, arguments(tmp_path), rows, None, tokenizer, teacher_processing_class=tokenizer
    )
    assert trainer.train().training_loss > 0


def test_a_head_of_integers_is_refused(world: World, tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(world.teacher)
    teacher.lm_head.weight = torch.nn.Parameter(teacher.lm_head.weight.detach().to(torch.int8), requires_grad=False)
    tokenizer, rows = build_tokenizer(), Dataset.from_json(str(world.data))
    with pytest.raises(CapabilityError, match="llm_int8_skip_modules"):
        SpecKDTrainer(str(world.student), teacher, arguments(tmp_path), rows, None, tokenizer, tokenizer)


def absent(monkeypatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))


def refused(flags: list[str], output: Path, capsys) -> str:
    assert run_cli(flags) == 2 and not output.exists()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize("given", [FOUR_BITS, {"load_in_8bit": True}], ids=["config", "shortcut"])
def test_without_bitsandbytes_it_is_one_line(world: World, tmp_path: Path, capsys, monkeypatch, given: dict[str, Any]) -> None:
    absent(monkeypatch, "bitsandbytes")
    flags = common_flags(world.student, world.teacher, world.data, tmp_path / "out")
    said = refused([*flags, "--teacher_model_init_kwargs", json.dumps(given)], tmp_path / "out", capsys)
    assert "needs bitsandbytes, which is not installed" in said and "pip install bitsandbytes" in said


def test_without_deepspeed_zero3_is_one_line(world: World, tmp_path: Path, capsys, monkeypatch) -> None:
    absent(monkeypatch, "deepspeed")
    monkeypatch.setattr(SpecKDConfig, "world_size", 2)
    flags = common_flags(world.student, world.teacher, world.data, tmp_path / "out")
    said = refused([*flags, "--teacher_sharding", "zero3"], tmp_path / "out", capsys)
    assert "zero3 needs DeepSpeed, which is not installed" in said and "pip install deepspeed" in said
