"""What a run leaves behind, and what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from speckd.collation import require_isolation
from speckd.evaluate import evaluate
from speckd.head import LMHead, check_head
from speckd.quickstart.data import collate, encode
from speckd.tasks import build_tokenizer, distinct
from speckd.tokens import supervised_rows, token_batch
from tests.tiny import common_flags, log_of, run_cli, write_rows
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
