"""What an examination finds, and how one that fails leaves the others alone."""

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias, TypeVar

from speckd.checks import reason_of
from speckd.errors import SpeckdError

_T = TypeVar("_T")

#: Loggers whose warnings matter to a user, and below them those of which an examination says the same.
_HEARD = ("speckd", "trl")
_EXAMINED = ("speckd.compatibility", "speckd.collation", "speckd.memory_report")


class Level(StrEnum):
    """Only a failure says that something would go wrong."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    FAILURE = "failure"


class About(StrEnum):
    """The groups, in the order in which they are looked at."""

    SETTINGS = "Settings"
    MODELS = "Models and vocabulary"
    ENDS = "End tokens and chat template"
    ELSEWHERE = "The teacher elsewhere"
    MEMORY = "Memory"
    DISK = "Disk"
    LOADED = "Models as they are loaded"
    DATA = "Data"
    SAMPLE = "A sample"
    START = "The start"
    PARITY = "The teacher elsewhere against the one here"
    TIME = "Time"


@dataclass(frozen=True)
class Finding:
    """One line. `about`: what was looked at; `fix`: what to do, empty where there is nothing to do."""

    about: About
    level: Level
    what: str
    fix: str = ""


@dataclass(frozen=True)
class JudgedToken:
    """A supervised token as gate and models see it; what needs the teacher is None without one.

    `position`: in the sequence; `token`, `proposal`, `favourite`: the data's, the student's and the teacher's, as text;
    `acceptance`: the gate's; `student`, `teacher`: their probabilities of the data's token.
    """

    position: int
    token: str
    proposal: str
    student: float
    acceptance: float | None = None
    favourite: str | None = None
    teacher: float | None = None


@dataclass(frozen=True)
class Sample:
    """A sequence as it is trained on. `row`: of the data, from 1; `pieces`: its text and whether that is supervised; `tokens`:
    the supervised ones."""

    row: int
    length: int
    pieces: tuple[tuple[str, bool], ...]
    tokens: tuple[JudgedToken, ...]


Found: TypeAlias = Finding | Sample
#: Finds one thing after the other; its value is what later examinations need.
Examination: TypeAlias = Generator[Found, None, _T]


class _Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name not in _EXAMINED:
            self.said.append(" ".join(record.getMessage().split()))


@contextmanager
def _listening() -> Iterator[_Ear]:
    """Warnings go to the ear alone."""
    ear, loggers = _Ear(), [logging.getLogger(name) for name in _HEARD]
    before = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [ear], False
    try:
        yield ear
    finally:
        for logger, handlers, propagates in before:
            logger.handlers, logger.propagate = handlers, propagates


class Attempts:
    """Makes examinations one by one: what one raises, and what the package warns of meanwhile, are findings, each said once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def of(self, about: About, examination: Examination[_T]) -> Examination[_T | None]:
        """What the examination finds; its value, or None where it could not be ended."""
        with _listening() as ear:
            value, failure = None, None
            try:
                value = yield from examination
            except SpeckdError as error:
                failure = Finding(about, Level.FAILURE, error.what, error.fix)
            except Exception as error:  # nothing hides the other examinations
                failure = _unforeseen(about, error)
        for found in (*(Finding(about, Level.WARNING, warning) for warning in ear.said), failure):
            if found is not None and found.what not in self._said:
                self._said.add(found.what)
                yield found
        return value


def _unforeseen(about: About, error: Exception) -> Finding:
    if type(error).__name__ == "OutOfMemoryError":
        fix = "Lower per_device_train_batch_size, max_length or loss_memory_budget"
        return Finding(about, Level.FAILURE, "out of memory", fix)
    what = f"this could not be examined: {type(error).__name__}: {reason_of(error)}"
    return Finding(about, Level.FAILURE, what, "See what 'speckd --debug train' says of it")


def ok(about: About, what: str) -> Finding:
    return Finding(about, Level.OK, what)


def note(about: About, what: str, fix: str = "") -> Finding:
    return Finding(about, Level.NOTE, what, fix)


def warning(about: About, what: str, fix: str) -> Finding:
    return Finding(about, Level.WARNING, what, fix)


def failure(about: About, what: str, fix: str) -> Finding:
    return Finding(about, Level.FAILURE, what, fix)
