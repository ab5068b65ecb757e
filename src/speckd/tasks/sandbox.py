"""Runs small programs that a model wrote. First a whitelist of syntax, then real Python in a child with tight limits.

This guards against what these tiny families can express; it is not a box for arbitrary programs.
"""

import ast
import json
import subprocess
import sys
from typing import Any

_NODES = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.AugAssign, ast.For, ast.If, ast.Expr,
    ast.Call, ast.Name, ast.Load, ast.Store, ast.Constant, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Mod, ast.UnaryOp,
    ast.USub, ast.Compare, ast.Gt, ast.Lt, ast.Eq, ast.GtE, ast.LtE, ast.NotEq, ast.List, ast.ListComp, ast.GeneratorExp,
    ast.comprehension,
)  # fmt: skip
_CALLS = {"sum", "len", "sorted", "reversed"}
_TIMEOUT_S = 20

# The child limits itself before it reads a program: 2 s of CPU, 256 MiB, no files, no processes.
_CHILD = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (2, 2))
resource.setrlimit(resource.RLIMIT_AS, (256 << 20, 256 << 20))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
jobs = json.load(sys.stdin)
builtins = {name: getattr(__builtins__, name) for name in ("sum", "len", "sorted", "reversed")}
answers = []
for code, inputs in jobs:
    try:
        scope = {"__builtins__": builtins}
        exec(compile(code, "<program>", "exec"), scope)
        values = [scope["f"](list(xs)) for xs in inputs]
        json.dumps(values)
    except Exception:
        values = None
    answers.append(values)
print(json.dumps(answers))
"""


def allowed(code: str) -> bool:
    """Only one function `f`, a few kinds of expression, four known calls; integers below 100; no attribute, no import."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef) or tree.body[0].name != "f":
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _CALLS):
            return False
        if isinstance(node, ast.Constant) and not (type(node.value) is int and 0 <= node.value < 100):
            return False
        if isinstance(node, ast.Name) and node.id.startswith("_"):
            return False
    return True


def run(jobs: list[tuple[str, list[list[int]]]]) -> list[list[Any] | None]:
    """For each (program, inputs), the outputs of `f` as JSON values, or None where it was refused, failed or ran too long.

    One child runs them all; where it dies, each program gets a child of its own.
    """
    safe = [i for i, (code, _) in enumerate(jobs) if allowed(code)]
    answers: list[list[Any] | None] = [None] * len(jobs)
    found = _child([jobs[i] for i in safe])
    if found is None:
        found = [(_child([jobs[i]]) or [None])[0] for i in safe]
    for i, answer in zip(safe, found, strict=True):
        answers[i] = answer
    return answers


def _child(jobs: list[tuple[str, list[list[int]]]]) -> list[list[Any] | None] | None:
    if not jobs:
        return []
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env={},
            check=False,
        )
        answers = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        return None
    return answers if isinstance(answers, list) and len(answers) == len(jobs) else None


def same(found: object, wanted: object) -> bool:
    """Equal in value and in type: True is not 1, 1.0 is not 1."""
    return type(found) is type(wanted) and json.dumps(found) == json.dumps(wanted)
