"""`speckd report`: its numbers are those of the logs, its refusals say where, and it tells no secret."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from speckd.cli import main
from speckd.evaluation.compare import compare
from speckd.evaluation.finished import read_evaluation
from speckd.evaluation.paired import differences
from speckd.report.answers import tasks_of
from speckd.report.build import PAGE, report
from speckd.report.comparison import Estimate, groups, paired
from speckd.report.runs import read_run
from speckd.report.shown import HIDDEN, Shown, is_secret_key, number, without_secrets
from tests.report.folders import WORDS, write_bench, write_evaluation, write_run


def text_of(page: Path) -> str:
    """What is read, a line an element."""
    return unescape(
        re.sub(r"<[^>]+>", "\n", re.sub(r"<style>.*?</style>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL))
    )


def table(page: Path, caption: str) -> dict[str, list[str]]:
    """Of a table, each row's cells by its first one."""
    whole = page.read_text(encoding="utf-8")
    found = next(part for part in whole.split("<table")[1:] if f"<caption>{caption}</caption>" in part).split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", found, re.DOTALL)]
    return {unescape(row[0]): [unescape(cell) for cell in row[1:]] for row in rows}


def test_numbers_are_those_of_the_logs(page: Path) -> None:
    """Mean and t-interval of the runs that repeat a method; a single one before and after; differences by seed."""
    held_out = table(page, "Held out")
    method, single = "a", "b0-folder"
    assert held_out[method][0] == "2"
    half = 12.7062 * 0.0625 / 2  # t of 1 degree of freedom, times the standard error of two values 1/16 apart
    assert held_out[method][1] == f"{2.0625 + 0.03125:.2f} ± {half:.2f}"
    assert held_out[f"{single}, before"][1:3] == ["4", "3"]
    assert held_out[f"{single}, after"][1:3] == ["2.25", "1.5"]
    assert table(page, "Differences, by seed")[f"{single} − {method}"][:3] == ["1", "+0.1875", "+0.1875"]
    loss = next(rows for caption, rows in _numbers(page).items() if caption.startswith("Loss"))
    assert loss["5"][1] == number(3 - 0.1 - 0.1875, 5), "the ungrouped run's loss at step 5"
    by_task = table(page, "Held out, by task")
    assert by_task["a: facts"] == ["40", "2", "4", "28", *(f"{value} ± 0" for value in ("2", "1", "0.5", "0.5"))]


def _numbers(page: Path) -> dict[str, dict[str, list[str]]]:
    captions = re.findall(r"<caption>([^<]*: the numbers[^<]*)</caption>", page.read_text(encoding="utf-8"))
    return {caption: table(page, caption) for caption in captions}


def test_a_chart_has_its_table(page: Path) -> None:
    assert [unescape(caption).split(":")[0] for caption in _numbers(page)] == [
        *(
            "Loss",
            "Token acceptance rate",
            "Divergence by outcome",
            "TAR by position",
            "TAR by the teacher's entropy",
            "By task",
        )
    ]
    assert {path.name for path in page.parent.glob("*.png")} >= {"loss-1.png", "loss-2.png", "tar-by-position.png"}


def test_a_token_shows_what_is_known_of_it(page: Path) -> None:
    read = re.sub(r"\s+", " ", text_of(page))
    assert "Accepted".lower() in read and "“Rome”" in read
    for said in (
        "0.123",
        "0.250",
        "0.031",
        "0.516",
        "“Paris” 0.625",
        "“Lyon” 0.062",
        "at least 1.66",
        "at least 0.844",
        "1.72",
    ):
        assert said in read, said
    assert "outside its top 5" in read, "a top-K teacher says nothing of the proposal"
    assert "3.25 of 6 supervised tokens accepted (TAR 0.54) by 1[p > q]" in read
    for word in WORDS:
        assert word.strip() in read


