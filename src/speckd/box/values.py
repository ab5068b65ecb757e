"""Reads what the box sends: JSON that names each value's exact type, and nothing that could run."""

from typing import Any

_DEPTH = 64
_FLOAT = 40
_GROUPS = {"l": list, "t": tuple, "s": set, "z": frozenset}


def decode(told: Any, depth: int = 0) -> Any:
    """The plain value that `inside.encode` wrote. The text is of a program's making and may be anything.

    Raises:
        ValueError: it is not of that form, or nested too deep.
    """
    if depth > _DEPTH:
        raise ValueError("nested too deep")
    if told is None or isinstance(told, bool | str):
        return told
    match told:
        case ["i", str(digits)]:
            return int(digits, 16)
        case ["f", str(number)]:
            return _real(number)
        case ["c", str(real), str(imaginary)]:
            return complex(_real(real), _real(imaginary))
        case ["b", str(digits)]:
            return bytes.fromhex(digits)
        case ["l" | "t" | "s" | "z" as tag, list(items)]:
            return _hashed(lambda: _GROUPS[tag]([decode(item, depth + 1) for item in items]))
        case ["d", list(pairs)] if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            return _hashed(lambda: {decode(key, depth + 1): decode(item, depth + 1) for key, item in pairs})
    raise ValueError("no value of a known type")


def _real(number: str) -> float:
    if len(number) > _FLOAT:
        raise ValueError("no number")
    try:
        return float.fromhex(number)
    except OverflowError:
        raise ValueError("no number") from None


def _hashed(make: Any) -> Any:
    try:
        return make()
    except TypeError:
        raise ValueError("a key that cannot be one") from None
