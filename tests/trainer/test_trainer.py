"""What a run leaves behind, and what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from speckd import run
from speckd.arguments import SpecKDConfig
from speckd.collation import require_isolation
from speckd.errors import SpeckdError
from speckd.evaluate import evaluate
from speckd.head import LMHead, check_head
from speckd.quickstart.data import collate, encode
from speckd.tasks import build_tokenizer, distinct
from speckd.tokens import supervised_rows, token_batch
from speckd.trainer import SpecKDTrainer, load_teacher
from tests.tiny import common_flags, log_of, run_cli, write_model, write_rows
from tests.trainer.conftest import World


def test_importing_speckd_imports_neither_trl_nor_transformers() -> None:
    code = "import sys, speckd; sys.exit(bool({'trl', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_finished_run_loads_and_tells_its_story(world: World, tmp_path: Path, caplog) -> None:
    output = tmp_path / "out"
    held_out = write_rows(tmp_path / "dev.jsonl", [json.loads(x) for x in world.data.read_text().splitlines()][:5])
    before = (world.teacher / "model.safetensors").read_bytes()
    assert (
        run_cli(
            [
                *common_flags(world.student, world.teacher, world.data, output),
                "--max_steps",
                "3",
                "--eval_dataset",
                str(held_out),
            ]
        )
        == 0
    )
    student = AutoModelForCausalLM.from_pretrained(output)
    assert student.get_input_embeddings().weight.data_ptr() == student.get_output_embeddings().weight.data_ptr()
    results = json.loads((output / "results.json").read_text())
    assert results["end"]["nll"] < results["start"]["nll"] and results["steps"] == 3
    card = (output / "README.md").read_text()
    assert card.startswith("---\n") and "label_ratio" in card and str(world.teacher) in card
    assert {"config.yaml", "training_log.jsonl", "tokenizer.json"} <= {p.name for p in output.iterdir()}
    # The same held-out numbers without the trainer, on the clean teacher.
    tokenizer, teacher = build_tokenizer(), AutoModelForCausalLM.from_pretrained(world.teacher)
    assert (world.teacher / "model.safetensors").read_bytes() == before
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    ids = [[*tokenizer(r["prompt"] + r["completion"]).input_ids, tokenizer.eos_token_id] for r in rows]
    lengths = [len(tokenizer(r["prompt"]).input_ids) for r in rows]
    from speckd.compatibility import SharedVocabulary
    from speckd.quickstart.data import Encoded

    batch = collate([Encoded(i, n, s) for s, (i, n) in enumerate(zip(ids, lengths, strict=True))], 0)
    found = evaluate(student, teacher, SharedVocabulary(len(tokenizer)), [batch])
    for name, value in found.items():
        assert results["end"][name] == pytest.approx(value, rel=1e-5), name


def test_lora_trains_adapters_only_and_the_result_loads(world: World, tmp_path: Path) -> None:
    output = tmp_path / "lora"
    lora = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--max_steps", "2"]
    assert run_cli([*common_flags(world.student, world.teacher, world.data, output), *lora]) == 0
    saved = load_file(output / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert not (output / "model.safetensors").exists()
    assert any(float(value.abs().max()) > 0 for name, value in saved.items() if "lora_B" in name)
    assert AutoModelForCausalLM.from_pretrained(output) is not None


def test_starvation_is_said_once_with_its_remedies(world: World, tmp_path: Path, capsys, caplog) -> None:
    flags = [*common_flags(world.student, world.teacher, world.data, tmp_path / "out"), "--max_steps", "6", "--gate", "random"]
    assert run_cli([*flags, "--rejected", "mask", "--gate_options", '{"rate": 0.0}', "--starvation_patience", "4"]) == 0
    said = capsys.readouterr().err
    assert said.count("STARVATION") == 1
    assert all(remedy in said for remedy in ("SFT", "rejected: label", "label_ratio"))
    assert all(step["loss"] == 0 for step in log_of(tmp_path / "out"))
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["warnings"]) == 1
    assert "> STARVATION" in (tmp_path / "out" / "README.md").read_text()


def test_starvation_between_logs_is_said_at_the_end(world: World, tmp_path: Path, capsys) -> None:
    flags = [*common_flags(world.student, world.teacher, world.data, tmp_path / "out"), "--max_steps", "6", "--gate", "random"]
    more = ["--rejected", "mask", "--gate_options", '{"rate": 0.0}', "--starvation_patience", "4", "--logging_steps", "100"]
    assert run_cli([*flags, *more]) == 0
    assert capsys.readouterr().err.count("STARVATION") == 1


def test_a_scrambled_teacher_hurts_and_is_off_in_evaluation(world: World, tmp_path: Path) -> None:
    results = {}
    for fraction in ("0.0", "1.0"):
        output = tmp_path / fraction
        flags = [
            *common_flags(world.student, world.teacher, world.data, output),
            "--recipe",
            "ungated",
            "--eval_dataset",
            str(world.data),
        ]
        assert run_cli([*flags, "--max_steps", "10", "--scrambled_teacher_fraction", fraction]) == 0
        results[fraction] = json.loads((output / "results.json").read_text())
    assert results["0.0"]["start"] == {**results["1.0"]["start"], "loss": results["0.0"]["start"]["loss"]}
    assert results["0.0"]["end"]["kl"] < results["1.0"]["end"]["kl"]


def test_p13_padding_side_changes_nothing(world: World) -> None:
    """Left or right padding through a real model: the same keys, labels and losses."""
    from speckd import Objective, distillation_loss

    tokenizer, model = build_tokenizer(), AutoModelForCausalLM.from_pretrained(world.student)
    ids = [tokenizer(e.prompt + " " + e.completion).input_ids for e in distinct("train", 6)]
    length = max(map(len, ids))
    sums = []
    for side in ("right", "left"):
        rows, mask = torch.zeros(len(ids), length, dtype=torch.long), torch.zeros(len(ids), length, dtype=torch.long)
        for i, own in enumerate(ids):
            place = slice(0, len(own)) if side == "right" else slice(length - len(own), length)
            rows[i, place], mask[i, place] = torch.tensor(own), 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = model.get_decoder()(input_ids=rows, attention_mask=mask, position_ids=positions).last_hidden_state
        kept = supervised_rows(token_batch(rows, rows.clone(), mask))
        output = distillation_loss(Objective(label_loss_weight=1.0), hidden.flatten(0, 1), LMHead.from_model(model), None, kept)
        sums.append((len(kept), kept.keys.position.sort().values, output.sum))
    assert sums[0][0] == sums[1][0] and torch.equal(sums[0][1], sums[1][1])
    assert torch.allclose(sums[0][2], sums[1][2], rtol=1e-5)


def test_p14_packed_documents_do_not_see_each_other(world: World, monkeypatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.student)
    require_isolation(model, "student")
    decoder = model.get_decoder()
    monkeypatch.setattr(model, "get_decoder", lambda: lambda input_ids, position_ids, use_cache: decoder(input_ids=input_ids))
    with pytest.raises(Exception, match="see each other in the student"):
        require_isolation(model, "student")


def test_a_head_that_is_read_wrongly_is_refused(world: World) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.student)
    check_head(model, "student")
    model.config.logit_scale = 2.0
    with pytest.raises(Exception, match="turns hidden states into logits in a way"):
        check_head(model, "student")
    model.config.logit_scale = 1.0
    with torch.no_grad():
        model.get_input_embeddings().weight[1, 0] = torch.nan
    with pytest.raises(Exception, match="the student's logits are NaN"):
        check_head(model, "student")


def test_encode_and_collate_supervise_completions_only() -> None:
    tokenizer = build_tokenizer()
    examples = distinct("train", 3)
    batch, mask = collate(encode(examples, tokenizer), 0)
    for row, example in enumerate(examples):
        kept = batch.labels[row][batch.labels[row] != -100]
        assert tokenizer.decode(kept[:-1]) == example.completion and kept[-1] == tokenizer.eos_token_id
        assert int(mask[row].sum()) == len(example.prompt.split()) + len(kept)


def evaluations(output: Path) -> list[dict]:
    entries = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "eval_loss" in entry]


def test_held_out_losses_do_not_depend_on_the_epoch_of_a_sampled_gate(world: World, tmp_path: Path) -> None:
    """The student stands still, so its held-out loss does, and `load_best_model_at_end` chooses among equals."""
    flags = common_flags(world.student, world.teacher, world.data, tmp_path / "out")
    flags += ["--gate", "spec", "--rejected", "mask", "--learning_rate", "0", "--num_train_epochs", "3"]
    assert run_cli([*flags, "--eval_dataset", str(world.data), "--eval_strategy", "epoch"]) == 0
    found = {entry["eval_loss"] for entry in evaluations(tmp_path / "out")}
    assert len(evaluations(tmp_path / "out")) == 5 and len(found) == 1


@pytest.mark.parametrize(
    ("given", "metric", "greater"),
    [
        ({}, "nll", False),
        ({"metric_for_best_model": "eval_kl"}, "eval_kl", False),
        ({"metric_for_best_model": "tar"}, "tar", True),
    ],
)
def test_the_best_checkpoint_is_the_one_with_the_lowest_nll(tmp_path: Path, given, metric, greater) -> None:
    best = SpecKDConfig(output_dir=str(tmp_path), use_cpu=True, eval_strategy="steps", load_best_model_at_end=True, **given)
    assert (best.metric_for_best_model, best.greater_is_better) == (metric, greater)


@pytest.mark.parametrize("recipe", ["sft", "seqkd"])
def test_for_sft_a_teacher_changes_nothing(world: World, tmp_path: Path, monkeypatch, capsys, recipe: str) -> None:
    """It measures only: the student with a padded head learns over its own whole head, with a teacher or without. Where nothing
    is held out to measure on, it is not loaded."""
    student, logs, loads = write_model(tmp_path / "padded", seed=5, width=256), [], []
    monkeypatch.setattr(run, "load_teacher", lambda name, *rest: loads.append(name) or load_teacher(name, *rest))
    held_out = ["--eval_dataset", str(world.data), "--eval_rows", "2"]
    for name, teacher, more in (("with", world.teacher, held_out), ("unasked", world.teacher, []), ("without", None, [])):
        flags = common_flags(student, teacher, world.data, tmp_path / name)
        assert run_cli([*flags, *more, "--recipe", recipe, "--max_steps", "3"]) == 0
        logs.append([step["loss"] for step in log_of(tmp_path / name)])
        assert ("Teacher: not loaded, for the loss asks for none" in capsys.readouterr().err) == (name == "unasked")
    assert logs[0] == logs[1] == logs[2] and loads == [str(world.teacher)]


def test_a_student_that_believes_in_its_padding_is_named(world: World, tmp_path: Path, capsys) -> None:
    student = write_model(tmp_path / "padded", seed=5, width=512)
    assert run_cli([*common_flags(student, world.teacher, world.data, tmp_path / "out"), "--max_steps", "1"]) == 0
    assert "of its probability to ids that the teacher lacks" in capsys.readouterr().err


def test_rows_without_a_token_to_predict_are_left_out_also_without_a_length_limit(world: World, tmp_path: Path, capsys) -> None:
    rows = [{"text": e.prompt} for e in distinct("train", 6)]
    rows[1] = rows[4] = {"text": "<eos>"}  # one token, and nothing predicts a first one
    data = write_rows(tmp_path / "text.jsonl", rows)
    flags = common_flags(world.student, world.teacher, data, tmp_path / "out")
    assert run_cli([*flags, "--max_length", "null", "--max_steps", "1"]) == 0
    assert "2 of 6 rows (row 2, 5) have no supervised token left" in capsys.readouterr().err


def test_starvation_counts_from_where_a_run_resumes(world: World, tmp_path: Path, capsys) -> None:
    flags = [
        f
        for f in common_flags(world.student, world.teacher, world.data, tmp_path / "out")
        if f not in ("--save_strategy", "no")
    ]
    flags += ["--gate", "random", "--gate_options", '{"rate": 0.0}', "--rejected", "mask", "--starvation_patience", "4"]
    assert run_cli([*flags, "--save_steps", "3", "--max_steps", "3"]) == 0
    more = ["--max_steps", "5", "--resume_from_checkpoint", "true", "--allow_changed_config", "true"]
    assert run_cli([*flags, "--save_steps", "3", *more]) == 0
    assert "STARVATION" not in capsys.readouterr().err


def test_an_adapter_finds_its_base_from_any_folder(world: World, tmp_path: Path, monkeypatch) -> None:
    """Trained from a relative path, on a single module."""
    monkeypatch.chdir(world.student.parent)
    flags = common_flags(Path("student"), world.teacher, world.data, tmp_path / "lora")
    assert run_cli([*flags, "--use_peft", "true", "--lora_target_modules", "q_proj", "--max_steps", "1"]) == 0
    assert all("q_proj" in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    monkeypatch.chdir(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "lora") is not None


def test_a_teacher_without_a_tokenizer_is_refused_and_predict_works(world: World, tmp_path: Path) -> None:
    args = SpecKDConfig(output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True)
    data = Dataset.from_json(str(world.data))
    nameless = AutoModelForCausalLM.from_pretrained(world.teacher)
    named = AutoModelForCausalLM.from_pretrained(world.teacher)
    nameless.name_or_path = nameless.config._name_or_path = ""
    with pytest.raises(SpeckdError, match="Pass teacher_processing_class"):
        SpecKDTrainer(str(world.student), nameless, args, data)
    trainer = SpecKDTrainer(str(world.student), named, args, data, data)
    assert trainer.vocabulary.size == len(build_tokenizer())
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] > 0
    assert not trainer._step_sums.any()  # nothing that training would count as its own
    trainer.train()
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] > 0
