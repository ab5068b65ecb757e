"""`speckd train --dry-run`: how a method is composed, in the paper's notation. Each part states its own formula."""

from collections.abc import Iterator

import torch

from speckd.arguments import SpecKDConfig
from speckd.config import MethodConfig
from speckd.moving import Clock, MovingObjective
from speckd.objective import Objective
from speckd.policies import HasFallback, RejectedPolicy
from speckd.settings import Settings
from speckd.types import notation_of, shown

#: What N is, by the normaliser's name.
_NORMALIZERS = {
    "valid": "N = the supervised tokens of an optimizer step, accepted or not",
    "weight": "N = the sum of all weights of an optimizer step",
}


def composition(settings: Settings) -> Iterator[str]:
    """Line by line: where sequences and the teacher's word come from, the loss, and what of it moves."""
    args, moving = settings.training, settings.training.moving_objective()
    objective = moving.at(Clock(0, 0), {})
    yield f"method      {f'recipe {settings.recipe}' if settings.recipe else 'your own composition'}: {named(args)}"
    data = settings.run.dataset_name or "the data (dataset_name is not set)"
    yield f"sequences   (x, y) ~ {data}{'; ' if args.writes else ', as it is written there'}{_written(args)}"
    if objective.needs_teacher:
        yield f"teacher     p_t = p(· | x, y_<t), by {args.teacher}; student q_t = q(· | x, y_<t)"
    yield from _loss("loss        ", objective)
    if args.writes and args.student_text_objective(objective) != objective:
        yield from _loss("on written  ", args.student_text_objective(objective))
    yield from moves(moving)


def _loss(name: str, objective: Objective) -> Iterator[str]:
    loss, *more = formulas(objective)
    yield f"{name}{loss}"
    yield from (f"            {line}" for line in more)


def _written(args: SpecKDConfig) -> str:
    """Who writes y, in the paper's letters."""
    if not args.writes:
        return ""
    rule = "y_t ~ q_t"
    if args.sequence_source == "interleaved":
        rule = f"y_t ~ q_t, replaced by y_t ~ p_t where y_t ∉ Top-{args.interleaved_top_k}(p_t)"
    if args.sequence_source == "mixed":
        rule = f"y_t ~ {args.teacher_mix:g}·p_t + {1 - args.teacher_mix:g}·q_t"
    if args.own_writer:
        rule = f"y by {args.sequence_source}"
    again = f", or one of the last {args.replay_capacity} written" if args.sequence_source == "replay" else ""
    return f"{args.described_source} ({rule}{again})"


def named(args: MethodConfig) -> str:
    """The parts as the settings name them."""
    return f"gate {args.gate}, rejected {args.rejected}, divergence {args.divergence}, normalizer {args.normalizer}"


def formulas(objective: Objective) -> Iterator[str]:
    """L, and what its letters stand for."""
    share, wheres = objective.label_loss_weight, [_NORMALIZERS[objective.normalizer]]
    if not objective.needs_teacher:
        yield "L = 1/N Σ_t (−log q_t(y_t))"
        yield from wheres
        return
    gate, divergence = (_parted(notation_of(part)) for part in (objective.gate, objective.divergence))
    fallback = _fallback(objective.rejected)
    temperature = objective.divergence_temperature
    distance = _factor(divergence[0])
    if temperature != 1:
        distance = f"{temperature:g}²·{distance}"
        wheres.insert(0, f"p_t and q_t in it at temperature T = {temperature:g}, times T²")
    inner = f"V_t · {distance}{f' + {fallback}' if fallback else ''}"
    if share:
        inner = f"{1 - share:g}·[{inner}] + {share:g}·(−log q_t(y_t))"
    elif fallback:
        inner = f"[{inner}]"
    yield f"L = 1/N Σ_t {inner}"
    weight = notation_of(objective.rejected)
    if fallback or "a_t" not in weight:  # where a_t stands, too, or nowhere
        yield f"V_t = {weight}"
        yield f"a_t = {gate[0]}"
    else:
        yield f"V_t = {weight.replace('a_t', gate[0] if weight == 'a_t' else _factor(gate[0]))}"
    yield from (*gate[1:], *divergence[1:], *wheres)


def _fallback(policy: RejectedPolicy) -> str:
    """What is added to the divergence; of a policy that has a fallback and states no formula, its name."""
    if isinstance(policy, HasFallback):
        return policy.fallback_notation
    weighed = policy.weights(torch.linspace(0, 1, 11))[1]
    return f"fallback of {shown(policy)}" if bool(weighed.any()) else ""


def moves(moving: MovingObjective) -> Iterator[str]:
    for each in moving.moved:
        yield f"moves       {each.name}: {each.mover.notation}"


def _parted(notation: str) -> list[str]:
    """A formula, and what its letters stand for."""
    return notation.split("; ")


def _factor(formula: str) -> str:
    """In brackets where it is a sum, for a product."""
    depth = 0
    for place, letter in enumerate(formula):
        depth += (letter in "([") - (letter in ")]")
        if depth == 0 and formula[place : place + 3] in (" + ", " − "):
            return f"[{formula}]"
    return f"({formula})" if formula.startswith("−") else formula
