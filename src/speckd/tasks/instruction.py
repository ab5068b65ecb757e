"""Instruction following on a list of words: one or two operations, the result as words."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from speckd.tasks.example import Example
from speckd.tasks.vocabulary import NOUNS

OPENERS = ("", "please", "now", "task :")
LEAD_INS = ("", "ok :", "here :", "result :")
#: level -> (fewest words, most words, fewest operations, most operations)
LEVELS = {1: (3, 4, 1, 1), 2: (3, 5, 1, 2), 3: (5, 7, 2, 2)}


@dataclass(frozen=True)
class Operation:
    """`text`: how it is asked; `apply`: words -> words."""

    text: str
    apply: Callable[[list[str]], list[str]]


def _draw_operation(rng: random.Random, words: list[str], last: bool) -> Operation:
    """One operation that makes sense for the list as it is now; counting and picking only as the last one."""
    kinds = ["reverse", "sort", "uppercase", "drop", "swap", "replace"] + (["nth", "count"] if last else [])
    kind = rng.choice(kinds)
    if kind == "reverse":
        return Operation("reverse the list", lambda w: w[::-1])
    if kind == "sort":
        return Operation("sort the list", lambda w: sorted(w, key=str.lower))
    if kind == "uppercase":
        return Operation("uppercase the list", lambda w: [x.upper() for x in w])
    if kind == "swap":
        return Operation("swap first and last", lambda w: [w[-1], *w[1:-1], w[0]] if len(w) > 1 else w)
    if kind == "drop":
        gone = rng.choice(words).lower()
        return Operation(f"drop {gone}", lambda w: [x for x in w if x.lower() != gone])
    if kind == "replace":
        old, new = rng.choice(words).lower(), rng.choice(NOUNS)
        return Operation(f"replace {old} with {new}", lambda w: [_like(x, new) if x.lower() == old else x for x in w])
    if kind == "nth":
        place = rng.randint(1, len(words))
        return Operation(f"give word {place}", lambda w: w[place - 1 : place])
    return Operation("count the words", lambda w: [str(len(w))])


def _like(word: str, new: str) -> str:
    return new.upper() if word.isupper() else new


def make(rng: random.Random, level: int) -> Example:
    fewest, most, low, high = LEVELS[level]
    words = rng.sample(NOUNS, rng.randint(fewest, most))
    count = rng.randint(low, high)
    told, result = [], list(words)
    for i in range(count):
        operation = _draw_operation(rng, result, last=i == count - 1)
        told.append(operation.text)
        result = operation.apply(result)
    core = f"{' then '.join(told)} : {' '.join(words)}"
    prompt = f"{rng.choice(OPENERS)} {core} ="
    completion = f"{rng.choice(LEAD_INS)} {' '.join(result)}"
    return Example("instruction", level, core, " ".join(prompt.split()), " ".join(completion.split()), result)


def verify(example: Example, completion: str) -> bool:
    """The words after any known lead-in are the operations' result."""
    words = completion.split()
    for lead_in in LEAD_INS:
        if lead_in and words[: len(lead_in.split())] == lead_in.split():
            words = words[len(lead_in.split()) :]
            break
    return words == example.answer
