"""One training step on tensors without numbers: what it would allocate, from the models' configurations alone.

PyTorch's fake tensors have shapes and devices but no memory, so the models' own code runs before their weights are loaded:
attention, adapters, autocast and checkpointing count as they are, whatever the architecture.
"""

import logging
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig

from speckd.engine import default_chunk_size
from speckd.head import LMHead
from speckd.memory_plan import MIB, Backward, Evaluation, Forward, Head, Holes, StepFacts, optimizer_bytes, update_bytes

#: What `speckd train` takes beside models and batches, measured with models of 1 MiB: data, logs, libraries loaded late.
PROCESS_BYTES = 40 * MIB
#: glibc's malloc, measured by benchmarks/memory_plan.py; what PyTorch's allocator keeps on a GPU is not foreseen.
HOLES = {"cpu": Holes(share=0.16, in_recomputing=0.25)}


@dataclass(frozen=True)
class ModelShape:
    """A model that is not loaded: `options` go to `AutoModelForCausalLM.from_config` (dtype, attn_implementation, ...)."""

    config: PretrainedConfig
    options: Mapping[str, Any]


@dataclass(frozen=True)
class BatchShape:
    """`rows` of `tokens`, padded; `flat`: the rows stand one behind the other in one, told apart by their positions."""

    rows: int
    tokens: int
    flat: bool = False

    def inputs(self) -> dict[str, Tensor]:
        """What the collator would give a model, [B, L]."""
        if self.flat:
            ids = torch.zeros(1, self.rows * self.tokens, dtype=torch.int64)
            return {"input_ids": ids, "position_ids": torch.zeros_like(ids)}
        ids = torch.zeros(self.rows, self.tokens, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class RunShape:
    """What decides the memory of a run.

    `teacher`: None where there is none; `teacher_elsewhere`: has it devices of its own; `more_teachers`: beside it;
    `teacher_pieces`: over how many processes they are cut; `base_teaches`: does the student's own base; `chunk`: tokens whose
    logits stand at once; `vocabulary`: tokens that all share; `distils`: does the loss ask the teacher; `adapter`: PEFT's
    settings; `evaluation`: a held-out batch, or None; `autocast`: of the student's forward, None for that of the weights;
    `checkpointing`: the options of gradient checkpointing, None where it is off; `distributed`: does DDP wrap the student.
    """

    student: ModelShape
    teacher: ModelShape | None
    batch: BatchShape
    device: torch.device
    chunk: int
    vocabulary: int
    distils: bool = True
    teacher_elsewhere: bool = False
    more_teachers: tuple[ModelShape, ...] = ()
    teacher_pieces: int = 1
    base_teaches: bool = False
    adapter: PeftConfig | None = None
    evaluation: BatchShape | None = None
    autocast: torch.dtype | None = None
    checkpointing: Mapping[str, Any] | None = None
    optimizer: str = "adamw_torch_fused"
    accumulates: bool = False
    distributed: bool = False


def step_facts(run: RunShape) -> StepFacts:
    """What the planner must know of a run, found without allocating any of it.

    Raises:
        Exception: whatever a model's code raises where its course depends on numbers, which fake tensors do not have.
    """
    student = _student(run)
    teachers = [_built(shape).eval().requires_grad_(False) for shape in (run.teacher, *run.more_teachers) if shape is not None]
    with _quiet(), FakeTensorMode(), torch.device(run.device), torch.autograd.set_multithreading_enabled(False):
        student, teachers = _placed(student), [_placed(teacher) for teacher in teachers]
        asked = [student.eval()] if run.base_teaches else teachers
        answers, held_out = _answers(asked, run.batch, run.teacher_elsewhere), _held_out(student.eval(), asked, run)
        forward, backward = student_step(student.train(), run)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        gradients, name = _bytes(trained), run.optimizer
        return StepFacts(
            student=_bytes([*student.parameters(), *student.buffers()]),
            teacher=sum(_weights_here(teacher, run) for teacher in teachers),
            gradients=gradients,
            optimizer=optimizer_bytes(name, sum(parameter.numel() for parameter in trained), gradients),
            update=update_bytes(name, gradients, max(map(_size, trained), default=0), run.device.type),
            head=_head(student, run.vocabulary),
            tokens=run.batch.rows * run.batch.tokens,
            chunk=run.chunk,
            student_forward=forward,
            backward=backward,
            teacher_forward=answers,
            distils=run.distils,
            buckets=gradients if run.distributed else 0,
            accumulates=run.accumulates,
            evaluation=held_out,
            recomputes=run.checkpointing is not None,
            keeps_room=run.device.type == "cpu" and sys.platform == "linux",
            process=PROCESS_BYTES,
            holes=HOLES.get(run.device.type, Holes()),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """What cannot be run is said by whoever asked; PyTorch would print a traceback as well."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _built(shape: ModelShape) -> Any:
    """On the meta device, as `from_pretrained` begins, too."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape.config, **shape.options)


def _student(run: RunShape) -> Any:
    """The causal language model itself, with its adapter inside, as the trainer would prepare it."""
    student = _built(run.student)
    if run.adapter is not None:
        with torch.device("meta"):
            adapted = get_peft_model(student, deepcopy(run.adapter))  # a copy, for PEFT completes it
        if run.checkpointing is not None:
            adapted.enable_input_require_grads()
        student = adapted.get_base_model()
    if run.checkpointing is not None:
        student.gradient_checkpointing_enable(dict(run.checkpointing) or None)
    return student


def _placed(model: Any) -> Any:
    """The model with fake tensors, on the device at hand, for its meta tensors; one for each, however many names it has."""
    places = [
        (module, name, tensor)
        for module in model.modules()
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    ]
    fakes: dict[int, Tensor] = {}
    for module, name, tensor in places:
        if id(tensor) not in fakes:
            fake = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            fakes[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        setattr(module, name, fakes[id(tensor)])
    return model


def _head(student: Any, vocabulary: int) -> Head:
    weight = LMHead.from_model(student).weight
    rows, width = weight.shape
    tied = student.get_input_embeddings().weight is weight
    return Head(rows, width, min(rows, vocabulary), weight.requires_grad, tied, weight.element_size())


def _held_out(student: Any, teachers: Sequence[Any], run: RunShape) -> Evaluation | None:
    if run.evaluation is None:
        return None
    answers = _answers(teachers, run.evaluation, run.teacher_elsewhere)
    tokens, chunk = run.evaluation.rows * run.evaluation.tokens, default_chunk_size(run.vocabulary)
    return Evaluation(_forward(student, run.evaluation, run.autocast), answers, tokens, chunk)


def _answers(teachers: Sequence[Any], batch: BatchShape, elsewhere: bool) -> Forward:
    """The teachers' forwards, one after the other; of those on a device of their own, only the hidden states come here."""
    peak = kept = 0
    for teacher in teachers:
        there = _forward(teacher, batch)
        peak = max(peak, kept + (there.kept if elsewhere else there.peak))
        kept += there.kept
    return Forward(peak, kept)


def _weights_here(teacher: Any, run: RunShape) -> int:
    """Of a teacher on a device of its own, only a copy of the head is on the student's; of one in pieces, head and piece."""
    head, whole = _bytes([LMHead.from_model(teacher).weight]), _bytes([*teacher.parameters(), *teacher.buffers()])
    return head if run.teacher_elsewhere else head + (whole - head) // run.teacher_pieces


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Each storage once, however many names it has."""
    return sum({tensor.untyped_storage()._cdata: _size(tensor) for tensor in tensors}.values())


# ---- the step itself -------------------------------------------------------------------------------------------------------


def _autocast(device_type: str, dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)


@torch.no_grad()
def _forward(model: Any, batch: BatchShape, autocast: torch.dtype | None = None) -> Forward:
    inputs = batch.inputs()
    with LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as live:
        with _autocast(model.device.type, autocast):
            hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        return Forward(live.peak, _size(hidden))


def student_step(student: Any, run: RunShape) -> tuple[Forward, Backward]:
    """Forward and backward without the head, whose products and gradients are the engine's, which goes chunk by chunk."""
    inputs = run.batch.inputs()
    live = LiveBytes([*student.parameters(), *student.buffers(), *inputs.values()])
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(live.is_gradient) for parameter in trained]
    with live:
        with _autocast(run.device.type, run.autocast):
            hidden = student.get_decoder()(**inputs, use_cache=False).last_hidden_state
            forward = Forward(live.peak, live.now)
        live.start_anew()
        hidden.backward(torch.zeros_like(hidden))
    for hook in hooks:
        hook.remove()
    return forward, Backward(live.peak, live.gradients_at_peak, live.peak_apart)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes that operations have allocated and not yet freed, and how much of that is parameters' gradients."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        """`given`: what was there before, and is not counted."""
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.gradients = 0
        self.start_anew()
        for tensor in given:
            self._remember(tensor.untyped_storage(), 0)

    def start_anew(self) -> None:
        """Peaks are those from here on: of everything, and of what is no gradient."""
        self.peak, self.gradients_at_peak, self.peak_apart = self.now, self.gradients, self.now - self.gradients

    def is_gradient(self, parameter: Tensor) -> None:
        """The hook of a parameter that has got its gradient."""
        assert parameter.grad is not None
        self.gradients += _size(parameter.grad)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._remember(leaf.untyped_storage(), _size(leaf))
        return made

    def _remember(self, storage: torch.UntypedStorage, size: int) -> None:
        place = storage._cdata
        if place in self._sizes:  # another view of it
            return
        self._sizes[place] = size
        weakref.finalize(storage, self._forget, place)
        self.now += size
        self.peak_apart = max(self.peak_apart, self.now - self.gradients)
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients

    def _forget(self, place: int) -> None:
        self.now -= self._sizes.pop(place)
