"""A box in which programs run that nobody has read, and the judge of what comes out of it."""

from speckd.box.box import Box, Unboxed, required
from speckd.box.completions import extract_code
from speckd.box.judge import Verdict, judge, pass_at_k
from speckd.box.outcomes import Limits, Outcome
from speckd.box.problems import Problem, problem, problem_prompt, unjudgeable

__all__ = [
    "Box",
    "Limits",
    "Outcome",
    "Problem",
    "Unboxed",
    "Verdict",
    "extract_code",
    "judge",
    "pass_at_k",
    "problem",
    "problem_prompt",
    "required",
    "unjudgeable",
]
