"""What a test may use outside of the box: builtins and parts of modules that compute on plain values and touch nothing."""

import copy
import math
import random
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from speckd.box.operators import NotJudgeable

_LARGEST = 1_000_000


@dataclass(frozen=True)
class Known:
    """A function or type that a test may call: its name in the test, and what it is."""

    name: str
    act: Callable[..., Any]


def _range(*bounds: int) -> range:
    found = range(*bounds)
    if len(found) > _LARGEST:
        raise NotJudgeable("it needs a long range")
    return found


def _small(act: Callable[..., Any]) -> Callable[..., Any]:
    def limited(*numbers: int) -> Any:
        if any(abs(n) > 1000 for n in numbers):
            raise NotJudgeable("it needs a combination of more than 1000")
        return act(*numbers)

    return limited


BUILTINS = {
    act.__name__: Known(act.__name__, act)
    for act in (
        abs, all, any, bin, bool, bytes, chr, complex, dict, divmod, enumerate, float, frozenset, hex, int, isinstance, len,
        list, max, min, oct, ord, repr, reversed, round, set, sorted, str, sum, tuple, type, zip,
    )
} | {"range": Known("range", _range)}  # fmt: skip
#: With one value from inside as their argument they are part of what runs inside: they turn iterators into plain values.
GATHERING = {"list", "tuple", "set", "frozenset", "sorted", "dict"}


def modules() -> dict[str, dict[str, Any]]:
    """Module -> what of it may be used. Random numbers are the same each time that this is called."""
    draws = random.Random(0)
    functions = {name: value for name, value in vars(math).items() if not name.startswith("_")}
    functions |= {name: _small(functions[name]) for name in ("factorial", "comb", "perm")}
    drawing = {
        n: getattr(draws, n) for n in ("choice", "randint", "random", "randrange", "sample", "shuffle", "uniform", "seed")
    }
    return {
        "math": functions,
        "random": {**drawing, "Random": random.Random},
        "string": {name: value for name, value in vars(string).items() if isinstance(value, str) and name.isidentifier()},
        "copy": {"copy": copy.copy, "deepcopy": copy.deepcopy},
        "sys": {"getsizeof": sys.getsizeof, "maxsize": sys.maxsize},
    }


#: type -> its methods that may be used.
METHODS: dict[type, set[str]] = {
    str: {
        "count", "endswith", "find", "index", "isalpha", "isdigit", "join", "lower", "lstrip", "replace", "rstrip", "split",
        "startswith", "strip", "title", "upper",
    },
    list: {"append", "copy", "count", "extend", "index", "insert", "pop", "remove", "reverse", "sort"},
    tuple: {"count", "index"},
    dict: {"copy", "get", "items", "keys", "values"},
    set: {"add", "copy", "difference", "intersection", "issubset", "union"},
    random.Random: {"choice", "randint", "random", "randrange", "sample", "shuffle", "uniform"},
}  # fmt: skip
