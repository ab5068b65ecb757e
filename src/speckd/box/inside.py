"""Runs in the box, from its text alone: the program, then each call; the values go out as text of a few exact types.

Nothing here is trusted. The program shares this interpreter and may change any of it, or write answers of its own: they are
still only values, which are compared outside with what never entered.
"""

import json
import os
import sys
import types
from typing import Any

_DEPTH = 60
#: Dictionaries with another way to fill them: `==` compares them as dictionaries, so they go out as such.
_DICTIONARIES = ("collections.Counter", "collections.defaultdict", "collections.OrderedDict")
_MESSAGE = 300


def encode(value: Any, depth: int = 0) -> Any:
    """A plain value as JSON that keeps its exact type; `values.decode` reads it.

    Raises:
        TypeError: something else than plain values, subclasses among them; or nested too deep.
    """
    if depth > _DEPTH:
        raise TypeError("nested too deep")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return ["i", format(value, "x")]
    if kind is float:
        return ["f", value.hex()]
    if kind is complex:
        return ["c", value.real.hex(), value.imag.hex()]
    if kind is bytes:
        return ["b", value.hex()]
    for tag, group in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
        if kind is group:
            return [tag, [encode(item, depth + 1) for item in value]]
    if kind is dict or f"{kind.__module__}.{kind.__qualname__}" in _DICTIONARIES:
        return ["d", [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in dict.items(value)]]
    raise TypeError(f"other type: {kind.__qualname__}"[:_MESSAGE])


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:_MESSAGE]
    except BaseException:
        return type(error).__name__


def _answer(source: str, space: dict[str, Any], most: int) -> dict[str, Any]:
    try:
        told = {"value": encode(eval(compile(source, "<call>", "eval"), space))}
        if len(json.dumps(told)) > most:
            raise TypeError(f"larger than {most} bytes")
    except BaseException as error:
        return {"error": _described(error)}
    return told


def _limit(limits: dict[str, list[int]]) -> None:
    """Only where no box sets them from outside."""
    import resource

    for name, wanted in limits.items():
        which = getattr(resource, name)
        most = resource.getrlimit(which)[1]
        soft, hard = (number if most == resource.RLIM_INFINITY else min(number, most) for number in wanted)
        resource.setrlimit(which, (soft, hard))


def _tell(descriptor: int, told: dict[str, Any]) -> None:
    line = json.dumps(told).encode() + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]


def main() -> None:
    """Reads the job from standard input, and answers on what was standard output; the program sees neither."""
    job = json.loads(sys.stdin.buffer.read())
    answers, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.environ.clear()
    _limit(job["limits"])
    program = types.ModuleType("program")
    sys.modules["program"] = program
    space = program.__dict__
    try:
        for source in (job["program"], job["setup"]):
            exec(compile(source, "<program>", "exec"), space)
    except BaseException as error:
        _tell(answers, {"program": _described(error)})
        return
    for number, source in enumerate(job["calls"]):
        _tell(answers, {"call": number, **_answer(source, space, job["most"])})


if __name__ == "__main__":
    main()
    os._exit(0)
