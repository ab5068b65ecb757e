"""The task families: deterministic, disjoint, verified by program; and the box that runs programs."""

import json
import subprocess
import sys
from itertools import islice

import pytest

from speckd.errors import ConfigError
from speckd.tasks import FAMILIES, build_tokenizer, code, distinct, generate, sandbox, stream, verify_all
from speckd.tasks.vocabulary import words


@pytest.mark.parametrize("level", [1, 2, 3])
def test_every_reference_verifies_and_survives_the_tokenizer(level) -> None:
    tokenizer = build_tokenizer()
    examples = list(islice(stream("train", level), 300))
    known = set(words())
    assert all(set(f"{e.prompt} {e.completion}".split()) <= known for e in examples)
    assert all(verify_all(examples, [tokenizer.decode(tokenizer(e.completion).input_ids) for e in examples]))


def test_wrong_completions_do_not_verify() -> None:
    examples = list(islice(stream("test", 2), 150))
    shifted = [*(e.completion for e in examples[3:]), *(e.completion for e in examples[:3])]  # another task's answer
    right = sum(verify_all(examples, shifted))
    assert right <= 6  # two tasks may share an answer
    assert not any(verify_all(examples, [""] * len(examples)))
    cut = [" ".join(e.completion.split()[:-1]) for e in examples]
    assert sum(verify_all(examples, cut)) == 0


def test_other_wordings_of_a_right_answer_verify() -> None:
    math = generate("math", "test", 0)
    assert verify_all([math], [f"so #### {math.answer}"]) == [True]
    assert verify_all([math], [f"#### {math.answer} apples"]) == [False]
    instruction = generate("instruction", "test", 0)
    assert verify_all([instruction], ["result : " + " ".join(instruction.answer)]) == [True]
    program = generate("code", "test", 0)
    renamed = program.completion
    for name in code.NAMES:
        renamed = " ".join("acc" if word == name else word for word in renamed.split())
    assert verify_all([program], [renamed if "acc" not in program.completion else program.completion]) == [True]


def test_an_example_is_a_function_of_its_arguments() -> None:
    for family in FAMILIES:
        assert generate(family, "test", 5, 2, 7) == generate(family, "test", 5, 2, 7)
        assert generate(family, "test", 5, 2, 7) != generate(family, "test", 5, 2, 8)


def test_splits_share_no_task() -> None:
    cores = {split: {e.core for e in islice(stream(split, 2), 1500)} for split in ("train", "validation", "test")}
    assert sum(len(own) for own in cores.values()) > 3000
    assert (
        not cores["train"] & cores["test"]
        and not cores["train"] & cores["validation"]
        and not cores["validation"] & cores["test"]
    )


def test_distinct_examples_are_distinct_and_even() -> None:
    found = distinct("test", 90)
    assert len({e.core for e in found}) == 90 and all(sum(e.family == f for e in found) == 30 for f in FAMILIES)
    with pytest.raises(ConfigError, match="code has fewer than"):
        distinct("test", 90, level=1)
    with pytest.raises(ConfigError, match="'maths' is not a family"):
        generate("maths", "test", 0)


NASTY = {
    "import": "import os\ndef f(xs):\n    return 1",
    "call of open": "def f(xs):\n    return open('/etc/passwd')",
    "attribute": "def f(xs):\n    return xs.__class__",
    "eval": "def f(xs):\n    return eval(1)",
    "power": "def f(xs):\n    return 9 ** 9 ** 9",
    "while": "def f(xs):\n    while 1:\n        xs += [1]",
    "lambda": "def f(xs):\n    return (lambda: 1)()",
    "decorator call": "@len\ndef f(xs):\n    return 1",
    "string": "def f(xs):\n    return 'a'",
    "big number": "def f(xs):\n    return 1000",
    "default": "def f(xs, y=len([1])):\n    return y",
    "two statements": "def f(xs):\n    return 1\nf([])",
    "dunder name": "def f(xs):\n    return __builtins__",
    "syntax": "def f(xs) return",
}


@pytest.mark.parametrize("name", NASTY)
def test_what_the_whitelist_does_not_know_is_not_run(name) -> None:
    if name in ("decorator call", "default"):
        assert sandbox.run([(NASTY[name], [[1]])]) in ([None], [[1]])  # harmless if it runs: only the four known calls exist
    else:
        assert not sandbox.allowed(NASTY[name]) and sandbox.run([(NASTY[name], [[1]])]) == [None]


def test_a_program_that_never_ends_or_eats_memory_fails_alone() -> None:
    endless = "def f(xs):\n    for x in xs:\n        xs += [x]\n    return xs"
    good = "def f(xs):\n    return [x + 1 for x in xs]"
    assert sandbox.allowed(endless)
    assert sandbox.run([(good, [[1]]), (endless, [[1]]), (good, [[2]])]) == [[[2]], None, [[3]]]


def test_outputs_are_compared_by_exact_type() -> None:
    assert sandbox.same([1], [1]) and not sandbox.same(True, 1) and not sandbox.same([True], [1]) and not sandbox.same(1.0, 1)
    example = next(e for e in stream("test", 3, families=["code"]) if "count" in e.core)
    lying = "return len ( [ 1 for x in xs ] ) > 0"
    assert verify_all([example], [lying]) == [False]


def test_the_files_are_written_once(tmp_path) -> None:
    command = [
        sys.executable,
        "-m",
        "speckd.tasks",
        "--out",
        str(tmp_path / "data"),
        "--train",
        "9",
        "--validation",
        "3",
        "--test",
        "3",
    ]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 9 and rows[0].keys() == {"prompt", "completion", "family"}
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert again.returncode == 2 and "not an empty folder" in again.stderr and "Traceback" not in again.stderr