def test_evaluations_are_compared_on_shared_examples(page: Path) -> None:
    rows = table(page, "facts: metrics")
    assert rows["accuracy"] == ["0.4 [0.1, 0.7]", "0.7 [0.4, 1]", "10", "completions"]
    gap = table(page, "facts: e1-folder − e0-folder, paired")["accuracy"]
    assert gap[:2] == ["0.4", "0.7"] and gap[2].startswith("+0.3 [") and gap[3] == "10"
    # Of 10 differences three are 1: the bootstrap's mean is a binomial of 10 and 0.3, over 10.
    low, high = (float(end) for end in gap[2].split("[")[1].strip("]").split(", "))
    assert 0 <= low <= 0.1 and 0.55 <= high <= 0.65
    assert table(page, "facts: counts")["e0-folder"] == ["answers", "20", "2", "facts.jsonl", "10", "cd34"]


def test_the_report_has_the_numbers_of_compare(page: Path, tmp_path: Path) -> None:
    """Of every statistic, and of rows with several answers."""
    folders = [write_evaluation(tmp_path / name, right=right) for name, right in (("e0-folder", 4), ("e1-folder", 7))]
    (folders[1] / "examples" / "facts.jsonl").write_text(  # in another order, and one row less
        "".join(reversed((folders[1] / "examples" / "facts.jsonl").read_text().splitlines(keepends=True)[2:]))
    )
    shown = {row["metric"]: row for row in compare(folders)}
    assert set(shown) == {"accuracy", "pass@1", "ece", "seconds"}
    first, second = (read_evaluation(folder, folder.name).tasks[0].answered for folder in folders)
    assert {row["metric"]: row for row in differences(first, second)} == {
        name: {key: value for key, value in row.items() if key not in ("task", "first_folder", "second_folder")}
        for name, row in shown.items()
    }
    assert shown["seconds"]["difference"] == 6 and shown["accuracy"]["n"] == 9
    whole = {row["metric"]: row for row in compare([folders[0], folders[0]])}
    assert all(row["difference"] == row["low"] == row["high"] == 0 for row in whole.values())
    assert set(shown) <= set(table(page, "facts: e1-folder − e0-folder, paired"))


def test_the_same_prompts_stand_side_by_side(page: Path) -> None:
    read = re.sub(r"\s+", " ", text_of(page))
    assert "Row 1: user: Where? Prompt user: Where? Reference Paris e0-folder It is Paris. The first of 2 answers" in read
    assert "of all of them: accuracy 1, pass@1 1, ece 0.25, seconds 10" in read, "a row's own numbers"


def test_tasks_that_cannot_be_paired_say_so(tmp_path: Path) -> None:
    folders = [write_evaluation(tmp_path / name) for name in ("a", "b")]
    path = folders[1] / "examples" / "facts.jsonl"
    path.write_text(path.read_text().replace('"key": "k', '"key": "other'))
    found = tasks_of([read_evaluation(folder, folder.name) for folder in folders])[0]
    assert found.differences == () and found.notes == ("b and a share no example: their kinds, data or tokenizers differ.",)


def test_what_else_differs_is_noted(tmp_path: Path) -> None:
    folders = [write_evaluation(tmp_path / name) for name in ("a", "b")]
    path = folders[1] / "evaluation.json"
    found = json.loads(path.read_text())
    found["settings"]["seed"] = 3
    found["teacher"]["weights"] = "other"
    found["tasks"]["facts"]["options"]["samples"] = 5
    path.write_text(json.dumps(found))
    part = tasks_of([read_evaluation(folder, folder.name) for folder in folders])[0]
    unlike = "their teachers differ; settings.seed is absent in a and 3 in b; facts.samples is 2 in a and 5 in b"
    assert part.notes == (f"b and a are not alike: {unlike}.",)
    assert len(part.differences) == 1


def test_a_benchmark_is_shown_as_it_is(page: Path) -> None:
    whole = page.read_text(encoding="utf-8")
    for number_of_table in (1, 2):
        found = whole.split(f'<caption class="unseen">bench-folder, table {number_of_table}</caption>')[1].split("</table>")[0]
        assert "2.000 ±0.125" in found and "<strong>-0.250</strong> [-0.500, -0.125]*" in found
    read = re.sub(r"\s+", " ", text_of(page))
    assert "NLL of method; bold : clear." in read and "<strong>bold</strong>" in whole
    assert "2 runs: 1 cells" in read and "3.0 minutes" in read
    assert re.search(r"<h4[^>]*>dose</h4>", whole) and re.search(r"<summary[^>]*>warm, method</summary>", whole)
    assert whole.index(">dose</h4>") < whole.index("front-dose.png") < whole.index(">warm, method</summary>"), "in its block"


