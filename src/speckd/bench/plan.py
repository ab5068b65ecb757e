"""What a benchmark compares: one YAML file -> frozen data, and the single runs that it asks for.

A run is known by everything that decides its outcome (`Run.key`): a plan that has changed runs only what is new.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, Literal

from speckd.tasks import FAMILIES

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


def file_name(block: str) -> str:
    """What a block's pictures are called by."""
    return "".join(c if c.isalnum() else "-" for c in block).strip("-")


#: The shipped teacher's shape.
SHIPPED = Shape(144, 4, 6)


def parameters(shape: Shape) -> int:
    """About how many: attention and a gated feed-forward of 8/3, without embeddings."""
    return 12 * shape.layers * shape.hidden**2
