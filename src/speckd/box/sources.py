"""Values of a test that are not plain: what only the program can compute, and what is not known yet; and all as text."""

import math
from dataclasses import dataclass
from typing import Any

from speckd.box.known import BUILTINS, Known
from speckd.box.operators import NotJudgeable


@dataclass(frozen=True)
class Inside:
    """An expression that only the program can compute."""

    source: str


class Unknown:
    """What comes back from the box, before it was asked."""


UNKNOWN = Unknown()


def unknown(value: Any) -> bool:
    """Whether it is, or holds, what is not known yet."""
    if isinstance(value, list | tuple):
        return any(map(unknown, value))
    return value is UNKNOWN


def source(value: Any) -> str:
    """A value as the text of an expression that gives it, or its copy, inside.

    Raises:
        NotJudgeable: it has no such text.
    """
    if isinstance(value, Inside):
        return value.source
    if isinstance(value, Known) and BUILTINS.get(value.name) == value:
        return value.name
    if isinstance(value, list | tuple | set | frozenset | dict):
        return _group(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    raise NotJudgeable(f"it gives the program a {type(value).__name__}")


def _group(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{source(key)}: {source(item)}" for key, item in value.items()) + "}"
    items = ", ".join(source(item) for item in value)
    if isinstance(value, list):
        return f"[{items}]"
    if isinstance(value, tuple):
        return f"({items},)" if items else "()"
    return f"{type(value).__name__}([{items}])"
