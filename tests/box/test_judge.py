"""What of a test enters the box and what stays outside, and what counts as equal."""

import ast
from collections.abc import Sequence
from typing import Any

import pytest

from speckd.box import Box, Outcome, Problem, judge, pass_at_k, problem, problem_prompt, unjudgeable
from speckd.box.equality import equal
from speckd.errors import ConfigError, DataError


class Fixed:
    """Answers each call with what a function of its text gives; keeps all that would have entered the box."""

    def __init__(self, *values: Any) -> None:
        self.values, self.entered = values, ""

    def run(self, program: str, calls: Sequence[str], setup: str = "") -> list[Outcome]:
        self.entered += program + setup + "".join(calls)
        return [Outcome("value", value) for value in self.values]


def row(*tests: str, code: str = "def f(x): ...", setup: str = "") -> dict[str, Any]:
    return {"task_id": 1, "text": "Do it.", "code": code, "test_list": list(tests), "test_setup_code": setup}


def test_a_wrong_answer_that_cannot_be_written_is_wrong() -> None:
    """Python refuses to write an int of more than 4,300 digits, and a reason tells what came back."""
    for value in (10**5000, [10**5000], {"a": (10**5000,)}):
        verdict = judge(problem(row("assert f(1) == 2")), "def f(x): pass", Fixed(value))
        assert verdict.judgeable and not verdict.passed and "large int" in verdict.reason


def test_a_row_of_human_evals_shape_needs_its_prompt() -> None:
    fields = {name: value for name, value in human("    assert candidate(1) == 2").items() if name != "prompt"}
    with pytest.raises(DataError, match="neither"):
        problem(fields)


def human(test: str, prompt: str = 'def f(x):\n    """Adds one."""\n') -> dict[str, Any]:
    return {"task_id": "T/1", "prompt": prompt, "entry_point": "f", "test": f"def check(candidate):\n{test}"}


