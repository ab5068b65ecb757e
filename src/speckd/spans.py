"""Named stretches of a training step: `torch.profiler` shows them, `speckd profile` times them; else they cost microseconds."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol

from torch.profiler import record_function

#: Every name starts with this, so that a trace tells our spans from those of torch and other libraries.
PREFIX = "speckd: "

DATA = PREFIX + "data"
GENERATION = PREFIX + "generation"
TEACHER_FORWARD = PREFIX + "teacher forward"
STUDENT_FORWARD = PREFIX + "student forward"
HEAD_AND_LOSS = PREFIX + "heads and loss"
STUDENT_HEAD = PREFIX + "student head"
TEACHER_HEAD = PREFIX + "teacher head"
EARLY_REJECTION = PREFIX + "early rejection"
GATE = PREFIX + "gate"
DIVERGENCE = PREFIX + "divergence"
HEAD_GRADIENTS = PREFIX + "head gradients"
BACKWARD = PREFIX + "backward"
OPTIMIZER = PREFIX + "optimizer"


class Clock(Protocol):
    """Who times spans."""

    def timed(self, name: str) -> AbstractContextManager[None]: ...


#: A thread sees its own: what another thread does beside the step is not part of the step's time.
_clock: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextmanager
def span(name: str) -> Iterator[None]:
    """Everything inside belongs to this name; spans may lie within each other, and one name may come several times."""
    clock = _clock.get()
    with record_function(name):
        if clock is None:
            yield
        else:
            with clock.timed(name):
                yield


@contextmanager
def timing(clock: Clock) -> Iterator[None]:
    """Spans of this thread are timed by a clock for as long as this lasts."""
    before = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(before)
