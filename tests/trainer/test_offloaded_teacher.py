"""A teacher partly on a disk: its layers come when they compute, and it says what it says in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from speckd.arguments import SpecKDConfig
from speckd.tasks import build_tokenizer
from speckd.trainer import SpecKDTrainer, load_teacher
from tests.tiny import common_flags, log_of, run_cli
from tests.trainer.conftest import World
from tests.trainer.test_invariance import require_same, require_same_weights

PLACES = {
    "model.embed_tokens": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
    "model.layers.1": "cpu",
}


def offloaded(folder: Path, **more: str) -> dict[str, Any]:
    return {"device_map": {**PLACES, "model.layers.0": "disk", **more}, "offload_folder": str(folder / "offload")}


def train(world: World, output: Path, options: dict[str, Any]) -> list[dict[str, float]]:
    flags = [*common_flags(world.student, world.teacher, world.data, output), "--eval_dataset", str(world.data)]
    assert run_cli([*flags, "--max_steps", "3", "--teacher_model_init_kwargs", json.dumps(options)]) == 0
    return log_of(output)


@pytest.mark.parametrize("more", [{}, {"model.layers.1": "disk"}], ids=["one layer", "all layers"])
def test_from_a_disk_it_says_what_it_says_in_memory(world: World, tmp_path: Path, more: dict[str, str]) -> None:
    found = train(world, tmp_path / "found", offloaded(tmp_path, **more))
    require_same(found, train(world, tmp_path / "wanted", {}), 1e-6)
    require_same_weights(tmp_path / "found", tmp_path / "wanted", 1e-6)
    ends = [json.loads((tmp_path / name / "results.json").read_text())["end"] for name in ("found", "wanted")]
    assert ends[0] == {name: pytest.approx(value, rel=1e-6) for name, value in ends[1].items()}


def test_what_is_on_the_disk_stays_there_between_its_forwards(world: World, tmp_path: Path) -> None:
    args = SpecKDConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        max_steps=2,
        save_strategy="no",
        teacher_model_init_kwargs=offloaded(tmp_path),
    )
    teacher, tokenizer = load_teacher(str(world.teacher), args, torch.float32), build_tokenizer()
    trainer = SpecKDTrainer(
        str(world.student),
        teacher,
        args,
        Dataset.from_json(str(world.data)),
        None,
        tokenizer,
        teacher_processing_class=tokenizer,
    )
    away, here = (list(layer.parameters()) for layer in trainer.teacher.get_decoder().layers)
    trainer.train()
    assert all(p.is_meta for p in away) and not any(p.is_meta for p in here)
    assert not trainer.source.head.weight.is_meta  # type: ignore[union-attr]


def test_a_head_on_the_disk_is_one_line(world: World, tmp_path: Path, capsys) -> None:
    flags = common_flags(world.student, world.teacher, world.data, tmp_path / "out")
    options = offloaded(tmp_path, lm_head="disk", **{"model.embed_tokens": "disk"})
    assert run_cli([*flags, "--teacher_model_init_kwargs", json.dumps(options)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "the device_map offloads the teacher's head" in said[0]
