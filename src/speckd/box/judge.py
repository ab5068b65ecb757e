"""The code task: whether a program that a model wrote gives what the tests expect. The judge is outside of the box.

What enters is the program and the calls with their arguments; what comes out are values. The program can change everything
inside, and answer whatever it likes, but it is never told what is expected, and nothing that it says means "passed".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Protocol

from speckd.box.asserts import NotJudgeable, TestFails
from speckd.box.completions import extract_code
from speckd.box.outcomes import Outcome
from speckd.box.problems import Problem
from speckd.errors import ConfigError


class Runner(Protocol):
    """Where programs run: `Box` or `Unboxed`."""

    def run(self, program: str, calls: Sequence[str], setup: str = "") -> list[Outcome]:
        """The outcome of each call."""


@dataclass(frozen=True)
class Verdict:
    """What the judge found.

    Args:
        passed: every assert of the problem holds. Never true where one could not be judged.
        judgeable: the tests could be taken apart; else the problem counts as neither passed nor failed, and is listed.
        outcomes: of the calls, in their order.
        reason: why it did not pass, in words; what the program says is in it, shortened.
    """

    passed: bool
    judgeable: bool
    outcomes: tuple[Outcome, ...]
    reason: str


def judge(given: Problem, completion: str, box: Runner) -> Verdict:
    """Runs what the model wrote and compares.

    Values are compared as Python's `==` compares plain ones (1 equals 1.0), but True is not 1, and NaN equals nothing; a
    value of any other type fails (see `equality.equal`).

    Args:
        completion: the model's text; `extract_code` finds the program in it.

    Raises:
        ConfigError: there can be no box here.
    """
    try:
        calls = given.calls()
    except NotJudgeable as error:
        return Verdict(False, False, (), f"not judgeable: {error}")
    outcomes = box.run(given.start + extract_code(completion), calls, given.setup)
    try:
        given.compare(outcomes)
    except TestFails as error:
        return Verdict(False, True, tuple(outcomes), str(error))
    except NotJudgeable as error:
        return Verdict(False, True, tuple(outcomes), f"what the program gives cannot be judged: {error}")
    return Verdict(True, True, tuple(outcomes), "")


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k programs passes, estimated without bias from n of which c passed: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.

    Raises:
        ConfigError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ConfigError(
            f"pass@{k} of {n} programs, of which {c} passed, is not defined", "Write at least k programs per task."
        )
    return 1.0 - comb(n - c, k) / comb(n, k)
