"""Takes a test apart: what runs inside the box, and what is compared outside. Nothing of the test is executed by Python.

A small interpreter walks the test twice. The first time it writes down each call of the program, with its arguments and
nothing else, and does not know what comes back; the second time it knows. What stands around those calls (the expected value,
the comparison, a tolerance) is computed here, from literals and the functions in `known`, and never enters the box.
"""

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from speckd.box.expressions import Expressions, Names, TestFails, part
from speckd.box.operators import COMPUTE, NotJudgeable
from speckd.box.sources import UNKNOWN, Inside

__all__ = ["NotJudgeable", "Reading", "TestFails"]


class _Return(Exception):
    pass


@dataclass
class Reading(Expressions):
    """One walk through a test's statements. `asserts` counts those that depend on the program."""

    asserts: int = 0

    def run(self, statements: Sequence[ast.stmt]) -> None:
        """Walks through the statements.

        Raises:
            NotJudgeable: one of them cannot be taken apart.
            TestFails: an assert does not hold.
        """
        try:
            self._block(statements, {})
        except _Return:
            return
        except RecursionError:
            raise NotJudgeable("it is nested too deep") from None

    def helper(self, function: ast.FunctionDef, values: list[Any]) -> Any:
        """As `Expressions.helper`."""
        try:
            self._block(function.body, dict(zip([a.arg for a in function.args.args], values, strict=True)))
        except _Return as back:
            return back.args[0]
        return None

    def _block(self, statements: Sequence[ast.stmt], names: Names) -> None:
        for statement in statements:
            read = self._STATEMENTS.get(type(statement), Reading._refuse)
            read(self, statement, names)

    def _refuse(self, node: ast.stmt, names: Names) -> None:
        raise NotJudgeable(f"it holds `{ast.unparse(node)[:80]}`")

    def _assert(self, node: ast.Assert, names: Names) -> None:
        before = len(self.calls)
        held = self.outside(self.value(node.test, names))
        self.asserts += len(self.calls) > before
        if held is not UNKNOWN and not held:
            raise TestFails(f"`{ast.unparse(node.test)[:200]}` does not hold{self._seen(before)}")

    def _seen(self, since: int) -> str:
        found = [o.value for o in (self.answers or [])[since : len(self.calls)] if o.kind == "value"]
        return f": the program gives {', '.join(map(_shortened, found))}" if found else ""

    def _assign(self, node: ast.Assign, names: Names) -> None:
        found = self.value(node.value, names)
        for target in node.targets:
            self.bind(target, found, names)

    def _augment(self, node: ast.AugAssign, names: Names) -> None:
        if not isinstance(node.target, ast.Name):
            self._refuse(node, names)
        old = self.value(ast.Name(node.target.id, ast.Load()), names) if isinstance(node.target, ast.Name) else None
        self.bind(node.target, self.compute(COMPUTE.get(type(node.op)), [old, self.value(node.value, names)]), names)

    def _loop(self, node: ast.For, names: Names) -> None:
        if node.orelse:
            self._refuse(node, names)
        for item in self.items(node.iter, names):
            self.bind(node.target, item, names)
            self._block(node.body, names)

    def _branch(self, node: ast.If, names: Names) -> None:
        self._block(node.body if self.decided(node.test, names) else node.orelse, names)

    def _return(self, node: ast.Return, names: Names) -> None:
        raise _Return(None if node.value is None else self.value(node.value, names))

    def _import(self, node: ast.Import, names: Names) -> None:
        for alias in node.names:
            names[alias.asname or alias.name] = self.module(alias.name)

    def _import_from(self, node: ast.ImportFrom, names: Names) -> None:
        for alias in node.names:
            names[alias.asname or alias.name] = part(self.module(node.module or ""), alias.name)

    def _bare(self, node: ast.Expr, names: Names) -> None:
        """Of the program's calls only those count that something is done with; what one changes in place is not seen here."""
        if isinstance(self.value(node.value, names), Inside):
            self._refuse(node, names)

    def _nothing(self, node: ast.stmt, names: Names) -> None:
        pass

    _STATEMENTS: ClassVar[dict[type[ast.stmt], Callable[["Reading", Any, Names], None]]] = {
        ast.Assert: _assert,
        ast.Assign: _assign,
        ast.AugAssign: _augment,
        ast.For: _loop,
        ast.If: _branch,
        ast.Return: _return,
        ast.Import: _import,
        ast.ImportFrom: _import_from,
        ast.Expr: _bare,
        ast.Pass: _nothing,
    }


def _shortened(value: Any) -> str:
    return "a large int" if isinstance(value, int) and value.bit_length() > 4096 else repr(value)[:120]
