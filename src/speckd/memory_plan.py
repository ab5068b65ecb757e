"""The memory of a training step, by arithmetic alone, bytes in and bytes out; `dry_run` finds the numbers without a model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

KIB, MIB, GIB = 2**10, 2**20, 2**30
_FLOAT32 = 4

#: What the engine's row pass needs beside its buffers of [chunk, V]: a share of one, or a few small tiles.
_TILES_SHARE, _LEAST_TILES = 0.16, 9 * MIB
#: Held-out measures compare two distributions in several ways: buffers of [chunk, V] alive at once.
_MEASURE_BUFFERS = 8

#: Of each optimizer, how many numbers it keeps for a trained parameter, and the bytes of one (None: those of the parameter).
OPTIMIZERS: Mapping[str, tuple[int, float | None]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "stable_adamw"), (2, None)),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam"), (2, None)),
    "schedule_free_sgd": (1, None),
    "grokadamw": (3, None),
    "sgd": (0, None),
    **dict.fromkeys(("adagrad", "rmsprop"), (1, None)),
    **dict.fromkeys(("adafactor", "lomo"), (0, None)),  # adafactor: a row and a column for each matrix
    "paged_adamw_32bit": (2, 4),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), (2, 1)),
    "adamw_torch_4bit": (2, 0.5),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), (3, 4)),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), (3, 1)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), (1, 4)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), (1, 1)),
}
#: Updates that need no room beside parameters, gradients and states.
_UPDATED_IN_PLACE = {"adamw_torch_fused", "sgd", "lomo"}


def optimizer_bytes(name: str, parameters: int, parameter_bytes: int) -> int:
    """What an optimizer keeps between steps; one that is not known counts as AdamW.

    Args:
        name: as in Transformers' `optim`.
        parameters: how many are trained.
        parameter_bytes: of all of these together.
    """
    numbers, size = OPTIMIZERS.get(name, OPTIMIZERS["adamw_torch"])
    return int(numbers * (parameter_bytes if size is None else size * parameters))


def update_bytes(name: str, parameter_bytes: int, largest: int, device_type: str) -> int:
    """What an update needs for its own time: on a CPU parameters are taken one by one, on a GPU all at once.

    Args:
        name: as in Transformers' `optim`.
        parameter_bytes: of all trained parameters together.
        largest: bytes of the largest of them.
        device_type: "cpu", "cuda", ...
    """
    if name in _UPDATED_IN_PLACE:
        return 0
    return 2 * largest if device_type == "cpu" else parameter_bytes


# ---- what is known ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forward:
    """One model over one batch, bytes beside its weights. `peak`: at most; `kept`: at its end, activations included."""

    peak: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Backward:
    """From the last hidden states' gradient to the parameters', the head's own apart; bytes beside the weights.

    `peak`: at most, with the activations left by then; `gradients`: how much of that is parameters' gradients;
    `apart`: the peak of what is no parameter's gradient, for steps of several micro-batches.
    """

    peak: int = 0
    gradients: int = 0
    apart: int = 0


@dataclass(frozen=True)
class Head:
    """The student's, [rows, width]. `vocabulary`: how many of the rows the teacher shares; `trained`: it gets a gradient;
    `tied`: it is the input embedding, too; `number_bytes`: of one number of it."""

    rows: int
    width: int
    vocabulary: int
    trained: bool = True
    tied: bool = False
    number_bytes: int = _FLOAT32

    @property
    def summed(self) -> int:
        """Bytes of the gradient as the engine sums it, in float32; 0 where the head is frozen."""
        return self.trained * self.vocabulary * self.width * _FLOAT32

    @property
    def gradient(self) -> int:
        """Bytes of the gradient as the parameter gets it."""
        return self.trained * self.rows * self.width * self.number_bytes

    @property
    def widened(self) -> int:
        """Bytes of a copy in float32; none of a head that is in float32."""
        return self.vocabulary * self.width * _FLOAT32 * (self.number_bytes < _FLOAT32)

    @property
    def copied(self) -> int:
        """Bytes that the first becomes the second in: none where they are the same."""
        return 0 if self.rows == self.vocabulary and self.number_bytes == _FLOAT32 else self.gradient


@dataclass(frozen=True)
class Evaluation:
    """One held-out batch: the forwards of both models without activations, its tokens, and how many are measured at once."""

    student: Forward
    teacher: Forward
    tokens: int
    chunk: int


@dataclass(frozen=True)
class Holes:
    """What an allocator keeps and cannot use, as a share of what is in use beside the loss; `in_recomputing`: in a backward
    pass that makes activations anew among the gradients."""

    share: float = 0.0
    in_recomputing: float = 0.0


@dataclass(frozen=True)
class StepFacts:
    """What is known of a run before its models are loaded; bytes where nothing else is said.

    `student`, `teacher`: weights and buffers on the device that trains (of a teacher elsewhere, its head); `gradients`: of all
    trained parameters; `buckets`: DDP's copy of them; `optimizer`, `update`: by `optimizer_bytes` and `update_bytes`;
    `accumulates`: are there several micro-batches a step; `tokens`: of a micro-batch;
    `chunk`: how many of them have their logits held at once; `distils`: do the teacher's logits stand beside the student's;
    `evaluation`: None where nothing is held out; `recomputes`: is gradient checkpointing on;
    `keeps_room`: does the engine's room for logits and gradients stay between steps (`speckd.large`);
    `process`: what the program takes beside all that; `holes`: and its allocator.
    """

    student: int
    teacher: int
    gradients: int
    optimizer: int
    update: int
    head: Head
    tokens: int
    chunk: int
    student_forward: Forward
    backward: Backward
    teacher_forward: Forward = Forward()
    distils: bool = True
    buckets: int = 0
    accumulates: bool = False
    evaluation: Evaluation | None = None
    recomputes: bool = False
    keeps_room: bool = False
    process: int = 0
    holes: Holes = Holes()

    def logits_room(self, tokens: int) -> int:
        """Bytes of the engine's buffers of [chunk, vocabulary] for a batch of so many tokens."""
        return (1 + self.distils) * min(self.chunk, tokens) * self.head.vocabulary * _FLOAT32

    @property
    def gradient_room(self) -> int:
        """Bytes of the gradients that the engine sums: the hidden states' and the head's."""
        return self.tokens * self.head.width * _FLOAT32 + self.head.summed

    @property
    def room(self) -> int:
        return self.logits_room(self.tokens) + self.gradient_room

    @property
    def kept(self) -> int:
        """Of the engine's room, what stays from step to step: that of larger held-out batches, too."""
        seen = 0 if self.evaluation is None else self.logits_room(self.evaluation.tokens)
        larger = seen if seen > self.logits_room(self.tokens) else 0
        return self.room + larger if self.keeps_room else 0


