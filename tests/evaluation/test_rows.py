"""The known data sets as they are: prompts and references."""

from pathlib import Path
from typing import Any

import pytest

from speckd.errors import DataError
from speckd.evaluation.options import TaskOptions
from speckd.evaluation.rows import read_rows
from tests.tiny import write_rows

SHARED = Path(__file__).parents[3] / "shared" / "data"
QUESTION = "Question: {}\nAnswer:"


def rows(path: Path, **options: Any) -> list[Any]:
    return read_rows("t", TaskOptions(kind="math", data=str(path), **options))[1]


@pytest.mark.parametrize(
    ("fields", "prompt", "reference"),
    [
        ({"question": "2 + 2?", "answer": "#### 4"}, QUESTION.format("2 + 2?"), "#### 4"),
        ({"prompt": "a", "completion": " b"}, "a", " b"),
        ({"prompt": "a", "output": "b"}, "a", "b"),
        ({"instruction": "Do.", "response": "b"}, "### Instruction:\nDo.\n\n### Response:\n", "b"),
        ({"instruction": "Do.", "input": "it", "output": "b"}, "### Input:\nit\n\n### Response:\n", "b"),
        ({"text": "a b"}, "", "a b"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            [{"role": "user", "content": "a"}],
            "b",
        ),
        ({"prompt": "a", "answer": 4}, "a", "4"),
    ],
)
def test_shapes(tmp_path: Path, fields: dict[str, Any], prompt: Any, reference: str) -> None:
    found = rows(write_rows(tmp_path / "data.jsonl", [fields]))[0]
    assert found.prompt == prompt or (isinstance(prompt, str) and prompt and found.prompt.endswith(prompt))
    assert found.reference == reference


def test_mawps_gets_its_numbers_back(tmp_path: Path) -> None:
    path = tmp_path / "cv.csv"
    path.write_text('Question,Numbers,Equation,Answer\n"number0 and number1 , or number10 ?",56.0 9.5,+ number0 number1,65.0\n')
    found = rows(path)[0]
    assert (found.prompt, found.reference) == (QUESTION.format("56 and 9.5 , or number10 ?"), "65")


def test_a_csv_line_with_too_few_cells_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cv.csv"
    path.write_text("prompt,completion\na,b\nc\n")
    with pytest.raises(DataError, match=r"cv\.csv:3: not as many cells"):
        rows(path)


def test_solved_examples_stand_before_each_prompt(tmp_path: Path) -> None:
    shots = write_rows(tmp_path / "shots.jsonl", [{"question": f"q{n}", "answer": f"a{n}"} for n in range(3)])
    asked = write_rows(tmp_path / "data.jsonl", [{"question": "q", "answer": "a"}])
    found = rows(asked, few_shot=2, few_shot_data=str(shots))[0]
    assert found.prompt == "Question: q0\nAnswer: a0\n\nQuestion: q1\nAnswer: a1\n\nQuestion: q\nAnswer:"


def test_a_template_and_columns_of_ones_own(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"q": "2{2}", "gold": "4"}])
    assert rows(data, prompt_template="{{x}} {q}:", reference_column="gold")[0].prompt == "{x} 2{2}:"
    assert rows(data, prompt_column="q", reference_column="gold")[0].reference == "4"


def test_a_text_may_be_begun(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"text": "Once upon  a time\nthere was"}])
    found = rows(data, prompt_words=3)[0]
    assert (found.prompt, found.reference) == ("Once upon  a", " time\nthere was") and found.answered() == found.fields["text"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gsm8k/dev.jsonl", 500),
        ("mawps/cv_fold0_dev.csv", 384),
        ("dolly/dev.jsonl", 1000),
        ("dolly/train.jsonl", 3912),
        ("tinystories/dev.jsonl", 200),
    ],
)
def test_the_real_files(name: str, count: int) -> None:
    if not (SHARED / name).is_file():
        pytest.skip(f"NOT TESTED: {name} is not in ../shared/data")
    found = rows(SHARED / name)
    assert (
        len(found) == count and all(row.reference for row in found) and "number0" not in "".join(str(r.prompt) for r in found)
    )
