"""The operators of a test, on plain values; those that could make something large are bounded."""

import ast
import operator
from collections.abc import Callable
from typing import Any

from speckd.box.equality import equal

Operation = Callable[[Any, Any], Any]
_LARGEST, _BITS = 1_000_000, 1 << 16


class NotJudgeable(Exception):
    """A test that cannot be taken apart; says why."""


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > _BITS:
        raise NotJudgeable("it needs a large power")
    return base**exponent


def _product(left: Any, right: Any) -> Any:
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str | bytes | list | tuple) and isinstance(times, int) and len(sequence) * times > _LARGEST:
            raise NotJudgeable("it needs a long sequence")
    return left * right


def _shift(left: int, right: int) -> int:
    if right > _BITS:
        raise NotJudgeable("it needs a large power")
    return left << right


def _within(item: Any, group: Any) -> bool:
    if isinstance(group, str | bytes | range):
        return item in group
    return any(equal(item, one) for one in group)


def one_of_a_kind(sides: tuple[Any, Any]) -> bool:
    """Whether `is` means something between them: None, True, False and types exist once, and are the same after a journey."""
    return any(side is None or isinstance(side, bool | type) for side in sides)


COMPUTE: dict[type[ast.operator], Operation] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: _product, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: _power, ast.LShift: _shift, ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
}  # fmt: skip
SIGN: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert,
}  # fmt: skip
#: A negation holds only where Python's own does, too: True is not 1 here, but `!= 1` does not hold for it either.
COMPARE: dict[type[ast.cmpop], Operation] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: equal,
    ast.NotEq: lambda left, right: not equal(left, right) and left != right,
    ast.In: _within,
    ast.NotIn: lambda left, right: not _within(left, right) and left not in right,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
