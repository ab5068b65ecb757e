"""When two plain values are equal."""

from typing import Any

_TRUTH = {True: object(), False: object()}


def equal(found: Any, wanted: Any) -> bool:
    """Python's `==` on values of builtin types, but that True is not 1 and False is not 0, at any depth.

    So 1 equals 1.0 and 0.0 equals -0.0, because reference solutions rely on it; a list is no tuple; NaN equals nothing, itself
    included, because the two sides never share an object.
    """
    return bool(_marked(found) == _marked(wanted))


def _marked(value: Any) -> Any:
    """The value with each bool replaced by something that equals no number."""
    if type(value) is bool:
        return _TRUTH[value]
    if isinstance(value, list | tuple):
        return type(value)(_marked(item) for item in value)
    if isinstance(value, dict):
        return {_marked(key): _marked(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return frozenset(_marked(item) for item in value)
    return value
