"""What a benchmark compares: one YAML file -> frozen data, and the single runs that it asks for.

A run is known by everything that decides its outcome (`Run.key`): a plan that has changed runs only what is new.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from speckd.config import nearest
from speckd.errors import ConfigError
from speckd.tasks import FAMILIES
from speckd.tasks.families import LEVELS

Data = Literal["dataset", "teacher text", "student text"]
DATA: tuple[Data, ...] = ("dataset", "teacher text", "student text")
AIMS = ("quality", "draft")
#: What decides between learning rates, by aim, on the validation tasks: (measure, is more better?)
TUNED_BY = {"quality": ("nll", False), "draft": ("alpha", True)}


@dataclass(frozen=True)
class Shape:
    """A small Llama with tied embeddings."""

    hidden: int
    layers: int
    heads: int


@dataclass(frozen=True)
class TrainedOn:
    """How a model is made by cross-entropy on the tasks: `steps` with a peak `learning_rate`, on some `families`; a share
    `label_noise` of the completions is another task's of the same family."""

    steps: int
    learning_rate: float = 2e-3
    families: tuple[str, ...] = FAMILIES
    label_noise: float = 0.0


@dataclass(frozen=True)
class Teacher:
    """A teacher as it is met in training; the measures' teacher is always the clean one.

    Args:
        scrambled: the share of positions at which its distribution is over other tokens.
        top_k: only its K most probable tokens are known.
        bits: its matrices are rounded to so many bits, in groups of 32.
        prefix: words that it is shown before each prompt, as a wrong template would.
        shape: another model than the clean one, trained as `trained` says.
        trained: how it is trained, or trained further where `shape` is not given.
    """

    scrambled: float = 0.0
    top_k: int | None = None
    bits: int | None = None
    prefix: str = ""
    shape: Shape | None = None
    trained: TrainedOn | None = None

    @property
    def base(self) -> "Teacher":
        """Whose answers are stored: scrambling and truncation are done to them as they are read."""
        return replace(self, scrambled=0.0, top_k=None)


@dataclass(frozen=True)
class Method:
    """`settings`: of the method, as in `speckd train`; or `oracle: true`, which knows where the teacher is scrambled;
    or `untrained: true`, the starting student as it is.

    `aim`: what its learning rate is tuned for.
    """

    settings: Mapping[str, Any]
    aim: str = "quality"
    oracle: bool = False
    untrained: bool = False

    @property
    def needs_teacher(self) -> bool:
        return not self.untrained and self.settings.get("label_loss_weight") != 1


@dataclass(frozen=True)
class Block:
    """A full product of factors, for some seeds. `budget`: "steps" or "compute", see `Plan.steps_of`; `learning_rate`: of all
    its runs, instead of a tuned one."""

    name: str
    starts: tuple[str, ...]
    teachers: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    steps: int
    data: tuple[Data, ...] = ("dataset",)
    budget: str = "steps"
    learning_rate: float | None = None


@dataclass(frozen=True)
class Cell:
    """One combination of factors; with a seed it is a run."""

    block: str
    start: str
    teacher: str
    data: str
    method: str


