"""The four data sets of `benchmarks/real_data.py`: which rows are read, and as what."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def sources() -> ModuleType:
    """A script's neighbour, which is no package's module."""
    spec = importlib.util.spec_from_file_location("real_sources", ROOT / "benchmarks" / "real_sources.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "held_out", "count", "prompt", "completion"),
    [
        ("GSM8K", False, 6973, "Question: Natalia sold clips", " Natalia sold 48/2 = <<48/2=24>>24 clips in May."),
        ("GSM8K", True, 500, "Question: ", " "),
        ("MAWPS", False, 1537, "Question: Mary is baking a cake . The recipe wants 8 cups", " 8 - 2 = 6\n#### 6"),
        ("MAWPS", True, 384, "Question: Bryan took a look at his books", " 56 * 9 = 504\n#### 504"),
        ("MBPP", False, 384, "Write a function to find the longest chain", "class Pair(object):\n    def __init__"),
        ("MBPP", True, 90, "Write a python function to find minimum sum of factors", "def find_Min_Sum(num):\n    sum = 0\n"),
        ("Dolly", False, 3912, "Instruction: Alice's parents have three daughters", " The name of the third daughter is Alice"),
        ("Dolly", True, 803, "Instruction: Which of Shakespeare’s plays is the longest?\nResponse:", " Hamlet."),
    ],
)
def test_rows(sources: ModuleType, name: str, held_out: bool, count: int, prompt: str, completion: str) -> None:
    source = sources.SOURCES[name]
    files = (source.held_out,) if held_out else source.train
    if not all((DATA / file).is_file() for file in files):
        pytest.skip(f"{name} is NOT tested: {', '.join(files)} not in ../shared/data")
    rows: list[Mapping[str, Any]] = sources.read(DATA, source, held_out)
    assert len(rows) == count
    assert rows[0]["prompt"].startswith(prompt) and rows[0]["completion"].startswith(completion)
    assert all(row["prompt"].strip() and row["completion"].strip() and "number0" not in row["prompt"] for row in rows)
    if name in ("GSM8K", "MAWPS"):
        assert all("\n#### " in row["completion"] for row in rows)
    if name == "MBPP":  # what its tests need, to run a program that was written
        assert all(row["test_list"] and row["test_list"][0] in row["prompt"] for row in rows)


@pytest.mark.parametrize(
    ("equation", "written"),
    [
        ("- number0 number1", "8 - 2.5"),
        ("* number0 + number1 number2", "8 * (2.5 + 3)"),
        ("/ - number0 number2 100.0", "(8 - 3) / 100"),
    ],
)
def test_equations_as_one_writes_them(sources: ModuleType, equation: str, written: str) -> None:
    assert sources.infix({"Numbers": "8.0 2.5 3.0", "Equation": equation}) == written


def test_the_tokenizer_loses_nothing_and_keeps_digits_apart(sources: ModuleType) -> None:
    text = "Write f(x):\n    return 1234 + x  # é\n#### 12.5"
    tokenizer = sources.train_tokenizer([text] * 3, 300)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and "12" not in tokenizer.convert_ids_to_tokens(ids)
