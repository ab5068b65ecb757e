"""Several teachers through the command line: one by name is that one alone, and each sample learns from its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from speckd.dry_run import step_facts
from speckd.errors import ConfigError, VocabularyError
from speckd.memory_report import _run_shape
from speckd.settings import load_settings
from speckd.tasks import build_tokenizer
from speckd.trainer import SpecKDTrainer
from tests.tiny import common_flags, log_of, run_cli, write_model, write_rows
from tests.trainer.conftest import World
from tests.trainer.test_invariance import require_same, require_same_weights
from tests.trainer.test_teacher_forward import trainer_of


@pytest.fixture(scope="module")
def other(world: World) -> Path:
    return write_model(world.place / "other", seed=7, hidden=24, layers=1)


@pytest.fixture(scope="module")
def routed(world: World) -> Path:
    """Rows that name their teachers, unevenly."""
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    return write_rows(world.place / "routed.jsonl", [{**row, "who": "a" if i % 3 else "b"} for i, row in enumerate(rows)])


def train(world: World, data: Path, output: Path, *more: str, teacher: Path | None = None) -> list[dict[str, float]]:
    flags = [*common_flags(world.student, teacher, data, output), "--max_steps", "3", "--per_device_train_batch_size", "8"]
    assert run_cli([*flags, *more]) == 0
    return log_of(output)


def names(**paths: Path) -> list[str]:
    return ["--teachers", json.dumps({name: str(path) for name, path in paths.items()})]


def mixed(**weights: float) -> list[str]:
    return ["--teacher_mixture", json.dumps(weights)]


ROUTED = ["--teacher_route_column", "who"]
PACKED = ["--packing", "true", "--max_length", "128"]


@pytest.mark.parametrize("packed", [[], PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("method", ["label-ratio", "paper-v1", "paper-v2-spec"])
def test_two_names_of_one_teacher_are_that_teacher(
    world: World, routed: Path, tmp_path: Path, method: str, packed: list[str]
) -> None:
    more = ["--recipe", method, "--eval_dataset", str(routed), *packed]
    alone = train(world, routed, tmp_path / "alone", *more, teacher=world.teacher)
    both = names(a=world.teacher, b=world.teacher)
    for name, own in {"routed": ROUTED, "mixed": mixed(a=1, b=3)}.items():
        require_same(train(world, routed, tmp_path / name, *more, *both, *own), alone)
        require_same_weights(tmp_path / name, tmp_path / "alone")
        found, wanted = (json.loads((tmp_path / run / "results.json").read_text())["end"] for run in (name, "alone"))
        assert found == {key: pytest.approx(value, rel=1e-5) for key, value in wanted.items()}


def of_one_step(world: World, data: Path, output: Path, *more: str, teacher: Path | None = None) -> dict[str, float]:
    once = ["--learning_rate", "0", "--gate", "none", "--rejected", "mask", "--max_steps", "1"]
    return train(world, data, output, *more, *once, "--per_device_train_batch_size", "24", teacher=teacher)[0]


@pytest.mark.parametrize("packed", [[], [*PACKED, "--max_length", "2048"]], ids=["padded", "packed"])
def test_each_sample_learns_from_its_own_teacher(
    world: World, routed: Path, other: Path, tmp_path: Path, packed: list[str]
) -> None:
    """The sum over both is the sum of each teacher's over its own samples; held-out samples are routed, too."""
    rows = [json.loads(line) for line in routed.read_text().splitlines()]
    total = tokens = divergence = count = 0.0
    for name, teacher in {"a": world.teacher, "b": other}.items():
        data = write_rows(tmp_path / f"{name}.jsonl", [row for row in rows if row["who"] == name])
        own = [*packed, "--eval_dataset", str(data)]
        step = of_one_step(world, data, tmp_path / name, *own, teacher=teacher)
        end = json.loads((tmp_path / name / "results.json").read_text())["end"]
        total, tokens = total + step["loss"] * end["tokens"], tokens + end["tokens"]
        divergence, count = divergence + end["kl"] * end["tokens"], count + end["tokens"]
    held_out = ["--eval_dataset", str(routed)]
    found = of_one_step(world, routed, tmp_path / "out", *packed, *names(a=world.teacher, b=other), *ROUTED, *held_out)
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-6)
    end = json.loads((tmp_path / "out" / "results.json").read_text())["end"]
    assert end["kl"] == pytest.approx(divergence / count, rel=1e-6) and end["tokens"] == count


