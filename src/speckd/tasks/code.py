"""`def f ( xs ) :` from a description, as a comprehension or a loop; checked by running it on five inputs."""

import random
from collections.abc import Callable

from speckd.tasks.example import Example
from speckd.tasks.vocabulary import INDENT, NEWLINE

#: level -> which parts a task may have: (filter and map together, a final step)
LEVELS = {1: (False, False), 2: (True, False), 3: (True, True)}
NAMES = ("x", "y", "n", "item")
RESULTS = ("out", "r", "acc")
INPUTS = 5

Map = tuple[str, str, Callable[[int], int]]
Filter = tuple[str, str, Callable[[int], bool]]


def _draw_map(rng: random.Random) -> Map:
    k = rng.randint(2, 12)
    kind = rng.choice(("add", "subtract", "multiply"))
    if kind == "add":
        return f"add {k} to each", f"+ {k}", lambda x: x + k
    if kind == "subtract":
        return f"subtract {k} from each", f"- {k}", lambda x: x - k
    return f"multiply each by {k}", f"* {k}", lambda x: x * k


def _draw_filter(rng: random.Random, alone: bool) -> Filter:
    k = rng.randint(2, 18)
    kind = rng.choice(("above", "below") if alone else ("above", "below", "even", "odd"))  # "even" alone would be one task only
    if kind == "above":
        return f"keep only above {k}", f"> {k}", lambda x: x > k
    if kind == "below":
        return f"keep only below {k}", f"< {k}", lambda x: x < k
    wanted = 0 if kind == "even" else 1
    return f"keep only {kind}", f"% 2 == {wanted}", lambda x: x % 2 == wanted


FINALS: tuple[tuple[str, str, Callable[[list[int]], object]], ...] = (
    ("sum", "sum", sum),
    ("count", "len", len),
    ("sort", "sorted", sorted),
    ("reverse", "reversed", lambda values: values[::-1]),
)


def _program(rng: random.Random, body: str, condition: str, final: str) -> str:
    """One of two ways to write it, with names at random. `body`: "+ 3" or ""; `condition`: "> 5" or ""."""
    name, result = rng.choice(NAMES), rng.choice(RESULTS)
    value, test = f"{name} {body}".strip(), f"{name} {condition}"
    if rng.random() < 0.5:
        filtered = f" if {test}" if condition else ""
        returned = f"[ {value} for {name} in xs{filtered} ]"
        return f"return {_finish(returned, final)}"
    lines = [f"{result} = [ ]", f"for {name} in xs :"]
    if condition:
        lines += [f"{INDENT} if {test} :", f"{INDENT} {INDENT} {result} += [ {value} ]"]
    else:
        lines += [f"{INDENT} {result} += [ {value} ]"]
    lines.append(f"return {_finish(result, final)}")
    return " ".join(f"{NEWLINE} {INDENT} {line}" for line in lines)


def _finish(value: str, final: str) -> str:
    if final == "reversed":
        return f"[ {NAMES[0]} for {NAMES[0]} in reversed ( {value} ) ]"
    return f"{final} ( {value} )" if final else value


def make(rng: random.Random, level: int) -> Example:
    both, may_finish = LEVELS[level]
    parts = rng.choice(("map", "filter", "both") if both else ("map", "filter"))
    told, body, change = _draw_map(rng) if parts != "filter" else ("", "", lambda x: x)
    kept, condition, test = _draw_filter(rng, parts == "filter") if parts != "map" else ("", "", lambda x: True)
    final_told, final, finish = rng.choice(FINALS) if may_finish else ("", "", list)
    core = " then ".join(part for part in (kept, told, final_told) if part)
    inputs = [[rng.randint(0, 20) for _ in range(rng.randint(1, 6))] for _ in range(INPUTS - 1)] + [[]]
    pairs = [[xs, finish([change(x) for x in xs if test(x)])] for xs in inputs]
    opener = rng.choice(("write python", "python :", "please write"))
    prompt = f"{opener} {core} . def f ( xs ) :"
    return Example("code", level, core, prompt, _program(rng, body, condition, final), pairs)


def source(completion: str) -> str:
    """The completion's words as Python: the newline and indent words become white space."""
    text = f"def f ( xs ) : {completion}".replace(NEWLINE, "\n").replace(INDENT, "    ")
    return "\n".join(line[: len(line) - len(line.lstrip())] + " ".join(line.split()) for line in _aligned(text))


def _aligned(text: str) -> list[str]:
    """Spaces between words are no indentation: each line gets four per indent word."""
    lines = []
    for line in text.split("\n"):
        depth = (len(line) - len(line.lstrip(" "))) // 5
        lines.append("    " * depth + line.strip())
    return lines
