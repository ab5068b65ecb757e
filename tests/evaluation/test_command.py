"""`speckd evaluate` as a user runs it: what is kept, resumed and refused."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from speckd.cli import main
from speckd.compatibility import shared_vocabulary
from speckd.evaluate import evaluate as held_out
from speckd.evaluation import journal
from speckd.evaluation.compare import compare
from speckd.evaluation.options import Options, TaskOptions
from speckd.evaluation.table import show
from speckd.quickstart.data import collate, encode
from speckd.tasks import distinct
from tests.repository.files import PACKAGE, ROOT
from tests.sources.models import random_model
from tests.tiny import write_model, write_rows

QUICKSTART = PACKAGE / "quickstart" / "teacher"
TEMPLATE = "{% for m in messages %}please {{ m['content'] }} <eos> {% endfor %}{% if add_generation_prompt %}please {% endif %}"


def examples(count: int = 10) -> list[Any]:
    return distinct("test", count, 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_model(folder / "student", seed=1)
    write_model(folder / "teacher", seed=2, hidden=32, layers=2)
    asked = examples()
    write_rows(folder / "math.jsonl", [{"question": e.prompt, "answer": f"so #### {n}"} for n, e in enumerate(asked)])
    write_rows(folder / "text.jsonl", [{"prompt": e.prompt, "completion": f" {e.completion}"} for e in asked])
    comma = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    write_rows(folder / "checks.jsonl", [{"prompt": e.prompt, **comma} for e in asked])
    return folder


def config(place: Path, output: Path, tasks: dict[str, Any], **more: Any) -> Path:
    asked = any(task["kind"] in ("likelihood", "draft") for task in tasks.values())
    given = {
        "model_name_or_path": str(place / "student"),
        **({"teacher_model_name_or_path": str(place / "teacher")} if asked else {}),
        "output_dir": str(output),
        "device": "cpu",
        "batch_size": 4,
        "max_new_tokens": 6,
        "tasks": {name: {**task, "data": str(place / task["data"])} for name, task in tasks.items()},
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(given | more, sort_keys=False))
    return path


ROUGE = {"kind": "rouge", "data": "text.jsonl"}
SAMPLED = {"kind": "math", "data": "math.jsonl", "sampling_temperature": 1.0, "samples": 2}
ALL = {
    "math": SAMPLED,
    "rouge": ROUGE,
    "checks": {"kind": "checks", "data": "checks.jsonl"},
    "held-out": {"kind": "likelihood", "data": "text.jsonl"},
    "draft": {"kind": "draft", "data": "text.jsonl", "timed_prompts": 0, "limit": 5},
}


def run(path: Path, *more: str) -> int:
    return main(["evaluate", "--config", str(path), *more])


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "evaluation.json").read_text())


def lines(output: Path, name: str) -> list[dict[str, Any]]:
    return journal.read_lines(output / "examples" / f"{name}.jsonl")


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    assert run(config(place, place / "whole", ALL)) == 0
    return place / "whole"


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.rglob("*.json*"))}


# ---- what is kept ----------------------------------------------------------------------------------------------------------


def test_every_number_says_what_it_divides_by(whole: Path) -> None:
    found = results(whole)
    assert set(found) == {"speckd", "model", "teacher", "settings", "environment", "tasks"}
    assert found["model"]["parameters"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(found["model"]["path"]).parameters()
    )
    assert found["tasks"].keys() == ALL.keys()
    for task in found["tasks"].values():
        assert task["n"] in (5, 10) and task["data"]["rows"] == 10 and task["metrics"] and task["counts"]
        for metric in task["metrics"].values():
            assert metric["of"] and metric["low"] <= metric["value"] + 1e-12 and metric["value"] <= metric["high"] + 1e-12


def test_each_answer_is_kept_with_its_scores(whole: Path) -> None:
    found = lines(whole, "math")
    assert [(line["index"], line["turn"]) for line in found] == [(n, turn) for n in range(10) for turn in (0, 1)]
    assert {"key", "prompt", "completion", "reference", "scores", "truncated", "tokens"} <= found[0].keys()
    assert results(whole)["tasks"]["math"]["counts"]["truncated"] == sum(line["truncated"] for line in found)
    assert len({line["completion"] for line in found}) > 5, "sampled: not all the same"


def test_greedy_answers_are_transformers_own(place: Path, whole: Path) -> None:
    model, tokenizer = (kind.from_pretrained(place / "student") for kind in (AutoModelForCausalLM, AutoTokenizer))
    for line in lines(whole, "rouge"):
        ids = tokenizer(line["prompt"], return_tensors="pt").input_ids
        made = model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
        wanted = tokenizer.decode([*ids[0].tolist(), *made.tolist()], skip_special_tokens=True)
        assert tokenizer.decode(ids[0]) + line["completion"] == wanted and line["tokens"] == len(made)


@pytest.mark.parametrize("batch_size", ["1", "3", "20"])
def test_the_batch_decides_nothing(place: Path, whole: Path, tmp_path: Path, batch_size: str) -> None:
    tasks = {name: ALL[name] for name in ("math", "rouge")}
    assert run(config(place, tmp_path / "other", tasks), "--batch_size", batch_size) == 0
    for name in tasks:
        assert lines(tmp_path / "other", name) == lines(whole, name)


def test_held_out_measures_are_those_of_training(place: Path, whole: Path) -> None:
    student, teacher = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("student", "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(place / "student")
    vocabulary = shared_vocabulary(tokenizer, tokenizer, student.config.vocab_size, teacher.config.vocab_size)
    wanted = held_out(student, teacher, vocabulary, [collate(encode(examples(), tokenizer), tokenizer.pad_token_id)])
    found = results(whole)["tasks"]["held-out"]["metrics"]
    for name in ("nll", "kl", "agreement", "alpha", "tar", "tar_micro", "teacher_nll"):
        assert found[name]["value"] == pytest.approx(wanted[name], rel=1e-5), name
    assert results(whole)["tasks"]["held-out"]["counts"]["supervised"] == wanted["tokens"]


def test_calibration_is_that_of_the_plain_formulas(place: Path, whole: Path) -> None:
    model, tokenizer = (kind.from_pretrained(place / "student") for kind in (AutoModelForCausalLM, AutoTokenizer))
    batch, mask = collate(encode(examples(), tokenizer), tokenizer.pad_token_id)
    with torch.no_grad():
        probs = model(input_ids=batch.input_ids, attention_mask=mask).logits[:, :-1].double().softmax(-1)
    asked = batch.labels[:, 1:] >= 0
    probs, labels = probs[asked], batch.labels[:, 1:][asked]
    confidence, guess = probs.max(-1)
    right = (guess == labels).double()
    gaps = []
    for low in range(15):
        own = (confidence * 15).long().clamp(max=14) == low
        gaps.append((confidence[own].sum() - right[own].sum()).abs())
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[-1])
    found = results(whole)["tasks"]["held-out"]["metrics"]
    assert found["ece"]["value"] == pytest.approx(float(sum(gaps)) / len(labels), abs=1e-5)
    assert found["brier"]["value"] == pytest.approx(float((probs - one_hot).square().sum(-1).mean()), rel=1e-5)
    assert found["top_1"]["value"] == pytest.approx(float(right.mean()))


def test_as_a_draft_model(whole: Path) -> None:
    found = results(whole)["tasks"]["draft"]["metrics"]
    assert found["greedy_text_equal"]["value"] == 1.0 and found["tau_greedy"]["value"] == found["tau_greedy_expected"]["value"]
    gap = found["acceptance_gap"]
    assert gap["low"] <= 0 <= gap["high"]
    assert found["alpha_reference"]["value"] == pytest.approx(
        results(whole)["tasks"]["held-out"]["metrics"]["alpha"]["value"], abs=0.2
    )
    for line in lines(whole, "draft"):
        assert line["texts"]["plain"] == line["texts"]["speculative"] == line["completion"]


def test_of_16_bit_models_the_table_says_that_tokens_may_tie(whole: Path, capsys: Any) -> None:
    found, note = results(whole), "draft: in bfloat16 tokens may tie within rounding"
    show(found)
    assert "within rounding" not in capsys.readouterr().out
    found["teacher"]["dtype"] = "bfloat16"
    show(found)
    assert capsys.readouterr().out.count(note) == 1
    del found["tasks"]["draft"]
    show(found)
    assert "within rounding" not in capsys.readouterr().out


def test_the_clock_is_held_by_turns(place: Path, tmp_path: Path) -> None:
    task = {"kind": "draft", "data": "text.jsonl", "timed_prompts": 2, "timed_repeats": 2, "limit": 3}
    assert run(config(place, tmp_path / "out", {"draft": task})) == 0
    found = results(tmp_path / "out")["tasks"]["draft"]
    timed = [line["scores"] for line in lines(tmp_path / "out", "draft") if "speedup" in line["scores"]]
    assert found["metrics"]["speedup"]["n"] == found["counts"]["timed"] == len(timed) == 2
    assert all(each["speedup"] == each["plain_s"] / each["speculative_s"] for each in timed)


# ---- killed and resumed ----------------------------------------------------------------------------------------------------


def test_killed_it_goes_on_to_the_same_bytes(place: Path, whole: Path, tmp_path: Path) -> None:
    kills = (0, 3, 7, 12)
    paths = {killed_after: config(place, tmp_path / f"killed-{killed_after}", ALL) for killed_after in kills}
    command = [sys.executable, "-m", "tests.evaluation.apart", *(f"{n}={path}" for n, path in paths.items())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(PACKAGE.parent)]), "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, env=environment, check=False, capture_output=True, timeout=240).returncode == 0
    for path in paths.values():
        output = path.with_suffix("")
        assert not (output / "evaluation.json").exists()
        assert run(path) == 0
        assert contents(output) == contents(whole)


def test_what_is_there_is_not_made_again(place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "again"
    shutil.copytree(whole, output)
    monkeypatch.setattr(journal, "_append", lambda *_: pytest.fail("an answer was made again"))
    assert run(config(place, output, ALL)) == 0
    assert contents(output) == contents(whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_new_tokens": 7}, "settings.max_new_tokens is 6 there and 7 now"),
        ({"seed": 3}, "settings.seed is 0 there and 3 now"),
        ({"model_name_or_path": "teacher"}, "model.weights is "),
        ({"tasks": {"rouge": ROUGE}}, "it has task checks, draft, held-out, math, too; it has a teacher. Set"),
        ({"tasks": {**ALL, "rouge": SAMPLED}}, 'tasks.rouge.kind is "rouge" there and "math" now. Set'),
    ],
)
def test_another_evaluations_folder_is_refused(
    place: Path, whole: Path, tmp_path: Path, capsys: Any, change: dict[str, Any], words: str
) -> None:
    before = contents(whole)
    path = config(place, tmp_path / "x", change.pop("tasks", ALL), output_dir=str(whole))
    given = yaml.safe_load(path.read_text()) | change
    if "model_name_or_path" in change:
        given["model_name_or_path"] = str(place / change["model_name_or_path"])
    path.write_text(yaml.safe_dump(given))
    assert run(path) == 2
    assert words in capsys.readouterr().err and contents(whole) == before


def test_a_folder_in_which_nothing_was_answered_is_free(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the model was loaded, or in the middle of the first line."""
    output, append = tmp_path / "out", journal._append
    monkeypatch.setattr(journal, "_append", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(config(place, output, {"rouge": ROUGE, "draft": ALL["draft"]})) == 130
    (output / "examples" / "rouge.jsonl").write_text('{"index": 0, "tu')
    monkeypatch.setattr(journal, "_append", append)
    assert run(config(place, output, {"rouge": {**ROUGE, "limit": 3}})) == 0
    assert results(output)["tasks"]["rouge"]["n"] == 3
    assert json.loads((output / "plan.json").read_text())["tasks"]["rouge"]["limit"] == 3


def test_another_evaluation_is_named_in_few_words(place: Path, whole: Path, tmp_path: Path, capsys: Any) -> None:
    path = config(place, tmp_path / "x", {"new": ROUGE}, output_dir=str(whole), model_name_or_path=str(place / "teacher"))
    assert run(path) == 2
    said = capsys.readouterr().err
    assert "it has task checks, draft, held-out, math, rouge, not new; it has a teacher; model.weights is" in said
    assert len(said.replace(str(whole), "")) < 300


def test_a_folder_that_moved_is_the_same_model(place: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "moved", ignore=lambda folder, names: [n for n in names if n.startswith("whole")])
    shutil.copytree(whole, tmp_path / "out")
    assert run(config(tmp_path / "moved", tmp_path / "out", ALL)) == 0
    assert (tmp_path / "out" / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()


def test_two_do_not_answer_into_one_folder(place: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        assert run(config(place, tmp_path / "out", {"rouge": ROUGE})) == 2
    assert "another process evaluates into" in capsys.readouterr().err


def test_one_of_several_processes_is_refused(place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(config(place, tmp_path / "out", {"rouge": ROUGE})) == 2
    assert "Start it without torchrun" in capsys.readouterr().err


def test_prompts_that_fill_all_positions_are_counted(place: Path, tmp_path: Path) -> None:
    """The tiny models have 128."""
    word = examples()[0].prompt.split()[0]
    rows = [{"prompt": " ".join([word] * n), "completion": f" {word}"} for n in (5, 200)]
    data = str(write_rows(tmp_path / "long.jsonl", rows))
    tasks = {
        "rouge": {"kind": "rouge", "data": data},
        "held": {"kind": "likelihood", "data": data},
        "draft": {"kind": "draft", "data": data, "timed_repeats": 1},
    }
    for batch_size in ("1", "4"):
        assert run(config(place, tmp_path / f"out{batch_size}", tasks), "--batch_size", batch_size) == 0
        found = results(tmp_path / f"out{batch_size}")["tasks"]
        assert found["rouge"]["counts"]["without_room"] == 1 and found["rouge"]["counts"]["empty"] >= 1
        assert found["held"]["metrics"]["nll"]["n"] == 1 and found["held"]["counts"]["truncated"] == 1
        assert found["draft"]["metrics"]["speedup"]["n"] == 1


def test_a_prompt_beyond_the_positions_of_a_table_is_not_read(tmp_path: Path) -> None:
    """GPT-2 looks its positions up, and has 64 here."""
    tokenizer = AutoTokenizer.from_pretrained(write_model(tmp_path / "tokenizer", seed=0))
    for seed, name in enumerate(("student", "teacher")):
        random_model("gpt2", seed, len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    word = examples()[0].prompt.split()[0]
    rows = [{"prompt": " ".join([word] * n), "completion": f" {word}"} for n in (5, 100)]
    data = str(write_rows(tmp_path / "long.jsonl", rows))
    task = {"kind": "draft", "data": data, "timed_prompts": 0}
    assert run(config(tmp_path, tmp_path / "out", {"draft": task, "rouge": {"kind": "rouge", "data": data}})) == 0
    found = results(tmp_path / "out")["tasks"]["draft"]
    assert found["counts"]["without_room"] == 1
    assert {metric["n"] for metric in found["metrics"].values()} == {1}, "no metric has a part of it"


def test_a_damaged_line_is_named(place: Path, whole: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "damaged"
    shutil.copytree(whole, output)
    file = output / "examples" / "rouge.jsonl"
    file.write_text("{]\n" + file.read_text())
    assert run(config(place, output, ALL)) == 2
    assert "rouge.jsonl:1: damaged. Remove the file" in capsys.readouterr().err


def test_where_a_mixed_file_ends_its_answers_does_not_depend_on_a_resume(place: Path, tmp_path: Path) -> None:
    """Messages end at the template's end, too, and texts do not, whichever comes first of what is missing."""
    chatty = shutil.copytree(place / "student", tmp_path / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = TEMPLATE.replace("<eos>", "<pad>")
    tokenizer.save_pretrained(chatty)
    asked = examples()
    texts = [{"prompt": e.prompt, "completion": f" {e.completion}"} for e in asked[:6]]
    long = [{"role": "user", "content": f"{e.prompt} {e.prompt}"} for e in asked[6:]]
    rows = [*texts, *({"messages": [turn, {"role": "assistant", "content": "please"}]} for turn in long)]
    data = str(write_rows(tmp_path / "mixed.jsonl", rows))
    hot = {"kind": "rouge", "data": data, "sampling_temperature": 9.0, "max_new_tokens": 60}
    tasks = {"hot": hot, "draft": {"kind": "draft", "data": data, "timed_prompts": 0}}
    more = {"model_name_or_path": str(chatty), "batch_size": 2}
    assert run(config(place, tmp_path / "whole", tasks, **more)) == 0
    found = lines(tmp_path / "whole", "hot")
    assert {line["index"] for line in found if not line["truncated"]} & {6, 7, 8, 9}, "some messages end"
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    for name in tasks:  # the texts, which are shorter and come last
        path = tmp_path / "out" / "examples" / f"{name}.jsonl"
        path.write_text("".join(line for line in path.read_text().splitlines(True) if json.loads(line)["index"] >= 6))
    assert run(config(place, tmp_path / "out", tasks, **more)) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ---- models ----------------------------------------------------------------------------------------------------------------


def test_an_adapters_folder_is_a_model(place: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(place / "student")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(place / "student").save_pretrained(tmp_path / "merged")
    for name in ("adapter", "merged"):
        path = config(place, tmp_path / f"out-{name}", {"rouge": ROUGE, "held": ALL["held-out"]})
        assert run(path, "--model_name_or_path", str(tmp_path / name)) == 0
    adapter, merged_too = (results(tmp_path / f"out-{name}") for name in ("adapter", "merged"))
    assert adapter["model"]["base"] == str(place / "student") and merged_too["model"]["base"] is None
    for task, metric in (("rouge", "rouge_l"), ("held", "nll")):
        own, other = (each["tasks"][task]["metrics"][metric]["value"] for each in (adapter, merged_too))
        assert own == pytest.approx(other, rel=1e-5)


def test_messages_go_through_the_chat_template(place: Path, tmp_path: Path, capsys: Any) -> None:
    asked = examples()[:4]
    rows = [{"messages": [{"role": "user", "content": e.prompt}, {"role": "assistant", "content": "ok"}]} for e in asked]
    write_rows(tmp_path / "chat.jsonl", rows)
    shutil.copytree(place / "student", tmp_path / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chatty")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chatty")
    task = {"kind": "rouge", "data": str(tmp_path / "chat.jsonl")}
    path = config(place, tmp_path / "plain", {"chat": task})
    assert run(path) == 2
    assert "row 1: messages, and the tokenizer has no chat template" in capsys.readouterr().err
    assert run(path, "--model_name_or_path", str(tmp_path / "chatty"), "--output_dir", str(tmp_path / "out")) == 0
    text = config(place, tmp_path / "text", {"chat": {**ROUGE, "limit": 4}}, apply_chat_template=True)
    assert run(text, "--model_name_or_path", str(tmp_path / "chatty")) == 0
    assert [line["key"] for line in lines(tmp_path / "out", "chat")] == [
        line["key"] for line in lines(tmp_path / "text", "chat")
    ]


def test_a_stop_text_ends_an_answer(place: Path, whole: Path, tmp_path: Path) -> None:
    plain = lines(whole, "rouge")
    word = next(w for line in plain for w in line["completion"].split()[1:])
    assert run(config(place, tmp_path / "out", {"rouge": {**ROUGE, "stop": [word]}})) == 0
    for line, before in zip(lines(tmp_path / "out", "rouge"), plain, strict=True):
        assert line["completion"] == before["completion"].split(word)[0]
        assert (line["tokens"] < before["tokens"]) or word not in " ".join(before["completion"].split()[:-1])
        assert not (line["truncated"] and word in before["completion"])


# ---- compared --------------------------------------------------------------------------------------------------------------


def test_two_models_of_ones_own_are_compared(place: Path, whole: Path, tmp_path: Path, capsys: Any) -> None:
    path = config(place, tmp_path / "other", {"rouge": {**ROUGE, "limit": 6}, "held-out": ALL["held-out"]})
    assert run(path, "--model_name_or_path", str(place / "teacher")) == 0
    rows = {(row["task"], row["metric"]): row for row in compare([whole, tmp_path / "other"])}
    assert {task for task, _ in rows} == {"rouge", "held-out"}
    nll = rows["held-out", "nll"]
    first, second = (results(each)["tasks"]["held-out"]["metrics"]["nll"]["value"] for each in (whole, tmp_path / "other"))
    assert (nll["first"], nll["second"]) == pytest.approx((first, second))
    assert nll["difference"] == pytest.approx(second - first) and nll["low"] <= nll["difference"] <= nll["high"]
    assert rows["rouge", "rouge_l"]["n"] == 6, "only what both have"
    assert rows["held-out", "kl"]["second"] == pytest.approx(0, abs=1e-6)
    capsys.readouterr()
    assert main(["evaluate", "--compare", str(whole), str(tmp_path / "other")]) == 0
    assert "held-out" in capsys.readouterr().out


def test_an_evaluation_against_itself_differs_by_nothing(whole: Path) -> None:
    assert all(row["difference"] == row["low"] == row["high"] == 0 for row in compare([whole, whole]))


def test_what_else_differs_is_said(place: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in (whole, shutil.copytree(whole, tmp_path / "other")):
        compare([whole, folder])
    assert caplog.text == ""
    found = results(tmp_path / "other")
    found["teacher"] = None
    found["tasks"]["draft"]["options"]["draft_length"] = 3
    found["tasks"]["rouge"]["data"]["sha256"] = "0"
    found["settings"] |= {"dtype": "bfloat16", "seed": 1}
    del found["tasks"]["checks"]
    (tmp_path / "other" / "evaluation.json").write_text(json.dumps(found))
    compare([whole, tmp_path / "other"])
    words = (
        "their teachers differ",
        'settings.dtype is "auto" in the first and "bfloat16" in the second',
        "settings.seed is 0 in the first and 1 in the second",
        "only one has the task checks",
        "draft.draft_length is 5 in the first and 3 in the second",
        "rouge.data is ",
    )
    assert len(caplog.records) == len(words) and all(each in caplog.text for each in words)


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("teacher"), None),
        (lambda c: c.pop("settings"), None),
        (lambda c: c.pop("tasks"), "evaluation.json: tasks is missing"),
        (lambda c: c.update(tasks=["rouge"]), "evaluation.json: tasks is ['rouge']"),
        (lambda c: c.update(teacher="none"), "evaluation.json: teacher is 'none'"),
        (lambda c: c["tasks"].update(rouge=3), "evaluation.json: tasks: rouge is 3"),
        (lambda c: c["tasks"]["rouge"].pop("kind"), "tasks: rouge: kind is missing"),
        (lambda c: c["tasks"]["rouge"].update(metrics=[]), "tasks: rouge: metrics is []"),
        (lambda c: c["tasks"]["rouge"]["metrics"]["rouge_l"].pop("columns"), "metrics: rouge_l: "),
        (lambda c: c["tasks"]["rouge"]["metrics"]["rouge_l"].update(statistic="mode"), "statistic is 'mode' is unknown"),
    ],
)
def test_a_changed_evaluation_is_refused_in_one_line(
    whole: Path, tmp_path: Path, capsys: Any, change: Change, words: str | None
) -> None:
    other = shutil.copytree(whole, tmp_path / "other")
    found = results(other)
    change(found)
    (other / "evaluation.json").write_text(json.dumps(found))
    for order in ([whole, other], [other, whole]):
        assert main(["evaluate", "--compare", *map(str, order)]) == (0 if words is None else 2)
        said = capsys.readouterr().err
        assert words is None or (words in said and said.startswith("error: ") and said.count("\n") == 1)


def test_examples_that_are_missing_are_named(whole: Path, tmp_path: Path, capsys: Any) -> None:
    other = shutil.copytree(whole, tmp_path / "other")
    (other / "examples" / "rouge.jsonl").unlink()
    for order in ([whole, other], [other, whole]):
        assert main(["evaluate", "--compare", *map(str, order)]) == 2
        said = capsys.readouterr().err
        assert f"{other / 'examples' / 'rouge.jsonl'} is missing" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--compare", "{whole}"], "two folders or more"),
        (["--compare", "{whole}", "{place}"], "holds no finished evaluation"),
        (["--compare", "{whole}", "{whole}", "--seed", "3"], "--compare takes folders"),
    ],
)
def test_what_cannot_be_compared_is_refused(place: Path, whole: Path, capsys: Any, words: list[str], error: str) -> None:
    assert main(["evaluate", *(word.format(whole=whole, place=place) for word in words)]) == 2
    assert error in capsys.readouterr().err


def test_a_teacher_whom_no_task_asks_is_not_loaded(place: Path, tmp_path: Path, capsys: Any) -> None:
    loose = tmp_path / "teacher"
    loose.mkdir()  # whoever loads it fails
    path = config(place, tmp_path / "out", {"t": ROUGE | {"limit": 2}}, teacher_model_name_or_path=str(loose))
    assert main(["evaluate", "--config", str(path)]) == 0
    assert "No task asks the teacher (kind likelihood or draft): it is not loaded." in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["teacher"] is None


def test_every_setting_is_listed(capsys: Any) -> None:
    assert main(["options", "--evaluate"]) == 0
    listed = capsys.readouterr().out
    for known in (Options, TaskOptions):
        assert all(f"{f.name}: " in listed for f in dataclasses.fields(known) if f.name != "tasks")
    assert "batch_size: texts side by side [default: 8]" in listed
    assert "few_shot: of a task: solved examples before each prompt [default: 0]" in listed


# ---- refused ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(batchsize=3), "'batchsize' is not a setting of an evaluation. Did you mean 'batch_size'?"),
        (lambda c: c.update(batch_size="many"), "batch_size: 'many' does not fit. Give a whole number"),
        (lambda c: c.update(batch_size=0), "batch_size is 0. Give at least 1"),
        (lambda c: c.update(dtype="float3"), "dtype is 'float3'. Did you mean 'float32'?"),
        (lambda c: c.update(device="gpu?"), "device: 'gpu?' is none"),
        (lambda c: c.update(device="cuda:99"), "device: 'cuda:99' is of no use here ("),
        (lambda c: c.update(device="meta"), "device: 'meta' is of no use here ("),
        (lambda c: c.update(trust_remote_code="yes"), "trust_remote_code: 'yes' does not fit. Give true or false"),
        (lambda c: c.pop("model_name_or_path"), "model_name_or_path is not set"),
        (lambda c: c.update(model_name_or_path="./nowhere"), "there is no folder ./nowhere"),
        (lambda c: c.pop("output_dir"), "output_dir is not set"),
        (lambda c: c.update(output_dir=c["model_name_or_path"]), "is a model's own folder"),
        (lambda c: c.pop("tasks"), "there is no task. Give one: --task math"),
        (lambda c: c.update(tasks=["math"]), "tasks is not a mapping"),
        (lambda c: c["tasks"].update({"a/b": c["tasks"]["t"]}), "'a/b' would name a file"),
        (lambda c: c["tasks"]["t"].update(kind="maths"), "tasks: t: kind is 'maths'. Did you mean 'math'?"),
        (lambda c: c["tasks"]["t"].pop("kind"), "kind is not set"),
        (lambda c: c["tasks"]["t"].pop("data"), "data is not set"),
        (lambda c: c["tasks"]["t"].update(data="nothing.jsonl"), "tasks: t: data: there is no file nothing.jsonl"),
        (lambda c: c["tasks"]["t"].update(fewshot=3), "'fewshot' is not a setting of an evaluation. Did you mean 'few_shot'?"),
        (lambda c: c["tasks"]["t"].update(few_shot=3), "few_shot and few_shot_data belong together"),
        (lambda c: c["tasks"]["t"].update(few_shot=30, few_shot_data=c["tasks"]["t"]["data"]), "has 10 rows. few_shot is 30"),
        (lambda c: c["tasks"]["t"].update(few_shot=3, few_shot_data=c["tasks"]["t"]["data"]), "few_shot_data is data itself"),
        (lambda c: c["tasks"]["t"].update(stop=["\n", ""]), "stop: an empty text ends every answer at once"),
        (lambda c: c["tasks"]["t"].update(kind="code", pass_at=[]), "pass_at is empty"),
        (lambda c: c["tasks"]["t"].update(draft_length=3), "draft_length has no effect on a task of kind math"),
        (lambda c: c["tasks"]["t"].update(samples=3), "3 greedy samples would all be the same"),
        (lambda c: c["tasks"]["t"].update(prompt_column="q"), "row 1: no column 'q' (prompt_column). There is: question"),
        (lambda c: c["tasks"]["t"].update(prompt_template="{q}"), "row 1: no column 'q' (prompt_template)"),
        (lambda c: c["tasks"]["t"].update(prompt_template="{question.__class__}"), "no column 'question.__class__'"),
        (lambda c: c["tasks"]["t"].update(prompt_template="{question!r}"), "has a format"),
        (lambda c: c["tasks"]["t"].update(prompt_template="{question"), "prompt_template: expected '}'"),
        (lambda c: c["tasks"]["t"].update(prompt_words=3), "row 1: no text of more than 3 words"),
        (lambda c: c["tasks"]["t"].update(apply_chat_template=True), "the tokenizer has no chat template. Remove it"),
        (
            lambda c: c["tasks"]["t"].update(kind="draft"),
            "a task of kind draft needs a teacher",
        ),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(place: Path, tmp_path: Path, capsys: Any, change: Change, words: str) -> None:
    path = config(place, tmp_path / "out", {"t": {"kind": "math", "data": "math.jsonl"}})
    given = yaml.safe_load(path.read_text())
    change(given)
    path.write_text(yaml.safe_dump(given))
    assert run(path) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stop", "x"], "the command line: stop is set, and"),
        (["--task", "math"], "the command line: task is set, and"),
        (["--limt", "3"], "'limt' is not a setting of an evaluation. Did you mean 'limit'?"),
    ],
)
def test_flags_beside_a_file(place: Path, tmp_path: Path, capsys: Any, flags: list[str], words: str) -> None:
    path = config(place, tmp_path / "out", {"t": {"kind": "math", "data": "math.jsonl"}})
    assert run(path, *flags) == 2
    assert words in capsys.readouterr().err


def test_one_task_by_flags_alone(place: Path, tmp_path: Path, capsys: Any) -> None:
    given = f"--model_name_or_path {place / 'student'} --output_dir {tmp_path / 'out'} --device cpu --max_new_tokens 4"
    assert main(["evaluate", *given.split(), "--data", str(place / "math.jsonl")]) == 2
    assert "data is an option of a task. Add --task" in capsys.readouterr().err
    assert main(["evaluate", *given.split(), "--task", "math", "--data", str(place / "math.jsonl"), "--limit", "3"]) == 0
    assert results(tmp_path / "out")["tasks"]["math"]["n"] == 3 and results(tmp_path / "out")["teacher"] is None


def test_an_interrupt_says_how_to_go_on(place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(journal, "_append", interrupted)
    assert run(config(place, tmp_path / "out", {"rouge": ROUGE})) == 130
    assert "interrupted; the same command goes on from there" in capsys.readouterr().err
