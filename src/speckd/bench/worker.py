"""One run of a benchmark: start, train, measure. A plain loop; everything it depends on is in `Run`."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speckd import LMHead, Objective, distillation_loss, supervised_rows
from speckd.bench import makers
from speckd.bench.oracle import Oracle
from speckd.bench.plan import Method, Run
from speckd.config import MethodConfig
from speckd.errors import ConfigError
from speckd.evaluate import evaluate
from speckd.gates import NoGate
from speckd.metrics import AcceptanceTally
from speckd.policies import Label
from speckd.quickstart.compare import matches, places
from speckd.quickstart.data import Encoded, batches, collate, encode
from speckd.quickstart.evaluation import block_efficiency, generate_greedy
from speckd.tasks import FAMILIES, verify_all
from speckd.teachers import DenseTeacher, ScrambledTeacher, TopKTeacher
from speckd.tokens import SupervisedRows, TokenBatch
from speckd.trust_gates import Trust
from speckd.types import TeacherRows

_BINS = 15


def objective_of(method: Method, run: Run | None = None) -> Objective:
    """The method's loss. `run`: whose scrambling an oracle knows.

    Raises:
        ConfigError: a setting that is none, or one that makes no sense.
    """
    try:
        built = MethodConfig(**dict(method.settings)).objective()
    except TypeError as error:
        raise ConfigError(f"a method's {str(error).split(') ')[-1]}", "See speckd options for the method's settings") from None
    if built.needs_reference:
        raise ConfigError("a method's gate compares with a reference model, and a benchmark has none", "Name another gate")
    if method.oracle and run is not None:
        return replace(built, gate=Oracle(run.teacher.scrambled, run.seed))
    return built


def asks_for_labels(objective: Objective) -> bool:
    """Does it learn from the data's tokens, or is its trust in the teacher read off them?"""
    learns = isinstance(objective.rejected, Label) and not isinstance(objective.gate, NoGate)
    return learns or objective.label_loss_weight > 0 or objective.learns_labels or isinstance(objective.gate, Trust)


def train_and_measure(run: Run, folder: Path) -> dict[str, Any]:
    """`measures` (held out, against the clean teacher), `right` (each task, one character), TAR and seconds of training."""
    student = makers.starting_student(run, folder)
    began = time.process_time()
    rates = train(student, run, folder) if run.steps else {}
    seconds = time.process_time() - began
    return {**measure(student, run, folder), "training": rates, "seconds": round(seconds, 2)}


# ---- training ----------------------------------------------------------------------------------------------------------------