@dataclass(frozen=True)
class World:
    """What all runs share: the tasks, the sizes, the clean teacher (None: the one that the package ships)."""

    level: int = 2
    train: int = 6000
    validation: int = 300
    test: int = 300
    batch_size: int = 24
    max_new_tokens: int = 48
    student: Shape = Shape(48, 2, 4)
    teacher: Shape | None = None
    teacher_trained: TrainedOn | None = None
    start_learning_rate: float = 4e-3
    refresh: int = 50
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """One training run, with all that decides its outcome. `start_steps`: of SFT before; None method: the start itself."""

    world: World
    seed: int
    start_steps: int
    method: Method | None = None
    teacher: Teacher = Teacher()
    data: str = "dataset"
    steps: int = 0
    learning_rate: float = 0.0
    split: str = "test"

    @property
    def key(self) -> str:
        """Of this version of the package."""
        return hashlib.sha256(json.dumps([version("speckd"), asdict(self)], sort_keys=True).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Plan:
    """Everything that a file says."""

    world: World
    starts: Mapping[str, int]
    teachers: Mapping[str, Teacher]
    methods: Mapping[str, Method]
    blocks: tuple[Block, ...]
    learning_rates: tuple[float, ...]
    rates_beyond: int = 0
    tuning_seeds: tuple[int, ...] = (1000,)
    tuned_with: Mapping[str, str] = field(default_factory=dict)
    references: tuple[str, ...] = ("ungated", "SFT")

    def cells(self) -> Iterator[tuple[Block, Cell]]:
        """Each with its block. An oracle exists only where something is scrambled, and who needs no teacher is run once."""
        for block in self.blocks:
            for start in block.starts:
                for data in block.data:
                    for name in block.methods:
                        method = self.methods[name]
                        teachers = block.teachers if method.needs_teacher or data == "teacher text" else block.teachers[:1]
                        for teacher in teachers:
                            if not method.oracle or self.teachers[teacher].scrambled:
                                yield block, Cell(block.name, start, teacher, data, name)

    def steps_of(self, block: Block, method: Method) -> int:
        """The block's; with budget "compute", who asks no teacher trains longer, so that all cost the same.

        Counted as usual, 6 operations a parameter and token for training and 2 for the teacher's forward.
        """
        if method.untrained:
            return 0
        if block.budget == "steps" or method.needs_teacher:
            return block.steps
        student, teacher = parameters(self.world.student), parameters(self.world.teacher or SHIPPED)
        return round(block.steps * (6 * student + 2 * teacher) / (6 * student))

    @property
    def ladder(self) -> tuple[float, ...]:
        """Every rate that tuning may come to: the plan's, and `rates_beyond` more on either side, in the steps of its ends."""
        rates = sorted(self.learning_rates)
        if not self.rates_beyond:
            return tuple(rates)
        lower, upper = rates[1] / rates[0], rates[-1] / rates[-2]
        below = [rates[0] / lower**i for i in range(self.rates_beyond, 0, -1)]
        return (*below, *rates, *(rates[-1] * upper**i for i in range(1, self.rates_beyond + 1)))

    def tuned(self, block: Block, cell: Cell) -> bool:
        """Is its learning rate chosen among several?"""
        return block.learning_rate is None and len(self.learning_rates) > 1 and not self.methods[cell.method].untrained

    def tuning_cell(self, cell: Cell) -> Cell:
        """The cell whose learning rate this one takes."""
        return replace(cell, teacher=self.tuned_with.get(cell.teacher, cell.teacher))

    def run(self, block: Block, cell: Cell, seed: int, learning_rate: float, split: str = "test") -> Run:
        method = self.methods[cell.method]
        return Run(
            self.world,
            seed,
            self.starts[cell.start],
            method,
            self.teachers[cell.teacher],
            cell.data,
            self.steps_of(block, method),
            learning_rate,
            split,
        )


#: The shipped teacher's shape.
SHIPPED = Shape(144, 4, 6)


def parameters(shape: Shape) -> int:
    """About how many: attention and a gated feed-forward of 8/3, without embeddings."""
    return 12 * shape.layers * shape.hidden**2


# ---- reading -----------------------------------------------------------------------------------------------------------------


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
    try:
        content = yaml.safe_load(plan_text(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}", "Mend it") from None
    return plan_of(_mapping("the plan", content))


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
        _starts(_mapping("starts", content["starts"])),
        {name: _teacher(f"teachers: {name}", spec) for name, spec in _mapping("teachers", content["teachers"]).items()},
        {name: _method(f"methods: {name}", spec) for name, spec in _mapping("methods", content["methods"]).items()},
        tuple(_block(f"blocks[{i}]", spec) for i, spec in enumerate(_list("blocks", content["blocks"]))),
        tuple(
            _number("learning_rates", float, rate, 0.0)
            for rate in _list("learning_rates", content.get("learning_rates", [2e-3]))
        ),
        _number("rates_beyond", int, content.get("rates_beyond", 0), 0),
        tuple(_number("tuning_seeds", int, seed, 0) for seed in _list("tuning_seeds", content.get("tuning_seeds", [1000]))),
        _mapping("tuned_with", content.get("tuned_with", {})),
        _list("references", content.get("references", ["ungated", "SFT"]), least=0),
    )
    _require_names(plan)
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
            built[name] = _list(f"{where}: {name}", built[name])
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
    for name in [*plan.tuned_with.keys(), *plan.tuned_with.values()]:
        if name not in plan.teachers:
            raise ConfigError(f"tuned_with: '{name}' is not a teacher", nearest(str(name), list(plan.teachers)))
    for name in plan.references:
        if name not in plan.methods:
            raise ConfigError(f"references: '{name}' is not a method", nearest(str(name), list(plan.methods)))
    if plan.rates_beyond and len(plan.learning_rates) < 2:
        raise ConfigError("rates_beyond: one learning rate has no step to go on by", "Give two learning_rates or more")
    names = [block.name for block in plan.blocks]
    if len(set(names)) < len(names):
        raise ConfigError("blocks: two have the same name", "Name them apart")


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


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}", "Give a mapping")
    return value
