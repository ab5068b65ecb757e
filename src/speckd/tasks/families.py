"""All three families behind two functions: make an example, check completions."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count

from speckd.errors import ConfigError
from speckd.tasks import code, instruction, mathematics, sandbox
from speckd.tasks.example import Example, Split, split_of

FAMILIES = ("instruction", "math", "code")
_MAKE: dict[str, Callable[[random.Random, int], Example]] = {
    "instruction": instruction.make,
    "math": mathematics.make,
    "code": code.make,
}
LEVELS = (1, 2, 3)


def generate(family: str, split: Split, index: int, level: int = 2, seed: int = 0) -> Example:
    """Example number `index` of a split: a pure function of its arguments.

    Raises:
        ConfigError: an unknown family or level.
    """
    if family not in FAMILIES:
        raise ConfigError(f"'{family}' is not a family of tasks", f"Valid: {', '.join(FAMILIES)}")
    if level not in LEVELS:
        raise ConfigError(f"level {level} does not exist", f"Valid: {', '.join(map(str, LEVELS))}")
    for attempt in count():
        rng = random.Random(f"{seed}/{split}/{family}/{level}/{index}/{attempt}")
        example = _MAKE[family](rng, level)
        if split_of(example.core) == split:
            return example
    raise AssertionError("unreachable")


def stream(split: Split, level: int = 2, seed: int = 0, families: Sequence[str] = FAMILIES) -> Iterator[Example]:
    """Without end, one family after the other."""
    for i in count():
        yield generate(families[i % len(families)], split, i // len(families), level, seed)


def distinct(split: Split, count: int, level: int = 2, seed: int = 0) -> list[Example]:
    """The first `count` examples of a split, as many of each family, no task twice: for measuring.

    Raises:
        ConfigError: a family has fewer tasks at this level (easy code has some dozens).
    """
    found: dict[str, Example] = {}
    for place, family in enumerate(FAMILIES):
        wanted = count // len(FAMILIES) + (place < count % len(FAMILIES))
        own: dict[str, Example] = {}
        for i in range(100 * wanted):
            if len(own) == wanted:
                break
            example = generate(family, split, i, level, seed)
            own.setdefault(example.core, example)
        else:
            raise ConfigError(
                f"{family} has fewer than {wanted} tasks in {split} at level {level}", "Ask for fewer, or a higher level"
            )
        found |= own
    return list(found.values())


def verify_all(examples: Sequence[Example], completions: Sequence[str]) -> list[bool]:
    """Whether each completion is right, by program; all code runs in one child process."""
    verdicts = [False] * len(examples)
    coded = [i for i, example in enumerate(examples) if example.family == "code"]
    jobs = [(code.source(completions[i]), [xs for xs, _ in examples[i].answer]) for i in coded]  # type: ignore[attr-defined]
    for i, outputs in zip(coded, sandbox.run(jobs), strict=True):
        wanted = [output for _, output in examples[i].answer]  # type: ignore[attr-defined]
        verdicts[i] = outputs is not None and all(map(sandbox.same, outputs, wanted))
    for i, (example, completion) in enumerate(zip(examples, completions, strict=True)):
        if example.family == "instruction":
            verdicts[i] = instruction.verify(example, completion)
        elif example.family == "math":
            verdicts[i] = mathematics.verify(example, completion)
    return verdicts
