"""The quickstart: its teacher, its measures, its words."""

import io
import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from speckd.cli import main
from speckd.errors import ConfigError, SpeckdError
from speckd.quickstart import compare, report
from speckd.quickstart.data import encode
from speckd.quickstart.evaluation import accuracy, block_efficiency, generate_greedy
from speckd.quickstart.models import TEACHER, load_teacher
from speckd.tasks import distinct


def test_the_shipped_teacher_is_the_one_that_its_manifest_describes() -> None:
    teacher, tokenizer = load_teacher()
    manifest = json.loads((TEACHER / "manifest.json").read_text())
    assert (TEACHER / "model.safetensors").stat().st_size <= 5 * 2**20
    assert teacher.num_parameters() == manifest["parameters"] and not teacher.training
    examples = distinct("test", 60)
    answers = generate_greedy(teacher, encode(examples, tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    found = accuracy(examples, tokenizer.batch_decode(answers))
    assert abs(found["accuracy"] - manifest["test_accuracy"]["accuracy"]) < 0.15


def test_a_changed_teacher_is_refused(tmp_path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(TEACHER, folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(SpeckdError, match=r"has hash .* its manifest says"):
        load_teacher(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SpeckdError, match="incomplete"):
        load_teacher(folder)


@pytest.mark.parametrize(
    ("matches", "wanted"),
    [("1111111", 7 / 2), ("0000", 1), ("111110", 6 / 1), ("11011", 5 / 2), ("1", 1), ("1111100000", 10 / 5)],
)
def test_block_efficiency_counts_teacher_calls(matches, wanted) -> None:
    """Each call keeps the run of matches, at most five, and adds one token of the teacher's own."""
    assert block_efficiency([torch.tensor([c == "1" for c in matches])]) == pytest.approx(wanted)


def test_block_efficiency_is_that_of_real_speculative_decoding() -> None:
    """Against a loop that drafts and verifies token by token, on random models of a 3-token language."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        truth = torch.randint(3, (20,), generator=generator).tolist()
        guesses = torch.randint(3, (20,), generator=generator).tolist()  # the student's token given the right prefix
        produced, calls = 0, 0
        while produced < 20:
            calls += 1
            kept = 0
            while kept < 5 and produced + kept < 20 and guesses[produced + kept] == truth[produced + kept]:
                kept += 1
            produced = min(produced + kept + 1, 20)
        matches = torch.tensor([a == b for a, b in zip(truth, guesses, strict=True)])
        assert block_efficiency([matches]) == pytest.approx(20 / calls)


def _runs(mask: list[float], ours: list[float]) -> list[dict]:
    runs = []
    for method, teacher in (("SFT", "clean"), *((m, t) for t in compare.TEACHERS for m in compare.METHODS if m != "SFT")):
        for seed, _ in enumerate(mask):
            value = mask[seed] if "mask" in method else ours[seed] if method.startswith("label ratio") else 0.5
            measures = dict.fromkeys(report.COLUMNS, value)
            curve = [{"step": s, "loss": 1.0, "tar": 0.5} for s in (10, 20)]
            runs.append({"job": {"method": method, "teacher": teacher, "seed": seed}, "measures": measures, "curve": curve})
    return runs


def test_the_sentence_says_what_the_numbers_say(tmp_path) -> None:
    """0.4 is lower than ungated's 0.5: worse as an accuracy, better as a divergence; 0.6 the other way."""
    said = report.sentence(_runs([0.40, 0.41, 0.39], [0.60, 0.61, 0.59]))
    for teacher in compare.TEACHERS:
        part = said.split(f"with the {teacher} teacher ")[1]
        assert part.startswith(
            "masking what the gate rejects changed KL to the clean teacher by -0.100 [-0.125, -0.075] (better)"
        )
        assert "accuracy by -0.100 [-0.125, -0.075] (worse), and the label ratio" in part
        assert "+0.100 [+0.075, +0.125] (worse) and accuracy by +0.100 [+0.075, +0.125] (better)" in part
    assert "not clearly different" in report.sentence(_runs([0.40, 0.60, 0.50], [0.5, 0.5, 0.5]))
    assert "one seed" in report.sentence(_runs([0.4], [0.6]))
    report.draw(_runs([0.4, 0.5], [0.6, 0.5]), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    shown = []
    for width in (80, 300):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(report.rich_table(_runs([0.40, 0.41, 0.39], [3.60, 3.61, 3.59])))
        shown.append([line.rstrip() for line in console.export_text().splitlines()])
    assert shown[0] == shown[1]  # nothing was cut or wrapped for want of room
    assert all(name in "\n".join(shown[0]) for name in [*report.COLUMNS.values(), *compare.TEACHERS])


def test_stored_logits_are_the_teachers_at_the_right_token(tmp_path) -> None:
    """Training from the store is training with the teacher in process: same losses, with the scrambling too."""
    from safetensors.torch import load_file

    from speckd import LMHead, Objective, distillation_loss, supervised_rows
    from speckd.quickstart.data import collate
    from speckd.teachers import DenseTeacher, HiddenTeacher

    compare._store_teacher(tmp_path)
    logits = load_file(tmp_path / "teacher.safetensors")["logits"]
    teacher, tokenizer = load_teacher()
    encoded = compare._train_examples(tokenizer)
    first = torch.tensor([0] + [len(e.ids) - e.prompt_length for e in encoded]).cumsum(0)
    chosen = [5990, 3, 1234]
    batch, mask = collate([encoded[i] for i in chosen], 0)
    rows = supervised_rows(batch)
    hidden = teacher.get_decoder()(input_ids=batch.input_ids, attention_mask=mask).last_hidden_state.flatten(0, 1)
    live = HiddenTeacher(hidden, LMHead.from_model(teacher)).signal(rows.index).logits
    stored = DenseTeacher(logits, compare.places(batch, rows, [encoded[i] for i in chosen], first)).signal(rows.index).logits
    assert torch.allclose(live, stored, atol=1e-4)
    loss = distillation_loss(
        Objective(),
        hidden,
        LMHead.from_model(teacher),
        DenseTeacher(logits, compare.places(batch, rows, [encoded[i] for i in chosen], first)),
        rows,
    )
    assert float(loss.sum / loss.count) < 1e-5  # the teacher as its own student


def test_a_folder_that_is_not_empty_is_refused(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert main(["quickstart", "--output-dir", str(tmp_path)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ConfigError, match="the folder that you are in"):
        compare.run(Path())
    with pytest.raises(ConfigError, match="--seeds 0"):
        compare.run(tmp_path / "new", seeds=0)


def test_workers_end_at_once_where_something_fails() -> None:
    context = multiprocessing.get_context("spawn")
    began = time.monotonic()

    def fail() -> None:
        with compare._workers(context, context.Value("q", 0)) as pool:
            assert not pool.submit(time.sleep, 120).done()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert time.monotonic() - began < 60
    # The pool's own thread waits for the same process, and for an instant only that thread knows that it ended.
    while (left := multiprocessing.active_children()) and time.monotonic() - began < 60:
        time.sleep(0.05)
    assert not left


def test_a_short_quickstart_leaves_table_curves_and_students(tmp_path, monkeypatch, capsys) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(compare, "START_STEPS", 3)
    output = tmp_path / "results"
    compare.run(output, seeds=1, steps=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results"]
    assert {p.name for p in output.iterdir()} == {"results.json", "table.md", "curves.png", "students"}
    students = sorted((output / "students").iterdir())
    assert len(students) == 10 and AutoModelForCausalLM.from_pretrained(students[0]) is not None
    assert "label ratio" in capsys.readouterr().out
    rows = [line.split(" | ")[:2] for line in (output / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[2:4] == [["| SFT", "none"], ["| ungated", "clean"]] and rows[-1] == ["| label ratio, label", "25 % unreliable"]
