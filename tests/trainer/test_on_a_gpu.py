"""On a GPU: what a CPU says, also where the teacher is elsewhere, partly elsewhere, rounded, or kept on a disk."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from speckd.cli import main
from speckd.teachers.store import Store
from tests.tiny import common_flags, log_of, run_cli, task_rows, write_model, write_rows
from tests.trainer.conftest import World
from tests.trainer.test_invariance import require_same

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: training on one, and a teacher beside or off it, were NOT tested"
)
STEPS = ["--max_steps", "3"]
CUTS = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]


def on_gpu(world: World, output: Path, *more: str, precision: str = "float32") -> list[str]:
    flags = common_flags(world.student, world.teacher, world.data, output)
    flags[flags.index("--use_cpu") + 1] = "false"
    return [*flags, *STEPS, "--bf16", str(precision == "bfloat16").lower(), *more]


def trained(flags: list[str], output: Path) -> list[dict[str, float]]:
    assert run_cli(flags) == 0
    return log_of(output)


METHODS = {
    "label-ratio": ["--recipe", "label-ratio"],
    "top-k": "--gate top_k --rejected mask".split(),
    "spec": "--recipe paper-v2-spec".split(),
    "ungated JSD": "--gate none --rejected mask --divergence generalized_jsd".split(),
    "residual": "--gate top_k --rejected residual --divergence reverse_kl".split(),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_curve_of_a_cpu(world: World, tmp_path: Path, method: str) -> None:
    found = trained(on_gpu(world, tmp_path / "gpu", *CUTS, *METHODS[method]), tmp_path / "gpu")
    flags = [*common_flags(world.student, world.teacher, world.data, tmp_path / "cpu"), *STEPS, *CUTS, *METHODS[method]]
    require_same(found, trained(flags, tmp_path / "cpu"), 2e-4)


def test_in_bfloat16(world: World, tmp_path: Path) -> None:
    found = trained(on_gpu(world, tmp_path / "low", precision="bfloat16"), tmp_path / "low")
    wanted = trained(on_gpu(world, tmp_path / "full"), tmp_path / "full")
    assert found[0]["loss"] == pytest.approx(wanted[0]["loss"], rel=3e-2)


@pytest.mark.parametrize(
    "where",
    [
        ["--teacher_device", "cpu"],
        ["--teacher_model_init_kwargs", json.dumps({"device_map": {"": "cpu"}})],
        ["--early_rejection", "false"],
        ["--share_teacher_prompt", "false"],
        ["--loss_chunk_size", "5"],
    ],
    ids=["teacher on the CPU", "placed on the CPU", "no early rejection", "prompts apart", "small chunks"],
)
def test_where_the_teacher_computes_does_not_matter(world: World, tmp_path: Path, where: list[str]) -> None:
    found = trained(on_gpu(world, tmp_path / "found", *METHODS["top-k"], *where), tmp_path / "found")
    require_same(found, trained(on_gpu(world, tmp_path / "wanted", *METHODS["top-k"]), tmp_path / "wanted"), 1e-4)


def test_layers_that_wait_in_memory_or_on_a_disk(world: World, tmp_path: Path) -> None:
    head = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    options = {
        "device_map": {**head, "model.layers.0": "cpu", "model.layers.1": "disk"},
        "offload_folder": str(tmp_path / "offload"),
    }
    flags = on_gpu(world, tmp_path / "found", "--teacher_model_init_kwargs", json.dumps(options))
    require_same(trained(flags, tmp_path / "found"), trained(on_gpu(world, tmp_path / "wanted"), tmp_path / "wanted"), 1e-4)


def test_its_own_base(world: World, tmp_path: Path) -> None:
    lora = "--use_peft true --lora_r 4 --lora_target_modules q_proj v_proj --label_loss_weight 0.5".split()
    own = World(world.student, shutil.copytree(world.student, tmp_path / "copy"), world.data, world.place)
    wanted = trained(on_gpu(own, tmp_path / "wanted", *lora), tmp_path / "wanted")
    flags = on_gpu(own, tmp_path / "found", *lora, "--teacher", "base")
    at = flags.index("--teacher_model_name_or_path")
    require_same(trained(flags[:at] + flags[at + 2 :], tmp_path / "found"), wanted, 1e-4)


def test_a_cache_is_the_same_wherever_it_is_made(world: World, tmp_path: Path) -> None:
    whole = ["--teacher_cache_kind", "full", "--teacher_cache_bits", "32"]
    kept = {name: ["--teacher_cache_dir", str(tmp_path / name)] for name in ("gpu", "cpu")}
    assert main(["cache", *on_gpu(world, tmp_path / "unused", *whole, *kept["gpu"])]) == 0
    flags = common_flags(world.student, world.teacher, world.data, tmp_path / "unused")
    assert main(["cache", *flags, *STEPS, *whole, *kept["cpu"]]) == 0
    stores = [Store.open(tmp_path / name) for name in kept]
    from speckd.tasks import build_tokenizer

    tokenizer, compared = build_tokenizer(), 0
    for row in task_rows(24):
        ids = torch.tensor([*tokenizer.encode(row["prompt"] + row["completion"]), 1])
        if ids in stores[0]:
            found, wanted = (store.answer(ids) for store in stores)
            assert torch.allclose(found.log_probs, wanted.log_probs, atol=1e-4)
            compared += 1
    assert compared > 3
    use = ["--teacher", "cache", *kept["gpu"]]
    found = trained(on_gpu(world, tmp_path / "found", *METHODS["top-k"], *use), tmp_path / "found")
    require_same(found, trained(on_gpu(world, tmp_path / "wanted", *METHODS["top-k"]), tmp_path / "wanted"), 1e-4)


def test_it_goes_on_from_a_checkpoint(world: World, tmp_path: Path) -> None:
    longer = ["--max_steps", "6", *METHODS["spec"], "--save_strategy", "steps", "--save_steps", "3"]
    wanted = trained(on_gpu(world, tmp_path / "out", *longer), tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    found = trained(
        on_gpu(world, tmp_path / "again", *longer, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-3")),
        tmp_path / "again",
    )
    require_same(found[-3:], wanted[-3:], 1e-6)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.allclose(value, again[name], atol=1e-6) for name, value in weights.items())


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: NOT tested")
@pytest.mark.parametrize(
    ("options", "apart"),
    [({"load_in_8bit": True}, 5e-2), ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, 0.3)],
    ids=["8 bits", "4 bits"],
)
def test_a_quantised_teacher(world: World, tmp_path: Path, options: dict, apart: float) -> None:
    own = World(world.student, write_model(tmp_path / "wide", 4, hidden=64, layers=2, width=256), world.data, world.place)
    wanted = trained(on_gpu(own, tmp_path / "wanted"), tmp_path / "wanted")
    found = trained(on_gpu(own, tmp_path / "found", "--teacher_model_init_kwargs", json.dumps(options)), tmp_path / "found")
    assert found[0]["loss"] != wanted[0]["loss"]
    assert found[0]["loss"] == pytest.approx(wanted[0]["loss"], rel=apart)


def test_doctor(world: World, tmp_path: Path, capsys) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", task_rows(60))
    own = World(world.student, world.teacher, rows, world.place)
    assert main(["doctor", *on_gpu(own, tmp_path / "out")]) in (0, 2)
    assert "TAR" in capsys.readouterr().out
