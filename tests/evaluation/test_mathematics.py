"""Which number an answer gives, and whether it is the right one: sixty outputs, extracted by hand."""

import importlib.util
from pathlib import Path

import pytest

from speckd.errors import DataError
from speckd.evaluation.mathematics import _FLEXIBLE, _STRICT, flexible_answer, normalized, require, score, strict_answer
from speckd.evaluation.options import TaskOptions
from speckd.evaluation.rows import Row, read_rows

SHARED = Path(__file__).parents[3] / "shared" / "data"

#: The output; what is strictly its answer; what is flexibly.
OUTPUTS: list[tuple[str, str | None, str | None]] = [
    ("#### 42", "42", "42"),
    ("He has 3 + 4 = 7.\n#### 7", "7", "7"),
    ("#### -5", "-5", "-5"),
    ("#### 1,234", "1234", "1234"),
    ("#### 1,234,567", "1234567", "1234567"),
    ("#### 3.5", "3.5", "3.5"),
    ("#### 18.", "18", "18"),
    ("#### 18.00", "18.00", "18.00"),
    ("#### $18", None, "18"),
    ("####18", None, "18"),
    ("### 18", None, "18"),
    ("##### 18", "18", "18"),  # four marks and a space are in it
    ("#### 18 dollars", "18", "18"),
    ("#### 18\n\nQuestion: 2 + 2", "18", "2"),
    ("#### 18\n#### 19", "18", "19"),
    ("#### x\n#### 19", "19", "19"),
    ("The answer is 42", None, "42"),
    ("The answer is 42.", None, "42"),
    ("The answer is $42.", None, "42"),
    ("The answer is $1,042.50.", None, "1042.50"),
    ("The answer is -42", None, "-42"),
    ("The answer is 4-2", None, "-2"),
    ("The answer is 10-12", None, "-12"),
    ("7", None, "7"),
    ("-7", None, "-7"),
    ("7.", None, "7"),
    ("7,", None, "7"),
    ("0", None, "0"),
    ("007", None, "007"),
    ("1/2", None, "2"),
    ("3/4 of 8 is 6", None, "6"),
    ("50%", None, "50"),
    ("50 %.", None, "50"),
    ("12:30", None, "30"),
    ("$5 and $6", None, "6"),
    ("$5", None, "5"),
    ("5$", None, "5"),
    ("x = 12", None, "12"),
    ("x=12\ny=13", None, "13"),
    ("1e5", None, "5"),
    ("1 000", None, "000"),
    ("two", None, None),
    ("", None, None),
    ("   ", None, None),
    ("no number here.", None, None),
    ("#### ", None, None),
    ("####", None, None),
    ("#### forty", None, None),
    ("\\boxed{42}", None, "42"),
    ("**42**", None, "42"),
    ("<<3+4=7>>7", None, "7"),
    ("3+4=<<3+4=7>>7 apples\n#### 7", "7", "7"),
    ("Answer: 42\n", None, "42"),
    ("I think 3, 4 and 5", None, "5"),
    ("3.14.15", None, "3.14.15"),
    ("The total is 12,", None, "12"),
    ("42 apples...", None, ".."),  # three dots are taken for the last number, and one of them is left out
    ("42 apples, $", None, "42"),
    ("٤٢", None, None),
    ("#### 2.5\nThat is 2.5 hours.", "2.5", "2.5"),
]


def test_there_are_sixty() -> None:
    assert len(OUTPUTS) == 60 and len({output for output, _, _ in OUTPUTS}) == 60


@pytest.mark.parametrize(("output", "strict", "flexible"), OUTPUTS, ids=[repr(each[0])[:40] for each in OUTPUTS])
def test_the_answer_of_an_output(output: str, strict: str | None, flexible: str | None) -> None:
    assert (strict_answer(output), flexible_answer(output)) == (strict, flexible)


@pytest.mark.parametrize(
    ("reference", "completion", "strict", "flexible"),
    [
        ("3 * 4 = 12\n#### 12", " 3 * 4 = 12\n#### 12", True, True),
        ("#### 1,200", "It is $1200.", False, True),
        ("1200", "#### 1,200", True, True),
        ("#### 12", "12 apples and 3 pears", False, False),
        ("#### 12", "#### 12\nAnd 3 more", True, False),
        ("#### 18", "#### 18.00", False, False),  # compared as texts, as lm-eval does
        ("#### 12", "", False, False),
    ],
)
def test_right_and_wrong(reference: str, completion: str, strict: bool, flexible: bool) -> None:
    scores, more = score(Row(0, "?", reference, {}), completion)
    assert (scores["strict"], scores["flexible"]) == (strict, flexible)
    assert set(more["extracted"]) == {"strict", "flexible"}


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: equality with it NOT tested")
def test_it_is_what_lm_eval_extracts_and_compares() -> None:
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    filters = {"strict": RegexFilter(_STRICT.pattern), "flexible": RegexFilter(_FLEXIBLE.pattern, group_select=-1)}
    ignored = [",", "\\$", "(?s).*#### ", "\\.$"]
    for output, _, _ in OUTPUTS:
        for reference in ("#### 42", "7", "#### 1,234", "#### 18"):
            scores, _ = score(Row(0, "?", reference, {}), output)
            for name, each in filters.items():
                found = next(iter(each.apply([[output]], [{}])))[0]
                wanted = exact_match_hf_evaluate([found], [reference], ignored, ignore_case=True)["exact_match"]
                assert scores[name] == bool(wanted), (name, output, reference)


def test_normalised_as_lm_evals_ignored_patterns_say() -> None:
    assert normalized("so\n#### $1,234.") == "1234"


@pytest.mark.parametrize(
    "reference",
    [
        "18",
        "-5",
        "3.5",
        ".5",
        "18.00",
        "1,234,567",
        "$1,042.50",
        "-$18",
        "7.",
        " 18\n",
        "7 + 8 = 15\n#### 15",
        "#### -1,234.5 ",
    ],
)
def test_a_reference_that_is_taken_can_be_matched(reference: str) -> None:
    row = Row(0, "?", reference, {})
    require("t", row)
    number = reference.rpartition("#### ")[2].strip()
    assert score(row, f"It is {number}")[0]["flexible"] and score(row, f"#### {number.replace('$', '')}")[0]["strict"]


@pytest.mark.parametrize(
    "reference",
    ["The answer is 18", "x #### 18 apples", "####18", "#### ", "forty", "1/2", "50%", "1e5", "5-2", ".", "٤٢", "1 000"],
)
def test_a_reference_that_nothing_can_match_is_refused(reference: str) -> None:
    for _, *found in OUTPUTS:
        assert normalized(reference) not in found, "no output gives it"
    with pytest.raises(DataError, match=r"^tasks: t: row 3: the reference .* is no number.* Write the number alone"):
        require("t", Row(2, "?", reference, {}))


@pytest.mark.parametrize("file", ["gsm8k/train.jsonl", "gsm8k/dev.jsonl", "mawps/cv_fold0_train.csv", "mawps/cv_fold0_dev.csv"])
def test_every_reference_of_the_known_sets_is_taken(file: str) -> None:
    if not (SHARED / file).is_file():
        pytest.skip(f"NOT TESTED: {file} is not in ../shared/data")
    for row in read_rows("t", TaskOptions(kind="math", data=str(SHARED / file)))[1]:
        require("t", row)
