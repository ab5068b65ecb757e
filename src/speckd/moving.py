"""Objectives that move: a number of a part (a gate's k, TAID's t, the label's share) that differs from one step to the next.

What moves it is a schedule (a function of the step) or a controller (which also hears what each step found). Both are frozen:
what a controller remembers is a mapping of numbers that the caller keeps, and saves with its checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

from speckd.errors import ConfigError
from speckd.objective import Objective

#: What a controller remembers, or all of them by the name of what they move: numbers that JSON returns bit for bit.
Memory = dict[str, float]
Memories = dict[str, Memory]


@dataclass(frozen=True)
class Clock:
    """`step`: optimizer steps done; `total`: of the whole run, 0 where it is not known yet."""

    step: int
    total: int


@dataclass(frozen=True)
class Seen:
    """What an optimizer step found, over all its micro-batches and processes: so it is the same everywhere.

    `loss`: the step's; `tar`: token acceptance rate, macro, None where there is no gate's verdict.
    """

    loss: float
    tar: float | None


class Mover(Protocol):
    """Says what value a number has."""

    def value(self, clock: Clock, memory: Memory) -> float:
        """For the step that comes after `clock.step` others; `memory` is empty at first."""
        ...

    def remember(self, clock: Clock, memory: Memory, seen: Seen) -> Memory:
        """After a step: what to remember; nothing, for a schedule."""
        ...

    def ends(self) -> tuple[float, float]:
        """The values between which all others lie."""
        ...

    @property
    def notation(self) -> str: ...


@dataclass(frozen=True)
class Moved:
    """`option`: of the gate, the policy or the divergence, as `part` says, or of the objective itself where it is None."""

    part: str | None
    option: str
    mover: Mover

    @property
    def name(self) -> str:
        return self.option if self.part is None else f"{self.part}/{self.option}"

    def read(self, objective: Objective) -> float:
        return getattr(_owner(self._part(objective), self.option), self.option)

    def write(self, objective: Objective, value: float) -> Objective:
        """With another value; of a whole number, the nearest.

        Raises:
            ConfigError: the part has no such number, or refuses the value.
        """
        part = _with(self._part(objective), self.option, value)
        return part if self.part is None else replace(objective, **{self.part: part})

    def _part(self, objective: Objective) -> Any:
        return objective if self.part is None else getattr(objective, self.part)


def _owner(part: Any, option: str) -> Any:
    """Whose number it is: the part's own, or that of the gate inside a control."""
    names = [f.name for f in fields(part)] if is_dataclass(part) else []
    if option in names:
        return part
    if "gate" in names:
        return _owner(part.gate, option)
    raise ConfigError(f"'{option}' cannot be moved: {part!r} has no such option", "Name one of its options that is a number")


def _with(part: Any, option: str, value: float) -> Any:
    owner = _owner(part, option)
    if owner is not part:
        return replace(part, gate=_with(part.gate, option, value))
    now = getattr(part, option)
    if isinstance(now, bool) or not isinstance(now, (int, float)):
        raise ConfigError(f"'{option}' cannot be moved: it is {now!r}", "Name an option that is a number")
    return replace(part, **{option: round(value) if isinstance(now, int) else float(value)})


@dataclass(frozen=True)
class MovingObjective:
    """An objective and what of it moves; nothing, by default."""

    start: Objective
    moved: tuple[Moved, ...] = ()

    def __post_init__(self) -> None:
        for objective in self.extremes():  # parts refuse what they cannot be, at once
            if self.start.needs_teacher != objective.needs_teacher:
                raise ConfigError(
                    "label_loss_weight moves between 1, where no teacher is asked, and less",
                    "Stay below 1, at 0.99 for example",
                )

    def at(self, clock: Clock, memories: Memories) -> Objective:
        objective = self.start
        for each in self.moved:
            objective = each.write(objective, each.mover.value(clock, memories.get(each.name, {})))
        return objective

    def remember(self, clock: Clock, memories: Memories, seen: Seen) -> Memories:
        found = {each.name: each.mover.remember(clock, memories.get(each.name, {}), seen) for each in self.moved}
        return {name: memory for name, memory in found.items() if memory}

    def extremes(self) -> Iterator[Objective]:
        """As it starts, and each number at its ends: whoever bears these bears all that lies between."""
        yield self.start
        for each in self.moved:
            yield from (each.write(self.start, end) for end in each.mover.ends())

    def values(self, objective: Objective) -> dict[str, float]:
        """The moving numbers of an objective by name, for the log."""
        return {each.name: each.read(objective) for each in self.moved}