@pytest.mark.usefixtures("undrawn")
def test_what_is_still_going_on_is_said(tmp_path: Path, capsys) -> None:
    bench, evaluation = write_bench(tmp_path / "bench"), write_evaluation(tmp_path / "evaluation")
    (bench / "results.jsonl").unlink()
    (evaluation / "evaluation.json").unlink()
    assert main(["report", str(bench), str(evaluation), "--output_dir", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("bench: This benchmark has not finished: ") and "1 of its runs" in line]
    assert [line for line in lines if line.startswith("evaluation: This evaluation has not finished: ")]
    assert "This benchmark has not finished" in text_of(tmp_path / "out" / PAGE)
    (tmp_path / "runs" / "run-1").mkdir(parents=True)
    assert "no training_log.jsonl" in refused(capsys, tmp_path, "--output_dir", tmp_path / "out"), "a folder of runs is none"
    (tmp_path / "runs" / "run-1").rmdir()
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    assert "no training_log.jsonl" in refused(capsys, tmp_path, "--output_dir", tmp_path / "out")


def test_runs_are_grouped_by_all_but_their_seeds(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"m-{seed}", seed=seed, bend=seed / 8), f"m-{seed}") for seed in (0, 1, 2)]
    other = [read_run(write_run(tmp_path / f"o-{s}", seed=s, bend=s / 8 + 0.25, gate="none"), f"o-{s}") for s in (0, 1, 2)]
    several = groups([*runs, *other])
    assert [(group.name, len(group.runs)) for group in several] == [("m", 3), ("o", 3)]
    assert paired(*several, "nll") == Estimate(pytest.approx(0.25), pytest.approx(0), 3), "the seeds' own spread cancels"


# ---- what is broken --------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    capsys.readouterr()
    assert main(["report", *map(str, words)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_is_going_on_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "results.json").unlink()
    (run / "config.yaml").write_text("gate: top_k\nseed: 3\n")
    with (run / "training_log.jsonl").open("a") as file:
        file.write('{"step": 45, "lo')
    read = text_of(report([run], tmp_path / "out"))
    assert "This run has not finished" in read and "training_log.jsonl: the last line is cut in two and left out" in read
    assert "top_k" in read


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("results.json", '{"start": ', "results.json: not JSON"),
        ("results.json", '{"start": {}, "steps": "many"}', "results.json: steps is 'many'"),
        ("results.json", "[]", "results.json: not a JSON object"),
        ("training_log.jsonl", '{"step": 1}\nnonsense\n{"step": 2}\n', "training_log.jsonl:2: not JSON"),
        ("training_log.jsonl", '{"loss": 1}\n', "training_log.jsonl:1: step is missing"),
        ("training_log.jsonl", b"\xff\xfe", "training_log.jsonl: not UTF-8"),
        ("tokens.jsonl", '{"format": 7}\n', "format 7 is unknown to this version"),
        ("tokens.jsonl", '{"step": 1, "format": 1, "row": 1, "data": "x", "length": 3}\n', "tokens.jsonl:1: tokens is missing"),
        ("by_task.jsonl", '{"step": 1, "task": 3}\n', "by_task.jsonl:1: task is 3"),
    ],
)
def test_a_damaged_file_is_named(file: str, content: str | bytes, said: str, tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path / "run")
    (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refused(capsys, run, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.iterdir()] == ["run"], "nothing is left behind"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("evaluation.json", '"ratio"', '"mode"', "metrics: accuracy: statistic is 'mode' is unknown to this version"),
        ("evaluation.json", '"completions"]', '"completions", "more"]', "metrics: accuracy: a ratio of 3 columns is unknown"),
        ("evaluation.json", '"kind": "answers"', '"kind": 3', "tasks: facts: kind is 3"),
        ("examples/facts.jsonl", '"tokens": 4', '"tokens": "4"', "facts.jsonl:1: scores: tokens is '4'"),
        ("examples/facts.jsonl", '"key": ', '"k": ', "facts.jsonl:1: key is missing"),
        ("examples/facts.jsonl", '"bins": [', '"bins": [[], ', "facts.jsonl:1: scores: bins is [[], "),
    ],
)
def test_a_damaged_evaluation_is_named(file: str, old: str, new: str, said: str, tmp_path: Path, capsys) -> None:
    path = write_evaluation(tmp_path / "evaluation") / file
    path.write_text(path.read_text().replace(old, new))
    assert said in refused(capsys, tmp_path / "evaluation", "--output_dir", tmp_path / "out")


