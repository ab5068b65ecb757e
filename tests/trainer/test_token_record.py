"""`tokens.jsonl` and `by_task.jsonl`: what the models say, whatever the teacher's source; and no trace in the training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from speckd.cli import main
from tests.tiny import common_flags, log_of, run_cli, task_rows, write_model, write_rows
from tests.trainer.conftest import World

TOP_K = ["--gate", "top_k", "--gate_options", '{"verify_top_k": 60}', "--rejected", "mask"]


@pytest.fixture(scope="module")
def held_out(world: World) -> Path:
    rows = [{**row, "kind": ("even", "odd")[place % 2]} for place, row in enumerate(task_rows(6, seed=3))]
    return write_rows(world.place / "held-out-kinds.jsonl", rows)


def flags_of(world: World, output: Path, *more: str) -> list[str]:
    return [*common_flags(world.student, world.teacher, world.data, output), "--max_steps", "2", *more]


def lines_of(output: Path, file: str = "tokens.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / file).read_text().splitlines()]


def supervised(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [token for line in lines for token in line["tokens"] if token["supervised"]]


@pytest.fixture(scope="module")
def dense(world: World, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("record") / "run"
    flags = flags_of(world, output, *TOP_K, "--eval_dataset", str(held_out), "--task_column", "kind")
    assert run_cli(flags) == 0
    return output


def test_it_says_what_the_models_say(world: World, dense: Path) -> None:
    """Against two plain forwards: probabilities, proposals, favourites, entropy, KL, and the greedy gate."""
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (world.student, world.teacher)]
    lines = lines_of(dense)
    assert [(line["step"], line["row"]) for line in lines] == [(s, row) for s in (0, 2) for row in (1, 3, 4, 6)]
    assert {line["data"] for line in lines} == {"held out"} and [line["task"] for line in lines[:2]] == ["even", "even"]
    width = models[0].get_output_embeddings().weight.shape[0]
    for line in lines[:4]:  # before training the student is still the one on disk
        ids = torch.tensor([[token["id"] for token in line["tokens"]]])
        assert ids.shape[1] == line["length"]
        with torch.no_grad():
            q, p = (model(ids).logits[0, :-1, :width].double().log_softmax(-1) for model in models)
        for token in line["tokens"]:
            at = token["position"] - 1
            if not token["supervised"]:
                continue
            assert token["proposal"] == int(q[at].argmax())
            assert token["favourites"][0][0] == int(p[at].argmax()) and len(token["favourites"]) == 5
            wanted = {
                "p_label": p[at, token["id"]].exp(),
                "q_label": q[at, token["id"]].exp(),
                "p_proposal": p[at, token["proposal"]].exp(),
                "q_proposal": q[at].exp().max(),
                "entropy": -(p[at].exp() * p[at]).sum(),
                "kl": (p[at].exp() * (p[at] - q[at])).sum(),
            }
            for name, value in wanted.items():
                assert token[name] == pytest.approx(float(value), rel=2e-4, abs=1e-6), name
            accepted = int((p[at] > p[at, token["proposal"]]).sum()) < 60
            assert token["acceptance"] == token["weight"] == float(accepted)
            assert (token["divergence"] is not None) == accepted and token["fallback_weight"] == 0
            if accepted:
                assert token["divergence"] == pytest.approx(token["kl"], rel=1e-4)


def test_the_texts_put_together_are_the_text(world: World, dense: Path) -> None:
    line = lines_of(dense)[0]
    row = task_rows(6, seed=3)[0]
    said = "".join(token["text"] for token in line["tokens"])
    assert said.split() == [*row["prompt"].split(), *row["completion"].split(), "<eos>"]
    assert all(token["token_text"] == token["text"].strip() for token in supervised([line]))


def test_training_does_not_notice(world: World, held_out: Path, tmp_path: Path) -> None:
    """With dropout, whose draws would be others: the same curve and the same weights, to the last bit."""
    student = write_model(tmp_path / "student", seed=1, dropout=0.2)
    curves, weights = [], []
    for samples in ("0", "6"):
        output = tmp_path / f"run-{samples}"
        flags = common_flags(student, world.teacher, world.data, output)
        flags += ["--eval_dataset", str(held_out), "--max_steps", "3", "--token_view_samples", samples]
        assert run_cli(flags) == 0
        assert (output / "tokens.jsonl").exists() == (samples != "0")
        timed = ("epoch", "runtime", "per_second")
        curves.append([{k: v for k, v in entry.items() if not any(t in k for t in timed)} for entry in log_of(output)])
        weights.append(AutoModelForCausalLM.from_pretrained(output).state_dict())
    assert curves[0] == curves[1] and "teacher_computed" not in curves[0][0].keys() ^ curves[1][0].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_measures_by_task_add_up(dense: Path) -> None:
    lines, results = lines_of(dense, "by_task.jsonl"), json.loads((dense / "results.json").read_text())
    assert [(line["step"], line["task"], line["sequences"]) for line in lines] == [
        *((0, "even", 3), (0, "odd", 3), (2, "even", 3), (2, "odd", 3))
    ]
    for step, when in ((0, "start"), (2, "end")):
        own = [line for line in lines if line["step"] == step]
        tokens = sum(line["tokens"] for line in own)
        assert tokens == results[when]["tokens"]
        for name in ("nll", "kl", "agreement"):
            mean = sum(line[name] * line["tokens"] for line in own) / tokens
            assert mean == pytest.approx(results[when][name], rel=1e-6)
        assert sum(line["tar"] for line in own) / 2 == pytest.approx(results[when]["tar"], rel=1e-6)


def test_a_column_that_is_not_there(world: World, tmp_path: Path, capsys) -> None:
    assert run_cli(flags_of(world, tmp_path / "run", "--task_column", "family")) == 2
    assert "there is no column 'family' (task_column)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_what_a_cached_teacher_does_not_know_is_null(
    kind: str, world: World, held_out: Path, dense: Path, tmp_path: Path
) -> None:
    cached = ["--teacher_cache_dir", str(tmp_path / "cache"), "--teacher_cache_kind", kind, "--teacher_top_k", "8"]
    gate = ["--gate", "label_ratio", "--eval_dataset", str(held_out)]
    assert main(["cache", *flags_of(world, tmp_path / "unused", *gate, *cached, "--teacher_cache_bits", "32")]) == 0
    output = tmp_path / "run"
    assert run_cli(flags_of(world, output, *gate, "--teacher", "cache", "--teacher_cache_dir", str(tmp_path / "cache"))) == 0
    lines = lines_of(output)
    known = [t for line in lines_of(dense) if line["step"] == 0 for t in line["tokens"] if t["supervised"]]
    found = supervised(lines[:4])
    assert len(found) == len(known) and lines[0]["teacher_top_k"] is not None
    for token, whole in zip(found, known, strict=True):
        assert token["p_label"] == pytest.approx(whole["p_label"], rel=1e-3)
        assert token["q_proposal"] == pytest.approx(whole["q_proposal"], rel=1e-4)
        if kind == "sampled":
            assert all(token[name] is None for name in ("p_proposal", "favourites", "entropy", "kl"))
            continue
        assert [i for i, *_ in token["favourites"]] == [i for i, *_ in whole["favourites"]]
        if token["p_proposal"] is not None:
            assert token["p_proposal"] == pytest.approx(whole["p_proposal"], rel=1e-3)
        assert token["entropy"] <= whole["entropy"] * 1.001 and token["kl"] <= whole["kl"] * 1.001, "lower bounds"
    if kind == "top_k":
        assert any(token["p_proposal"] is None for token in found)


def test_gates_that_rank_and_gates_that_are_soft(world: World, tmp_path: Path) -> None:
    ranked = ["--gate", "student_entropy"]
    assert run_cli(flags_of(world, tmp_path / "ranked", *ranked)) == 0
    for line in lines_of(tmp_path / "ranked"):
        assert line["ranked_among"] == len(supervised([line])) and line["data"] == "training"
        assert {token["acceptance"] for token in supervised([line])} <= {0.0, 1.0}
    soft = ["--gate", "label_ratio", "--rejected", "label"]
    assert run_cli(flags_of(world, tmp_path / "soft", *soft)) == 0
    for token in supervised(lines_of(tmp_path / "soft")):
        assert token["acceptance"] == pytest.approx(min(1.0, token["p_label"] / token["q_label"]), rel=1e-3)
        assert token["weight"] == token["acceptance"]
        assert token["fallback_weight"] == pytest.approx(1 - token["acceptance"], abs=1e-5)


def test_without_a_teacher_there_is_none(world: World, held_out: Path, tmp_path: Path) -> None:
    flags = [*common_flags(world.student, None, world.data, tmp_path / "sft"), "--max_steps", "2", "--recipe", "sft"]
    assert run_cli([*flags, "--eval_dataset", str(held_out)]) == 0
    assert not (tmp_path / "sft" / "tokens.jsonl").exists()
    measured = flags_of(world, tmp_path / "measured", "--recipe", "sft", "--eval_dataset", str(held_out))
    assert run_cli(measured) == 0
    for token in supervised(lines_of(tmp_path / "measured")):
        assert token["p_label"] is not None and token.get("acceptance") is None, "a teacher that is but a measure"


def test_an_adapters_base_teaches(world: World, tmp_path: Path) -> None:
    flags = [*common_flags(world.student, None, world.data, tmp_path / "run"), "--max_steps", "2", "--teacher", "base"]
    assert run_cli([*flags, "--use_peft", "true", "--label_loss_weight", "0.5", "--lora_r", "4"]) == 0
    lines = lines_of(tmp_path / "run")
    for token in supervised([line for line in lines if line["step"] == 0]):
        assert token["p_label"] == pytest.approx(token["q_label"], rel=1e-4) and token["kl"] == pytest.approx(0, abs=1e-5)
    assert any(token["kl"] > 1e-6 for token in supervised([line for line in lines if line["step"] == 2]))


def test_resuming_doubles_nothing(world: World, held_out: Path, tmp_path: Path) -> None:
    output, whole = tmp_path / "run", tmp_path / "whole"
    common = ["--eval_dataset", str(held_out), "--task_column", "kind", "--save_strategy", "steps", "--save_steps", "1"]
    assert run_cli([*flags_of(world, whole, *common)]) == 0
    assert run_cli([*flags_of(world, output, *common)]) == 0
    shutil.rmtree(output / "checkpoint-2")
    (output / "results.json").unlink()
    assert run_cli([*flags_of(world, output, *common), "--resume_from_checkpoint", "true"]) == 0
    for file in ("tokens.jsonl", "by_task.jsonl"):
        assert (output / file).read_text() == (whole / file).read_text()


def test_a_long_sample_is_bounded(world: World, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("speckd.token_record._CONTEXT", 3)
    monkeypatch.setattr("speckd.token_record._TOKENS", 4)
    assert run_cli(flags_of(world, tmp_path / "run", "--token_view_samples", "1")) == 0
    for line in lines_of(tmp_path / "run"):
        assert len(line["tokens"]) <= 7 < line["length"]
        assert [token["supervised"] for token in line["tokens"]][:4] == [False, False, False, True]