# ---- what follows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What is alive at one moment, bytes. `activations`: all that the student's forward and backward hold but parameters'
    gradients; `teacher_at_work`: its forward, then its hidden states; `loss`: the engine's room, and what works in it."""

    student: int = 0
    teacher: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    teacher_at_work: int = 0
    loss: int = 0
    process: int = 0
    holes: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def in_use(self) -> int:
        return self.total - self.holes

    def with_holes(self, share: float) -> "Parts":
        """The engine's room is the system's own, and leaves none."""
        return replace(self, holes=int(share * (self.in_use - self.loss)))


BACKWARD = "the backward pass"


@dataclass(frozen=True)
class MemoryPlan:
    """The moments of a step, by name, and what is alive in each."""

    moments: Mapping[str, Parts]

    @property
    def moment(self) -> str:
        """The one that needs most."""
        return max(self.moments, key=lambda name: self.moments[name].total)

    @property
    def peak(self) -> Parts:
        return self.moments[self.moment]


def plan(facts: StepFacts) -> MemoryPlan:
    """What is alive in each moment of a step; of any but the first, in which the optimizer has no state yet."""
    answers = facts.teacher_forward
    moments = {
        "the teacher's forward": _before_backward(facts, teacher_at_work=answers.peak),
        "the student's forward": _before_backward(facts, facts.student_forward.peak, answers.kept),
        "the loss": _before_backward(facts, facts.student_forward.kept, answers.kept, _loss(facts)),
        BACKWARD: max(_backward(facts), key=lambda parts: parts.total),
        "the optimizer's step": _optimizer_step(facts),
    }
    if facts.evaluation is not None:
        moments["the evaluation"] = _evaluation(facts, facts.evaluation)
    recomputing = facts.holes.in_recomputing if facts.recomputes else facts.holes.share
    shares = {name: recomputing if name == BACKWARD else facts.holes.share for name in moments}
    return MemoryPlan({name: parts.with_holes(shares[name]) for name, parts in moments.items()})