def test_folders_that_are_none_of_ours_are_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    run = write_run(tmp_path / "run")
    out = ("--output_dir", tmp_path / "out")
    assert "there is no such folder" in refused(capsys, tmp_path / "nowhere", *out)
    assert "no training_log.jsonl, evaluation.json or results.jsonl" in refused(capsys, tmp_path / "empty", *out)
    assert "a folder is given twice" in refused(capsys, run, run, *out)


@pytest.mark.usefixtures("undrawn")
def test_only_a_report_is_written_over(tmp_path: Path, capsys) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "deep" / "out"
    assert main(["report", str(run), "--output_dir", str(out)]) == 0
    assert capsys.readouterr().out == f"The report is in {out / PAGE}.\n"
    before = (out / PAGE).stat().st_ino
    assert main(["report", str(run), "--output-dir", str(out)]) == 0
    assert (out / PAGE).stat().st_ino != before and [path.name for path in out.parent.iterdir()] == ["out"]
    (out / "notes.txt").write_text("mine")
    assert "exists and is no report" in refused(capsys, run, "--output_dir", out)
    assert (out / "notes.txt").read_text() == "mine"
    assert "exists and is no report" in refused(capsys, run, "--output_dir", run)


# ---- secrets ---------------------------------------------------------------------------------------------------------------

CANARIES = {
    "hub_token": "canary-hub-1111",
    "push_to_hub_token": "canary-push-2222",
    "api_key": "canary-api-3333",
    "WANDB_API_KEY": "canary-wandb-4444",
    "teacher_server_urls": ["http://user:canary-5555@teacher.example:8000/v1?token=canary-6666&x=1"],
    "teacher_model_init_kwargs": {"token": "canary-7777", "nested": [{"password": "canary-8888"}]},
    "note": "authorization: Bearer canary-9999",
    "run_name": "with hf_canaryAAAAAAAAAAAAAAAA inside",
    "client_secret": "canary-bbbb",
}


@pytest.mark.usefixtures("undrawn")
def test_no_secret_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "canary-environment-cccc")
    run = write_run(tmp_path / "run", lambda text: f"{text} canary-hub-1111 canary-environment-cccc", **CANARIES)
    out = report([run], tmp_path / "out").parent
    for path in out.iterdir():
        data = path.read_bytes().decode("utf-8", "replace")
        assert "canary" not in data, re.findall(r".{60}canary.{20}", data)[:3]
    assert HIDDEN in text_of(out / PAGE) and "teacher.example:8000" in text_of(out / PAGE), "the rest stays"


def test_what_is_no_secret_stays() -> None:
    kept: dict[str, Any] = {
        "use_cls_token": True,
        "num_memory_tokens": 16,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "teacher_server_tokens": 4096,
        "token_view_samples": 4,
        "hub_token": None,
        "max_new_tokens": 5,
    }
    assert without_secrets(kept) == kept
    assert Shown()("https://example.org/a@b?x=1, tokens: 3") == "https://example.org/a@b?x=1, tokens: 3"
    assert all(map(is_secret_key, ("hub_token", "token", "HF_TOKEN", "api-key", "apiKey", "db_password", "Authorization")))


def test_letters_without_a_shape_are_named() -> None:
    assert Shown()("a\u202eb\x00c\ud800\ufeff\n\t你😀é") == "a‹202E›b‹0000›c‹D800›‹FEFF›\n\t你😀é"
    assert [number(value) for value in (None, float("nan"), 0.0, -1.5, 12345.6, 3.0, 1e-7)] == [
        *("–", "–", "0", "−1.5", "12,346", "3", "1e−07")
    ]
