"""Rows of MBPP's and of HumanEval's shape as problems: a prompt, and tests that were taken apart."""

import ast
import builtins
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speckd.box.asserts import NotJudgeable, Reading, TestFails
from speckd.box.outcomes import Outcome
from speckd.box.parsing import parsed
from speckd.errors import DataError

_MBPP = """\
You are an expert Python programmer, and here is your task: {task} Your code should pass these tests:

{tests}
[BEGIN]
"""


@dataclass(frozen=True)
class Problem:
    """A task for a program, and its tests.

    Args:
        name: the row's task_id.
        prompt: what the model is asked.
        start: text that the program begins with; the completion follows it.
        setup: what runs in the box after the program, before the calls.
        tests: statements, never executed: `asserts` reads them.
        inside: name in the tests -> name in the program, of what the tests may call there.
        helpers: functions of the prompt that the tests use, computed outside.
    """

    name: str
    prompt: str
    start: str
    setup: str
    tests: tuple[ast.stmt, ...]
    inside: Mapping[str, str]
    helpers: Mapping[str, ast.FunctionDef]

    def calls(self) -> list[str]:
        """The expressions that run inside.

        Raises:
            NotJudgeable: a test cannot be taken apart, or none depends on the program.
        """
        reading = Reading(self.inside, self.helpers)
        try:
            reading.run(self.tests)
        except TestFails as error:
            raise NotJudgeable(f"it fails whatever the program does: {error}") from None
        if not reading.asserts:
            raise NotJudgeable("no assert depends on the program")
        return reading.calls

    def compare(self, outcomes: Sequence[Outcome]) -> None:
        """Holds what came back against the tests.

        Args:
            outcomes: of `calls`, in their order.

        Raises:
            TestFails: one does not hold.
            NotJudgeable: one cannot be decided from what came back.
        """
        Reading(self.inside, self.helpers, outcomes).run(self.tests)


def problem(row: Mapping[str, Any], challenge: bool = False) -> Problem:
    """A row as a problem.

    Args:
        row: of MBPP's shape (`text` or `prompt`, `code`, `test_list`, `test_setup_code` or `test_imports`), or of HumanEval's
            (`prompt`, `entry_point`, `test`).
        challenge: MBPP's `challenge_test_list`, too, which the prompt does not show.

    Raises:
        DataError: neither shape, or its tests are no Python.
    """
    name = str(row.get("task_id", "without task_id"))
    try:
        if {"prompt", "entry_point", "test"} <= row.keys():
            return _human_eval(row, name)
        if "test_list" in row:
            return _mbpp(row, name, challenge)
    except (SyntaxError, ValueError) as error:
        raise DataError(f"Task {name}: its tests are no Python ({error})", "Mend or leave out this row.") from None
    raise DataError(
        f"Task {name} has neither `test_list` nor `prompt`, `entry_point` and `test`",
        "Give rows of MBPP's or of HumanEval's shape.",
    )


def problem_prompt(row: Mapping[str, Any]) -> str:
    """What a model is asked: MBPP's own words with the tests but no examples, or HumanEval's prompt as it is."""
    return problem(row).prompt


def unjudgeable(given: Problem) -> str | None:
    """Why the tests cannot be taken apart into calls and expected values; None where they can."""
    try:
        given.calls()
    except NotJudgeable as error:
        return str(error)
    return None


def _mbpp(row: Mapping[str, Any], name: str, challenge: bool) -> Problem:
    shown = _texts(row, name, "test_list", "assert f(2) == 4")
    hidden = _texts(row, name, "challenge_test_list", "assert f(2) == 4") if challenge else []
    tests = tuple(statement for test in [*shown, *hidden] for statement in parsed(test).body)
    setup = str(row.get("test_setup_code") or "").replace("\r\n", "\n")
    imports = "".join(f"{line}\n" for line in _texts(row, name, "test_imports", "import math"))
    task = str(row.get("text") or row.get("prompt") or "").strip()
    if not task:
        raise DataError(f"Task {name} has neither `text` nor `prompt`", "Give rows of MBPP's shape.")
    reference = str(row.get("code") or "").replace("\r\n", "\n")
    return Problem(
        name=name,
        prompt=_MBPP.format(task=task, tests="\n".join(shown)),
        start=imports,
        setup=setup,
        tests=tests,
        inside=_program_names(tests, reference, setup),
        helpers={},
    )


def _texts(row: Mapping[str, Any], name: str, key: str, example: str) -> list[str]:
    """Of a list that may be missing; one text alone would be read letter by letter."""
    texts = row.get(key) or []
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"Task {name}: {key} is {texts!r:.60}", f"Give a list of texts: {json.dumps([example])}")
    return [text.replace("\r\n", "\n") for text in texts]


def _program_names(tests: Sequence[ast.stmt], reference: str, setup: str) -> dict[str, str]:
    """What the reference and the set-up define; also what a test calls and Python does not know."""
    definitions = [node for node in parsed(reference).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    defined = {node.name for node in definitions}
    stored = [node for node in ast.walk(parsed(setup)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    defined |= {node.id for node in stored}
    called = [node.func for test in tests for node in ast.walk(test) if isinstance(node, ast.Call)]
    defined |= {name.id for name in called if isinstance(name, ast.Name) and not hasattr(builtins, name.id)}
    return {found: found for found in defined}


def _human_eval(row: Mapping[str, Any], name: str) -> Problem:
    prompt, entry = str(row["prompt"]).replace("\r\n", "\n"), str(row["entry_point"])
    module = parsed(str(row["test"]).replace("\r\n", "\n")).body
    checks = [node for node in module if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if len(checks) != 1 or len(checks[0].args.args) != 1:
        raise DataError(f"Task {name}: `test` has no `check(candidate)`", "Give HumanEval's form.")
    before = [node for node in module if isinstance(node, ast.Import | ast.ImportFrom)]
    functions = [node for node in [*parsed(prompt).body, *module] if isinstance(node, ast.FunctionDef)]
    return Problem(
        name=name,
        prompt=prompt,
        start=prompt,
        setup="",
        tests=(*before, *checks[0].body),
        inside={checks[0].args.args[0].arg: entry, entry: entry},
        helpers={node.name: node for node in functions if node.name not in (entry, "check")},
    )
