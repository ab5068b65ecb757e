"""The kinds of tasks by name, each with the options that it hears of."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from speckd.box import Unboxed, required
from speckd.evaluation import instructions, mathematics, programs, rouge
from speckd.evaluation.drafting import Drafting
from speckd.evaluation.generated import Generated, require_reference
from speckd.evaluation.likelihood import Likelihood
from speckd.evaluation.options import Options, TaskOptions
from speckd.evaluation.task import ANSWER_OPTIONS, PROMPT_OPTIONS, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """`options`: those that a task of this kind hears of; `make`: such a task, from its name and options; `asks_teacher`: does
    it ask one, where there is one?"""

    options: frozenset[str]
    make: Callable[[str, TaskOptions, Options], Task]
    asks_teacher: bool = False


def _rouge(name: str, task: TaskOptions, options: Options) -> Task:
    return Generated(name, task, options.seed, rouge.score, rouge.METRICS, partial(require_reference, name))


def _math(name: str, task: TaskOptions, options: Options) -> Task:
    task = replace(task, stop=task.stop or mathematics.STOP)
    return Generated(name, task, options.seed, mathematics.score, mathematics.METRICS, partial(mathematics.require, name))


def _checks(name: str, task: TaskOptions, options: Options) -> Task:
    require = partial(instructions.require, name)
    return Generated(name, task, options.seed, instructions.score, instructions.METRICS, require)


def _code(name: str, task: TaskOptions, options: Options) -> Task:
    box = required(options.i_accept_unsandboxed_code)
    if isinstance(box, Unboxed):
        logger.warning("%s: no box can be had here: the model's programs run with your rights.", name)
    task = replace(task, stop=task.stop or programs.STOP)
    require, score = partial(programs.require, name), partial(programs.score, box)
    return Generated(name, task, options.seed, score, programs.metrics(task.pass_at), require, programs.counts)


def _likelihood(name: str, task: TaskOptions, options: Options) -> Task:
    return Likelihood(name, task, options.seed)


def _draft(name: str, task: TaskOptions, options: Options) -> Task:
    return Drafting(name, task, options.seed, options.batch_size)


KINDS: dict[str, Kind] = {
    "rouge": Kind(ANSWER_OPTIONS, _rouge),
    "checks": Kind(ANSWER_OPTIONS - {"reference_column", "few_shot", "few_shot_data"}, _checks),
    "math": Kind(ANSWER_OPTIONS, _math),
    "code": Kind(ANSWER_OPTIONS | {"pass_at"}, _code),
    "likelihood": Kind(PROMPT_OPTIONS | {"max_length"}, _likelihood, asks_teacher=True),
    "draft": Kind(
        PROMPT_OPTIONS | {"max_new_tokens", "max_length", "draft_length", "timed_prompts", "timed_repeats"},
        _draft,
        asks_teacher=True,
    ),
}