def train(student: Any, run: Run, folder: Path) -> dict[str, float]:
    """Trains in place; returns the acceptance rates of all steps together."""
    assert run.method is not None
    objective = objective_of(run.method, run)
    optimizer = torch.optim.AdamW(student.parameters(), lr=run.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.learning_rate, run.steps + 1, pct_start=0.1)
    tally = AcceptanceTally()
    student.train()
    for batch, mask, teacher, rows in _batches(student, run, folder):
        hidden = student.get_decoder()(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        output = distillation_loss(objective, hidden.flatten(0, 1), LMHead.from_model(student), teacher, rows)
        (output.sum / output.count).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tally.add(output)
    student.eval()
    return {name: value for name, value in tally.result().items() if name in ("tar", "tar_micro")}


Batch = tuple[TokenBatch, Tensor, TeacherRows, SupervisedRows]


def _batches(student: Any, run: Run, folder: Path) -> Iterator[Batch]:
    """Batches on the run's device; on student text, what the student has just written is judged by the teacher itself."""
    world = run.world
    order = batches(world.train, world.batch_size, run.seed + 1000, run.steps)
    if run.data != "student text":
        texts, logits = makers.stored_answers(world, run.teacher.base, run.data == "teacher text", folder)
        yield from _judged(texts, logits, order, run)
        return
    tasks, teacher = makers.training_tasks(world), makers.teacher_model(world, run.teacher.base, folder)
    rounds = list(order)
    for first in range(0, run.steps, world.refresh):
        own = rounds[first : first + world.refresh]
        asked = sorted({i for chosen in own for i in chosen})
        student.eval()
        texts = makers.written(student, [tasks[i] for i in asked], world, seed=run.seed * 1000 + first)
        student.train()
        logits = makers.supervised_logits(teacher, [makers.shown(e, run.teacher.prefix) for e in texts])
        place = {number: i for i, number in enumerate(asked)}
        yield from _judged(texts, logits, iter([[place[i] for i in chosen] for chosen in own]), run)


def _judged(texts: list[Encoded], logits: Tensor, order: Iterator[list[int]], run: Run) -> Iterator[Batch]:
    """`logits`: of the supervised tokens of all texts, one text after the other."""
    sizes = torch.tensor([0] + [len(e.ids) - e.prompt_length for e in texts])
    first = torch.zeros(run.world.train, dtype=torch.long)
    first[torch.tensor([e.sample for e in texts])] = sizes.cumsum(0)[:-1]
    for chosen in order:
        own = [texts[i] for i in chosen]
        batch, mask = collate(own, makers.tokenizer().pad_token_id)
        rows = supervised_rows(batch, seed=run.seed)
        place = places(batch, rows, own, first)
        device = run.world.device
        batch, mask = _on(device, batch, mask)
        needed, place = place.unique(return_inverse=True)
        teacher = _teacher(logits[needed].to(device), place.to(device), batch, run)
        yield batch, mask, teacher, supervised_rows(batch, seed=run.seed)


def _on(device: str, batch: TokenBatch, mask: Tensor) -> tuple[TokenBatch, Tensor]:
    tensors = (batch.input_ids, batch.labels, batch.sample_ids, batch.position_ids)
    return TokenBatch(*(tensor.to(device) for tensor in tensors)), mask.to(device)


def _teacher(logits: Tensor, place: Tensor, batch: TokenBatch, run: Run) -> TeacherRows:
    """The base teacher's logits, then scrambled, then cut to its top-K."""
    spec = run.teacher
    dense = DenseTeacher(logits, place)
    samples, positions = batch.sample_ids.flatten(), batch.position_ids.flatten()
    teacher = ScrambledTeacher(dense, spec.scrambled, samples, positions, run.seed) if spec.scrambled else dense
    if spec.top_k is None:
        return teacher
    every = torch.arange(len(place), device=place.device)
    log_probs = teacher.signal(every).logits.log_softmax(-1)
    next_tokens = batch.input_ids.roll(-1, dims=1).flatten()
    top = log_probs.topk(spec.top_k)
    return TopKTeacher(top.indices, top.values, log_probs.gather(-1, next_tokens[:, None])[:, 0])


# ---- measuring ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(student: Any, run: Run, folder: Path) -> dict[str, Any]:
    """Held-out measures of a student against the clean teacher, on the split that the run names."""
    student.eval()
    pad, end = makers.tokenizer().pad_token_id, makers.tokenizer().eos_token_id
    examples = makers.measured_examples(run.world, run.split)
    encoded = encode(examples, makers.tokenizer())
    batch = _on(run.world.device, *collate(encoded, pad))
    found = evaluate(student, makers.clean_teacher(run.world, folder), None, [batch])
    found |= {"ece": _calibration_error(student, *batch)}
    if run.split == "validation":
        return {"measures": _rounded(found)}
    answers = generate_greedy(student, encoded, end, pad)
    right = verify_all(examples, makers.tokenizer().batch_decode(answers))
    families = {
        f: sum(r for r, e in zip(right, examples, strict=True) if e.family == f) / sum(e.family == f for e in examples)
        for f in FAMILIES
    }
    found |= {"accuracy": sum(families.values()) / len(families), **families}
    found["tau"] = block_efficiency(
        matches(student, encoded, makers.teacher_texts(run.world, run.split, folder), makers.tokenizer())
    )
    return {"measures": _rounded(found), "right": "".join("01"[r] for r in right)}


def _calibration_error(student: Any, batch: TokenBatch, mask: Tensor) -> float:
    """Expected calibration error of the most probable token, over supervised tokens in 15 bins of equal width."""
    rows = supervised_rows(batch)
    hidden = student.get_decoder()(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    sure, token = LMHead.from_model(student)(hidden.flatten(0, 1)[rows.index]).softmax(-1).max(-1)
    right = (token == rows.labels).double()
    place = (sure * _BINS).long().clamp(max=_BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64, device=place.device).index_add(0, place, right - sure.double())
    return float(gaps.abs().sum() / len(rows))


def _rounded(measures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in measures.items()}