def several(world: World, routed: Path, other: Path, output: Path, **more: Any) -> SpecKDTrainer:
    models = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in (("a", world.teacher), ("b", other))}
    return trainer_of(world, routed, output, models, **more)


def test_a_teacher_computes_only_lines_with_a_sample_of_its_own(
    world: World, routed: Path, other: Path, tmp_path: Path
) -> None:
    trainer = several(world, routed, other, tmp_path / "out", teacher_route_column="who", share_teacher_prompt=False)
    lines: dict[str, list[int]] = {}
    for name, model in trainer.teachers.items():
        own = lines[name] = []
        model.get_decoder().register_forward_pre_hook(
            lambda _, given, named, own=own: own.append(len(named["input_ids"])), with_kwargs=True
        )
    trainer.train()
    assert [a + b for a, b in zip(lines["a"], lines["b"], strict=True)] == [8, 8] and min(lines["a"] + lines["b"]) > 0


def test_the_mixture_of_two_models_is_that_of_their_probabilities(
    world: World, routed: Path, other: Path, tmp_path: Path
) -> None:
    """Held-out KL against the oracle: log Σ w p over whole softmaxes in float64."""
    trainer = several(world, routed, other, tmp_path / "out", teacher_mixture={"a": 1, "b": 4})
    found = trainer.evaluate()["eval_kl"]
    total = tokens = 0.0
    size = trainer.vocabulary.size
    for row in trainer.eval_dataset:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = [m(input_ids=ids).logits[0, :-1, :size].double() for m in (trainer.student, *trainer.teachers.values())]
        log_q, p = logits[0].log_softmax(-1), 0.2 * logits[1].softmax(-1) + 0.8 * logits[2].softmax(-1)
        kl = (p * (p.log() - log_q)).sum(-1)[labels[0, 1:] != -100]
        total, tokens = total + float(kl.sum()), tokens + len(kl)
    assert found == pytest.approx(total / tokens, rel=1e-5)


def test_it_says_what_is_mixed_and_the_plan_counts_every_teacher(
    world: World, routed: Path, other: Path, tmp_path: Path, capsys
) -> None:
    train(world, routed, tmp_path / "out", *names(a=world.teacher, b=other), *mixed(a=1, b=3))
    said = capsys.readouterr().err
    assert "the sum of 0.25 a, 0.75 b" in said and "Teacher a: " in said and "Teacher b: " in said
    assert f"taught by `{world.teacher}, {other}`" in (tmp_path / "out" / "README.md").read_text()
    weights = []
    rows = Dataset.from_json(str(routed))
    for own in (names(a=world.teacher), names(b=other), names(a=world.teacher, b=other)):
        flags = [*common_flags(world.student, None, routed, tmp_path / "plan"), *own, *ROUTED]
        facts = step_facts(_run_shape(load_settings(None, None, flags), None, (rows, None), build_tokenizer()))
        weights.append(facts.teacher)
    assert weights[0] + weights[1] == weights[2] > 0


def test_teachers_by_name_and_who_teaches_what_belong_together(world: World, routed: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are several teachers"):
        several(world, routed, other, tmp_path / "out")
    with pytest.raises(ConfigError, match="b has no weight"):
        several(world, routed, other, tmp_path / "out", teacher_mixture={"a": 1})
    with pytest.raises(ConfigError, match="Pass a mapping as teacher_model"):
        trainer_of(world, routed, tmp_path / "out", teacher_route_column="who")


def test_what_one_teacher_knows_and_another_does_not_is_weighed(world: World, routed: Path, tmp_path: Path) -> None:
    """Student and one teacher know a token that the other's narrow head lacks: it leaves the axis, and is not ignored."""
    tokenizer = build_tokenizer()
    width = len(tokenizer) - 1
    narrow = write_model(tmp_path / "narrow", seed=9, width=width)
    rows = [json.loads(line) for line in routed.read_text().splitlines()]
    known = [row for row in rows if width not in tokenizer(row["prompt"] + row["completion"]).input_ids]
    data = write_rows(tmp_path / "known.jsonl", known)
    with pytest.raises(VocabularyError, match=r"the teacher .*/teacher puts .* that the student or another teacher does not"):
        several(world, data, narrow, tmp_path / "out", teacher_route_column="who")
    trainer = several(world, data, narrow, tmp_path / "out", teacher_route_column="who", max_dropped_mass=1.0)
    assert trainer.vocabulary.size == width and trainer.train().training_loss > 0
