"""Stories of two to four steps, answered by a chain of thought that ends in `#### n`."""

import random

from speckd.tasks.example import Example
from speckd.tasks.vocabulary import ITEMS, NAMES

#: level -> (fewest steps, most steps)
LEVELS = {1: (2, 2), 2: (2, 3), 3: (3, 4)}
LIMIT = 99


def _draw_step(rng: random.Random, have: int) -> tuple[str, str, int]:
    """(what happens, sign, by how much), keeping the running number between 0 and 99."""
    choices = []
    if have + 2 <= LIMIT:
        choices += ["gain", "gain"]
    if have >= 2:
        choices += ["lose", "lose"]
    if 0 < have * 2 <= LIMIT:
        choices.append("double")
    if 0 < have * 3 <= LIMIT:
        choices.append("triple")
    kind = rng.choice(choices)
    if kind == "gain":
        amount = rng.randint(2, min(20, LIMIT - have))
        return f"{rng.choice(('buys', 'finds'))} {amount} more", "+", amount
    if kind == "lose":
        amount = rng.randint(2, min(20, have))
        return f"{rng.choice(('gives', 'loses'))} {amount} away", "-", amount
    return ("doubles that", "*", 2) if kind == "double" else ("triples that", "*", 3)


def _think(rng: random.Random, steps: list[tuple[int, str, int, int]]) -> str:
    """The chain of thought in one of three phrasings."""
    phrasing = rng.randrange(3)
    names = {"+": "plus", "-": "minus", "*": "times"}
    if phrasing == 0:
        return " ".join(f"{a} {sign} {b} = {c} ." for a, sign, b, c in steps)
    if phrasing == 1:
        return " ".join(f"so {a} {names[sign]} {b} is {c} ." for a, sign, b, c in steps)
    return f"start with {steps[0][0]} . " + " ".join(f"{sign} {b} makes {c} ." for _, sign, b, c in steps)


def make(rng: random.Random, level: int) -> Example:
    name, items, have = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(2, 40)
    sentences, steps = [f"{name} has {have} {items} ."], []
    for _ in range(rng.randint(*LEVELS[level])):
        text, sign, amount = _draw_step(rng, have)
        after = have + amount if sign == "+" else have - amount if sign == "-" else have * amount
        sentences.append(f"{name} {text} .")
        steps.append((have, sign, amount, after))
        have = after
    core = f"{' '.join(sentences)} how many {items} does {name} have ?"
    opener = rng.choice(("", "now", "please"))
    return Example("math", level, core, f"{opener} {core}".strip(), f"{_think(rng, steps)} #### {have}", have)


def verify(example: Example, completion: str) -> bool:
    """What follows the last `####` is exactly the number."""
    return completion.rsplit("####", maxsplit=1)[-1].split() == [str(example.answer)] and "####" in completion