@pytest.mark.parametrize(
    ("test", "calls", "right", "wrong"),
    [
        ("assert f(1) == 7654321", ["f(1)"], [7654321], [7654320]),
        ("assert (f([1, (2, None)])) == {'a': 7654321}", ["f([1, (2, None,)])"], [{"a": 7654321}], [{"a": 1}]),
        ("assert 7654321 == f(1)", ["f(1)"], [7654321], [1]),
        ("assert f(1) != 7654321", ["f(1)"], [1], [7654321]),
        ("assert f(1) is None", ["f(1)"], [None], [0]),
        ("assert f(1) is True", ["f(1)"], [True], [1]),
        ("assert f(1) is not None", ["f(1)"], [0], [None]),
        ("assert not f(1)", ["f(1)"], [[]], [[0]]),
        ("assert f(1)", ["f(1)"], [1], [0]),
        ("assert f(1) in (7654321, 5)", ["f(1)"], [7654321], [6]),
        ("assert 7654321 in f(1)", ["f(1)"], [[7654321]], [[1]]),
        ("assert math.isclose(f(1), 7654321.5)", ["f(1)"], [7654321.5000001], [7654321.6]),
        ("assert math.isclose(f(1), 7654321.5, rel_tol=0.1)", ["f(1)"], [7654322.0], [1.0]),
        ("assert abs(f(1) - 7654321) < 1e-6", ["f(1)"], [7654321.0], [7654322.0]),
        ("assert set(f(1)) == set([7654321, 2])", ["set(f(1))"], [{2, 7654321}], [{2}]),
        ("assert sorted(f(1)) == [1, 7654321]", ["sorted(f(1))"], [[1, 7654321]], [[1]]),
        ("assert round(f(1), 2) == 7654321.5", ["f(1)"], [7654321.501], [1.0]),
        ("assert len(f('ab')) == 7", ["f('ab')"], ["1234567"], ["1"]),
        ("assert int(f(5, 3)) == 7654321", ["f(5, 3)"], [7654321.9], [7654320.9]),
        ("assert f(1) == 7654321 and f(2) == 3", ["f(1)", "f(2)"], [7654321, 3], [7654321, 4]),
        ("assert f(1) == 7654321 or f(2) == 3", ["f(1)", "f(2)"], [0, 3], [0, 4]),
        ("assert 0 < f(1) <= 7654321", ["f(1)"], [7654321], [7654322]),
        ("assert f(lambda y: y + 1) == 7654321", ["f((lambda y: y + 1))"], [7654321], [0]),
        ("assert f(x=[int, float]) == 7654321", ["f(x=[int, float])"], [7654321], [0]),
        ("assert f(*[1, 2]) == 7654321", ["f(1, 2)"], [7654321], [0]),
        ("assert [f(n) for n in range(2)] == [7654321, 1]", ["f(0)", "f(1)"], [7654321, 1], [1, 1]),
        ("assert f(float('-inf')) == 'x' * 3 + '7654321'", ["f(float('-inf'))"], ["xxx7654321"], ["x"]),
        ("x = f(2)\nassert x == 7654321", ["f(2)"], [7654321], [1]),
        ("for n in range(2):\n    assert f(n) == n + 7654321", ["f(0)", "f(1)"], [7654321, 7654322], [7654321, 1]),
        ("assert isinstance(f(1), list)", ["f(1)"], [[]], [()]),
        ("assert type(f(1)) is int", ["f(1)"], [1], [True]),
        ("assert f(1)[0] == 7654321", ["f(1)[0]"], [7654321], [1]),
        ("assert f(1).upper() == '7654321'", ["f(1).upper()"], ["7654321"], ["a"]),
    ],
)  # fmt: skip
def test_what_enters_and_what_is_compared(test: str, calls: list[str], right: list[Any], wrong: list[Any]) -> None:
    given = problem(row(test))
    assert given.calls() == calls
    good, bad = Fixed(*right), Fixed(*wrong)
    assert judge(given, "def f(x): pass", good).passed and not judge(given, "def f(x): pass", bad).passed
    assert "7654321" not in good.entered and "1e-6" not in good.entered


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ("assert True", "no assert depends on the program"),
        ("assert f(1) == open('x').read()", "nothing is known of `open`"),
        ("assert f(1) == g(2)", "compares the program with itself"),
        ("assert f(1) == f(2)", "compares the program with itself"),
        ("import os\nassert f(1) == os.getpid()", "it imports os"),
        ("assert f(1) == 2 ** 10 ** 9", "a large power"),
        ("assert f(1) == [0] * 10 ** 8", "a long sequence"),
        ("assert f(1) == list(range(10 ** 9))", "a long range"),
        ("assert f(1) == 1 << 10 ** 9", "a large power"),
        ("assert f(1) == ''.__class__", "it uses __class__"),
        ("assert f(1) == 1 / 0", "it fails by itself"),
        ("x = [3, 1]\nf(x)\nassert x == [1, 3]", "it holds `f(x)`"),
        ("if f(1):\n    assert f(2) == 3", "depends on the program"),
        ("while True:\n    assert f(2) == 3", "it holds `while"),
        ("assert f(1) is [1]", "the same object"),
        ("assert 1 == 2", "fails whatever the program does"),
        ("with f(1) as x:\n    pass", "it holds `with"),
        ("assert f(1) == [x for x in range(10**6) for y in range(10**6)]", "too many steps"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_apart_never_passes(test: str, why: str) -> None:
    given = problem(row(test))
    assert why in str(unjudgeable(given))
    verdict = judge(given, "def f(x): pass", Fixed(1, 1))
    assert not verdict.passed and not verdict.judgeable and why in verdict.reason


@pytest.mark.parametrize(
    ("test", "calls", "right", "wrong"),
    [
        ("    assert candidate(1) == 2, 'adds'\n    assert candidate(5) == 6\n", ["f(1)", "f(5)"], [2, 6], [2, 5]),
        ("    assert True, 'a comment'\n    assert candidate([1.5]) == 2 / 3\n", ["f([1.5])"], [2 / 3], [0.6667]),
        ("    for x in (2, 4):\n        assert candidate(x, 9) == str(x)\n", ["f(2, 9)", "f(4, 9)"], ["2", "4"], ["2", "2"]),
        ("    import math\n    assert math.fabs(candidate(2) - 1.5) < 1e-4\n", ["f(2)"], [1.50001], [1.51]),
        ("    assert tuple(candidate([3])) == tuple(f([3]))\n", ["tuple(f([3]))"] * 2, [(1,), (1,)], [(1,), (2,)]),
        ("    import copy\n    y = []\n    for _ in 'ab':\n        y.append(3)\n    assert candidate(copy.copy(y)) == sum(y)\n",
         ["f([3, 3])"], [6], [7]),
        ("    from random import Random\n    r = Random(42)\n    assert candidate(r.randint(5, 5)) == 3\n", ["f(5)"], [3], [5]),
    ],
)  # fmt: skip
def test_the_shape_of_human_eval(test: str, calls: list[str], right: list[Any], wrong: list[Any]) -> None:
    given = problem(human(test))
    assert given.calls() == calls
    assert judge(given, "    return x + 1", Fixed(*right)).passed and not judge(given, "    return x", Fixed(*wrong)).passed


def test_a_helper_of_the_prompt_is_computed_outside(box: Box) -> None:
    """A program may redefine the function that turns the input round; the judge uses the task's own."""
    helper = "def encode(s):\n    return ''.join([chr((ord(c) - 97 + 5) % 26 + 97) for c in s])\n\n\n"
    prompt = helper + 'def f(s):\n    """Undoes it."""\n'
    test = (
        "    from random import randint, choice\n    import string\n    for _ in range(9):\n"
        "        s = ''.join(choice(string.ascii_lowercase) for i in range(randint(4, 9)))\n"
        "        coded = encode(s)\n        assert candidate(coded) == s\n"
    )
    given = problem(human(test, prompt))
    right = "    return ''.join(chr((ord(c) - 97 - 5) % 26 + 97) for c in s)\n"
    assert len(given.calls()) == 9 and judge(given, right, box).passed
    assert not judge(given, "    return s\n\ndef encode(s):\n    return s\n", box).passed


def test_a_body_or_a_whole_function_may_follow_the_prompt(box: Box) -> None:
    given = problem(human("    assert candidate(1) == 2\n"))
    bodies = (
        "    return x + 1",
        "    return x + 1\n\nprint(f(1))\nclass A:",
        "```python\ndef f(x):\n    return x + 1\n```",
        "def f(x):\n    return x + 1\n",
    )
    assert [judge(given, body, box).reason for body in bodies] == [""] * 4
    assert not judge(given, "    return x", box).passed and not judge(given, "", box).passed


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1, 1.0, True), (True, 1, False), (False, 0, False), (True, True, True), ([True], [1], False), ((1,), [1], False),
        ({1, 2}, {2, 1}, True), ({True}, {1}, False), (float("nan"), float("nan"), False), (0.0, -0.0, True),
        ({True: 0}, {1: 0}, False),
        ("a", b"a", False), ([(1, {2: [False]})], [(1, {2: [0]})], False), (None, False, False), (1, 1 + 0j, True),
        (frozenset({1}), {1}, True), ([], [], True), ({"a": True}, {"a": True}, True),
    ],
)  # fmt: skip
def test_equal_is_that_of_python_but_for_truth(one: Any, other: Any, same: bool) -> None:
    assert equal(one, other) is same and equal(other, one) is same


