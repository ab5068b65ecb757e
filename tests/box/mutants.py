"""Small changes to a program, each of which should be noticed by its tests."""

import ast
import copy
from collections.abc import Iterator

from speckd.box.parsing import parsed

_OTHER: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


def mutants(program: str) -> Iterator[tuple[str, str]]:
    """(what was changed, the program) for every constant, comparison and return, in the order of the text."""
    tree = parsed(program)
    for number, node in enumerate(ast.walk(tree)):
        if isinstance(node, ast.Constant | ast.Compare | ast.Return) and not _is_docstring(tree, node):
            changed = copy.deepcopy(tree)
            what = _change(list(ast.walk(changed))[number])
            if what:
                yield f"line {getattr(node, 'lineno', 0)}: {what}", ast.unparse(ast.fix_missing_locations(changed))


def _is_docstring(tree: ast.AST, node: ast.AST) -> bool:
    return any(isinstance(one, ast.Expr) and one.value is node for one in ast.walk(tree))


def _change(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return _change_constant(node)
    if isinstance(node, ast.Compare):
        node.ops = [_OTHER[type(node.ops[0])](), *node.ops[1:]]
        return "a comparison turned round"
    if isinstance(node, ast.Return) and node.value is not None:
        node.value = ast.Tuple([node.value, ast.Constant("mutant")], ast.Load())
        return "another return"
    return ""


def _change_constant(node: ast.Constant) -> str:
    old = node.value
    if isinstance(old, bool):
        node.value = not old
    elif isinstance(old, int | float | complex):
        node.value = old + 1
    elif isinstance(old, str):
        node.value = old + "~"
    else:
        return ""
    return f"{old!r} became {node.value!r}"