def _parts(
    facts: StepFacts,
    gradients: int,
    optimizer: int | None = None,
    activations: int = 0,
    teacher_at_work: int = 0,
    loss: int = 0,
) -> Parts:
    """One moment: what is there throughout, and what is given."""
    return Parts(
        facts.student,
        facts.teacher,
        gradients + facts.buckets,
        facts.optimizer if optimizer is None else optimizer,
        activations,
        teacher_at_work,
        facts.kept + loss,
        facts.process,
    )


def _before_backward(facts: StepFacts, activations: int = 0, teacher_at_work: int = 0, loss: int = 0) -> Parts:
    gradients = facts.gradients if facts.accumulates else 0
    return _parts(facts, gradients, activations=activations, teacher_at_work=teacher_at_work, loss=loss)


def tiles_bytes(tokens: int, vocabulary: int) -> int:
    """What the engine works with beside its two buffers of [tokens, vocabulary]."""
    return max(_LEAST_TILES, int(_TILES_SHARE * tokens * vocabulary * _FLOAT32))


def measure_bytes(tokens: int, vocabulary: int) -> int:
    """What held-out measures take for the logits of some tokens."""
    return _MEASURE_BUFFERS * tokens * vocabulary * _FLOAT32


def _loss(facts: StepFacts) -> int:
    return tiles_bytes(min(facts.chunk, facts.tokens), facts.head.vocabulary) + (0 if facts.kept else facts.room)


def _backward(facts: StepFacts) -> list[Parts]:
    """Its start, where the head's gradient becomes the parameter's; the way through the layers; and what comes last."""
    head, backward = facts.head, facts.backward
    start = _before_backward(facts, facts.student_forward.kept, loss=head.copied + (0 if facts.kept else facts.gradient_room))
    apart = head.gradient if head.copied or not facts.kept else 0  # of the head's gradient, what is not the engine's room
    waiting = apart if head.tied else 0  # for the gradient of the embedding
    if facts.accumulates:
        return [start, _parts(facts, facts.gradients, activations=backward.apart, loss=waiting)]
    gradients = backward.gradients + apart - waiting
    way = _parts(facts, gradients, activations=backward.peak - backward.gradients, loss=waiting)
    if not head.tied or apart:
        return [start, way]
    return [start, way, _parts(facts, facts.gradients, activations=head.gradient)]  # two gradients, added into a third


def _optimizer_step(facts: StepFacts) -> Parts:
    head = facts.head
    in_room = facts.kept and not (head.copied or head.tied or facts.accumulates)
    gradients = facts.gradients - (head.gradient if in_room else 0)
    return _parts(facts, gradients, optimizer=facts.optimizer + facts.update)


def _evaluation(facts: StepFacts, seen: Evaluation) -> Parts:
    measured = measure_bytes(min(seen.chunk, seen.tokens), facts.head.vocabulary) + facts.head.widened
    tiles = tiles_bytes(min(facts.chunk, seen.tokens), facts.head.vocabulary)
    measured = max(measured, tiles + (0 if facts.kept else facts.logits_room(seen.tokens)))
    candidates = (
        Parts(teacher_at_work=seen.teacher.peak),
        Parts(teacher_at_work=seen.teacher.kept, activations=seen.student.peak),
        Parts(teacher_at_work=seen.teacher.kept, activations=seen.student.kept, loss=measured),
    )
    most = max(candidates, key=lambda parts: parts.total)
    return _parts(facts, 0, activations=most.activations, teacher_at_work=most.teacher_at_work, loss=most.loss)