def test_the_prompts_are_those_of_the_field() -> None:
    wanted = (
        "You are an expert Python programmer, and here is your task: Do it. Your code should pass these tests:\n\n"
        "assert f(1) == 2\nassert f(2) == 3\n[BEGIN]\n"
    )
    assert problem_prompt(row("assert f(1) == 2", "assert f(2) == 3")) == wanted
    assert problem_prompt(human("    assert candidate(1) == 2\n")) == 'def f(x):\n    """Adds one."""\n'


def test_hidden_tests_are_judged_when_asked_for(box: Box) -> None:
    given = {**row("assert f(1) == 1"), "challenge_test_list": ["assert f(2) == 4"]}
    assert judge(problem(given), "def f(x): return x", box).passed
    assert not judge(problem(given, challenge=True), "def f(x): return x", box).passed


def test_setup_runs_after_the_program(box: Box) -> None:
    given = problem(row("assert f(root) == 3", setup="root = Node(3)"))
    assert judge(given, "class Node:\n    def __init__(self, v): self.v = v\ndef f(n): return n.v", box).passed


@pytest.mark.parametrize(
    "broken", [{}, {"task_id": 3, "test_list": ["assert"], "text": "x"}, {"test_list": []}, {**human(""), "test": "x = 1"}]
)
def test_a_row_of_another_shape_is_named(broken: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="Task"):
        problem(broken)


@pytest.mark.parametrize("given", ["import math", [["import math"]], [3], {"a": "import math"}])
@pytest.mark.parametrize("key", ["test_list", "test_imports", "challenge_test_list"])
def test_what_must_be_a_list_of_texts_is_no_text(key: str, given: Any) -> None:
    with pytest.raises(DataError, match=rf"^Task 1: {key} is .*import math|^Task 1: {key} is \[3\]. Give a list of texts: \["):
        problem({**row("assert f(1) == 1"), key: given}, challenge=True)


@pytest.mark.parametrize(("n", "c", "k"), [(10, 0, 1), (10, 3, 1), (10, 3, 5), (5, 5, 5), (6, 2, 5), (200, 7, 100)])
def test_pass_at_k_is_the_share_of_draws_with_a_hit(n: int, c: int, k: int) -> None:
    """Against the product form, and where it is small against all draws."""
    from itertools import combinations

    product = 1.0
    for i in range(n - c + 1, n + 1):
        product *= max(0.0, 1 - k / i)
    assert pass_at_k(n, c, k) == pytest.approx(1 - product)
    if n <= 10:
        draws = list(combinations(range(n), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(min(draw) < c for draw in draws) / len(draws))


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_pass_at_k_of_too_few_is_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ConfigError, match="not defined"):
        pass_at_k(n, c, k)


def test_the_tests_are_never_run_by_python() -> None:
    """What a row says is read, not executed: in the parent, nothing but literals and a list of functions is computed."""
    for text in ("assert f(1) == __import__('os').system('x')", "assert f(1) == (lambda: 3)()", "assert f(1) == eval('1')"):
        given = Problem("1", "", "", "", tuple(ast.parse(text).body), {"f": "f"}, {})
        assert unjudgeable(given)
