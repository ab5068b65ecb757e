"""pass@k of programs that run in the box, and what is refused where there is none."""

import json
from pathlib import Path
from typing import Any

import pytest

from speckd.box import Box, Unboxed
from speckd.cli import main
from speckd.evaluation import programs
from speckd.evaluation.journal import encoded
from speckd.evaluation.options import TaskOptions
from speckd.evaluation.rows import Row, read_rows
from speckd.evaluation.statistics import value
from speckd.evaluation.sums import columns
from tests.tiny import write_model, write_rows

MBPP = {
    "task_id": 1,
    "text": "Double a number.",
    "code": "def double(x):\r\n    return 2 * x",
    "test_setup_code": "",
    "test_list": ["assert double(2) == 4", "assert double(-1) == -2"],
}
HUMAN_EVAL = {
    "task_id": "H/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}
MISSING = Box().missing()


def row(fields: dict[str, Any]) -> Row:
    return Row(0, "?", None, fields)


@pytest.mark.skipif(MISSING is not None, reason=f"programs in the box NOT tested: {MISSING}")
@pytest.mark.parametrize(
    ("fields", "completion", "passed", "words"),
    [
        (MBPP, "def double(x):\n    return 2 * x\n", True, "passed"),
        (MBPP, "Sure:\n```python\ndef double(x):\n    return x + x\n```", True, "passed"),
        (MBPP, "def double(x):\n    return x ** 2\n", False, "double(-1)"),
        (MBPP, "", False, "double"),
        (HUMAN_EVAL, "    return x + x\n", True, "passed"),
        (HUMAN_EVAL, "    return 4.5\n", False, "gives 4.5"),
    ],
)
def test_a_program_is_run_and_judged(fields: dict[str, Any], completion: str, passed: bool, words: str) -> None:
    scores, more = programs.score(Box(), row(fields), completion)
    assert scores == {"passed": passed} and words in more["verdict"]


def test_half_a_character_of_a_programs_error_is_kept() -> None:
    program = "def double(x):\n    raise ValueError('\\ud800 \\xe9')\n"
    _, more = programs.score(Unboxed(), row(MBPP), program)
    assert "\ud800 \xe9" in more["verdict"] and json.loads(encoded(more)) == more


def test_what_cannot_be_judged_counts_for_nothing() -> None:
    fields = MBPP | {"test_list": ["assert True"]}
    scores, more = programs.score(Unboxed(), row(fields), "def double(x): ...")
    assert scores == {} and more["verdict"].startswith("not judgeable")
    lines = [line(0, passed=True), line(0, passed=False), line(1)]
    assert programs.counts(lines) == {"judged": 1, "not_judgeable": 1, "run_without_box": 0}
    assert value(programs.metrics([1])[0], list(columns(lines).values())) == 0.5


def line(index: int, **scores: Any) -> dict[str, Any]:
    return {"index": index, "key": str(index), "scores": scores}


def test_pass_at_k_is_the_mean_of_the_problems_estimates() -> None:
    passed = {0: [True, False, False, False], 1: [True, True, False, False], 2: [False] * 4}
    examples = list(columns([line(n, passed=each) for n, all_of_it in passed.items() for each in all_of_it]).values())
    one, two = (value(metric, examples) for metric in programs.metrics([1, 2]))
    assert one == pytest.approx((1 / 4 + 2 / 4) / 3) and two == pytest.approx(((1 - 3 / 6) + (1 - 1 / 6)) / 3)


def test_prompts_and_references_of_both_shapes(tmp_path: Path) -> None:
    mbpp = read_rows("t", TaskOptions(kind="code", data=str(write_rows(tmp_path / "a.jsonl", [MBPP]))))[1][0]
    assert "assert double(2) == 4" in mbpp.prompt and mbpp.prompt.endswith("[BEGIN]\n")
    assert mbpp.answered().endswith("[BEGIN]\ndef double(x):\n    return 2 * x\n[DONE]")
    human = read_rows("t", TaskOptions(kind="code", data=str(write_rows(tmp_path / "b.jsonl", [HUMAN_EVAL]))))[1][0]
    assert human.answered() == HUMAN_EVAL["prompt"] + HUMAN_EVAL["canonical_solution"]


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    model, data = write_model(tmp_path / "model", seed=0), write_rows(tmp_path / "data.jsonl", [MBPP])
    given = f"--model_name_or_path {model} --output_dir {tmp_path / 'out'} --task code --data {data} --device cpu"
    return [*given.split(), "--max_new_tokens", "4"]


def test_without_a_box_nothing_is_generated(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Box, "missing", lambda self: "no namespaces here")
    assert main(["evaluate", *flags]) == 2
    assert "no namespaces here" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["evaluate", *flags, "--i-accept-unsandboxed-code"]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["tasks"]["code"]["counts"]["run_without_box"] == 1
    assert "no box can be had here: the model's programs run with your rights" in capsys.readouterr().err


def test_the_acceptance_belongs_to_code(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["math" if word == "code" else word for word in flags]
    assert main(["evaluate", *flags, "--i-accept-unsandboxed-code"]) == 2
    assert "there is no task of kind code" in capsys.readouterr().err


def test_more_passes_than_samples_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *flags, "--pass_at", "1", "10"]) == 2
    assert "pass@10 of 1 samples. Set samples: 10" in capsys.readouterr().err


def test_a_row_that_is_no_problem_is_named(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "data.jsonl", [MBPP, {**MBPP, "test_list": ["assert double(2 =="]}])
    assert main(["evaluate", *flags]) == 2
    assert "row 2: Task 1: its tests are no Python" in capsys.readouterr().err
    write_rows(tmp_path / "data.jsonl", [MBPP, {**MBPP, "test_list": "assert double(2) == 4"}])
    assert main(["evaluate", *flags]) == 2
    said = capsys.readouterr().err
    assert "row 2: Task 1: test_list is 'assert double(2) == 4'. Give a list of texts" in said and said.count("\n") == 1
