"""A plan's YAML file -> a checked `Plan`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from speckd.bench.plan import AIMS, DATA, Block, Method, Plan, Shape, Teacher, TrainedOn, World, file_name
from speckd.config import nearest
from speckd.errors import ConfigError
from speckd.strict_yaml import yaml_of
from speckd.tasks import FAMILIES
from speckd.tasks.families import LEVELS


def profiles() -> list[str]:
    found = (path.name for path in files("speckd").joinpath("bench", "profiles").iterdir())
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def plan_text(path: Path) -> str:
    """What stands in a plan's file, or in a shipped profile.

    Raises:
        ConfigError: there is neither.
    """
    if path.is_file():
        return path.read_text()
    if str(path) in profiles():
        return files("speckd").joinpath("bench", "profiles", f"{path}.yaml").read_text()
    raise ConfigError(f"there is no plan {path}", f"Give a file, or one of {', '.join(profiles())}")


def read_plan(path: Path) -> Plan:
    """A file, or a shipped profile by its name (`smoke`, `cpu`, `gpu`).

    Raises:
        ConfigError: what is wrong, under which key, and the fix.
    """
    return plan_of(yaml_of(plan_text(path), str(path)))


def plan_of(content: Mapping[str, Any]) -> Plan:
    """A mapping as it stands in a file -> a checked plan."""
    known = {f.name for f in fields(Plan)}
    _require_known("the plan", content, known)
    missing = {"starts", "teachers", "methods", "blocks"} - content.keys()
    if missing:
        raise ConfigError(f"the plan has no {sorted(missing)[0]}", "See the shipped profiles: speckd bench cpu --show")
    world = _world(_mapping("world", content.get("world", {})))
    plan = Plan(
        world,
        _starts(_named("starts", content["starts"])),
        {name: _teacher(f"teachers: {name}", spec) for name, spec in _named("teachers", content["teachers"]).items()},
        {name: _method(f"methods: {name}", spec) for name, spec in _named("methods", content["methods"]).items()},
        tuple(_block(f"blocks[{i}]", spec) for i, spec in enumerate(_list("blocks", content["blocks"]))),
        tuple(
            _number("learning_rates", float, rate, 0.0)
            for rate in _list("learning_rates", content.get("learning_rates", [2e-3]))
        ),
        _number("rates_beyond", int, content.get("rates_beyond", 0), 0),
        tuple(_number("tuning_seeds", int, seed, 0) for seed in _list("tuning_seeds", content.get("tuning_seeds", [1000]))),
        _named("tuned_with", content.get("tuned_with", {})),
        _names("references", content.get("references", ["ungated", "SFT"]), least=0),
    )
    _require_names(plan)
    _require_tuning(plan)
    _require_runs(plan)
    return plan


def _starts(spec: Mapping[str, Any]) -> Mapping[str, int]:
    return {name: _number(f"starts: {name}", int, steps, 0) for name, steps in spec.items()}


def _world(spec: Mapping[str, Any]) -> World:
    _require_known("world", spec, {f.name for f in fields(World)})
    built = dict(spec)
    for name in ("student", "teacher"):
        if built.get(name) is not None:
            built[name] = _shape(f"world: {name}", built[name])
    if built.get("teacher_trained") is not None:
        built["teacher_trained"] = _trained("world: teacher_trained", built["teacher_trained"])
    world: World = _part("world", World, built)
    for name in ("train", "validation", "test"):
        if getattr(world, name) < len(FAMILIES):
            raise ConfigError(f"world: {name} is {getattr(world, name)}", "Give at least a task of each family")
    if world.level not in LEVELS:
        raise ConfigError(f"world: level {world.level} does not exist", f"Valid: {', '.join(map(str, LEVELS))}")
    if (world.teacher is None) != (world.teacher_trained is None):
        raise ConfigError("world: teacher and teacher_trained go together", "Give both, or neither for the shipped teacher")
    return world


def _teacher(where: str, spec: Any) -> Teacher:
    built = dict(_mapping(where, spec))
    if built.get("shape") is not None:
        built["shape"] = _shape(f"{where}: shape", built["shape"])
    if built.get("trained") is not None:
        built["trained"] = _trained(f"{where}: trained", built["trained"])
    teacher: Teacher = _part(where, Teacher, built)
    if teacher.shape is not None and teacher.trained is None:
        raise ConfigError(f"{where}: a shape without trained", "Say how it is trained: trained: {steps: 500}")
    if not 0 <= teacher.scrambled <= 1:
        raise ConfigError(f"{where}: scrambled is {teacher.scrambled}", "Use a share between 0 and 1")
    if teacher.bits is not None and not 2 <= teacher.bits <= 8:
        raise ConfigError(f"{where}: bits is {teacher.bits}", "Use 2 to 8")
    return teacher


def _trained(where: str, spec: Any) -> TrainedOn:
    built = dict(_mapping(where, spec))
    if "families" in built:
        built["families"] = _list(f"{where}: families", built["families"])
        for family in built["families"]:
            if family not in FAMILIES:
                raise ConfigError(f"{where}: '{family}' is not a family of tasks", nearest(str(family), list(FAMILIES)))
    found: TrainedOn = _part(where, TrainedOn, built)
    if not 0 <= found.label_noise <= 1:
        raise ConfigError(f"{where}: label_noise is {found.label_noise}", "Use a share between 0 and 1")
    return found


def _shape(where: str, spec: Any) -> Shape:
    found: Shape = _part(where, Shape, spec)
    if found.hidden % (2 * found.heads):
        raise ConfigError(f"{where}: {found.heads} heads of hidden {found.hidden}", "Make hidden a multiple of twice the heads")
    return found


def _method(where: str, spec: Any) -> Method:
    given = dict(_mapping(where, spec))
    aim, oracle, untrained = given.pop("aim", "quality"), given.pop("oracle", False), given.pop("untrained", False)
    if aim not in AIMS:
        raise ConfigError(f"{where}: aim is '{aim}'", nearest(str(aim), list(AIMS)))
    for name, value in (("oracle", oracle), ("untrained", untrained)):
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: {name} is {value!r}", "Give true or false")
    if untrained and (given or oracle):
        raise ConfigError(f"{where}: it is untrained and has settings", "Leave them out")
    return Method(given, aim, oracle, untrained)


def _block(where: str, spec: Any) -> Block:
    built = dict(_mapping(where, spec))
    for name in ("starts", "teachers", "methods", "data"):
        if name in built:
            built[name] = _names(f"{where}: {name}", built[name])
    block: Block = _part(where, Block, built)
    if block.budget not in ("steps", "compute"):
        raise ConfigError(f"{where}: budget is '{block.budget}'", "Use steps or compute")
    return block


def _require_names(plan: Plan) -> None:
    """Every name that a block or a rule uses is one that the plan has."""
    for block in plan.blocks:
        for key, used, known in (
            ("starts", block.starts, plan.starts),
            ("teachers", block.teachers, plan.teachers),
            ("methods", block.methods, plan.methods),
            ("data", block.data, DATA),
        ):
            for name in used:
                if name not in known:
                    raise ConfigError(f"blocks: {block.name}: {key}: '{name}' is not there", nearest(str(name), list(known)))
    for name in [*plan.tuned_with.keys(), *_names("tuned_with", list(plan.tuned_with.values()), least=0)]:
        if name not in plan.teachers:
            raise ConfigError(f"tuned_with: '{name}' is not a teacher", nearest(str(name), list(plan.teachers)))
    for name in plan.references:
        if name not in plan.methods:
            raise ConfigError(f"references: '{name}' is not a method", nearest(str(name), list(plan.methods)))
    files = [file_name(block.name) for block in plan.blocks]
    if len(set(files)) < len(files):
        raise ConfigError("blocks: two have the same name, but for signs that a file cannot have", "Name them apart")


def _require_tuning(plan: Plan) -> None:
    if len(set(plan.learning_rates)) < len(plan.learning_rates):
        raise ConfigError("learning_rates: one stands there twice", "Remove it")
    if plan.rates_beyond and len(plan.learning_rates) < 2:
        raise ConfigError("rates_beyond: one learning rate has no step to go on by", "Give two learning_rates or more")
    most = max(block.seeds for block in plan.blocks)
    used = [seed for seed in plan.tuning_seeds if seed < most]
    if used and any(plan.tuned(block, cell) for block, cell in plan.cells()):
        raise ConfigError(f"tuning_seeds: {used[0]} is also a seed of the comparison", f"Use seeds of {most} and more")


def _require_runs(plan: Plan) -> None:
    asking = {block.name for block, _ in plan.cells()}
    for block in plan.blocks:
        if block.name not in asking:
            raise ConfigError(f"blocks: {block.name}: it asks for no run", "Give an oracle a teacher that is scrambled")


def _part(where: str, kind: Any, spec: Any) -> Any:
    """A dataclass from a mapping: its keys are checked, the required ones, and its numbers."""
    given = dict(_mapping(where, spec))
    _require_known(where, given, {f.name for f in fields(kind)})
    for f in fields(kind):
        number = next((each for each in (int, float) if f.type in (each, each | None)), None)
        if number is not None and given.get(f.name) is not None:
            given[f.name] = _number(f"{where}: {f.name}", number, given[f.name], _LEAST.get(f.name, 1))
        if f.type is str and not isinstance(given.get(f.name, ""), str):
            raise ConfigError(f"{where}: {f.name} is {given[f.name]!r}", "Give words, in quotes")
    try:
        return kind(**given)
    except TypeError as error:
        raise ConfigError(f"{where}: {str(error).split(') ')[-1]}", "Give it") from None


def _require_known(where: str, given: Mapping[str, Any], known: Sequence[str] | set[str]) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{where}: '{key}' is not a key of it", nearest(str(key), sorted(known)))


#: What numbers must not be below (a rate of 0.0: not at); 1 for the others.
_LEAST = {"scrambled": -math.inf, "label_noise": -math.inf, "bits": -math.inf, "learning_rate": 0.0, "start_learning_rate": 0.0}


def _number(where: str, kind: type[int] | type[float], value: Any, least: float) -> Any:
    """`value` as it is typed: YAML reads 1e-3 as text. `least`: a float is refused, too."""
    try:
        found = float(value) if kind is float and not isinstance(value, bool) else value
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ConfigError(f"{where} is {value!r}", "Give a whole number" if kind is int else "Give a number")
    if not least < found < math.inf if kind is float else found < least:
        raise ConfigError(f"{where} is {value}", "Give a number above 0" if kind is float else f"Give at least {least:g}")
    return found


def _list(where: str, value: Any, least: int = 1) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or len(value) < least:
        raise ConfigError(f"{where} is {value!r}", "Give a list, such as [a, b]")
    return tuple(value)


def _names(where: str, value: Any, least: int = 1) -> tuple[str, ...]:
    found = _list(where, value, least)
    for name in found:
        if not isinstance(name, str):
            raise ConfigError(f"{where}: {name!r} is no name", "Write words; what YAML reads as something else, in quotes")
    return found


def _named(where: str, value: Any) -> Mapping[str, Any]:
    """A mapping whose keys are names: to YAML, `1` and `yes` are none."""
    found = _mapping(where, value)
    _names(where, list(found), least=0)
    return found


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}", "Give a mapping")
    return value
