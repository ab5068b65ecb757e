"""What is seen with the models at hand: a sample, the start of the run, a teacher elsewhere beside the one here, the time."""

import math
import os
import time
from collections.abc import Iterator
from itertools import islice
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from speckd.checks import loaded
from speckd.collation import sequences_in
from speckd.doctor.data_tokens import LOOKED_AT, some_sequences
from speckd.doctor.ends import stop_ids
from speckd.doctor.findings import About, Examination, Finding, failure, note, ok, warning
from speckd.doctor.verdicts import Verdicts, sample, verdicts
from speckd.gates import ExpectedSpec, LabelRatio, NoGate
from speckd.run import described
from speckd.settings import Settings
from speckd.teachers.model import ModelSource
from speckd.trainer import SpecKDTrainer, load_teacher
from speckd.types import IGNORED_LABEL

#: Rows, and tokens, whose likelihood is measured.
_MEASURED_ROWS, _MEASURED_TOKENS = 64, 16_384
#: Seconds after which no further micro-batch of the first step is computed.
_SECONDS = 20.0
#: Sequences that are asked of both teachers, and by how much they may differ: nats of the data's token in the mean, and the
#: share of acceptance. Rounding to 16 bits and batches computed otherwise stay below a tenth of it.
_COMPARED, PARITY_NATS, PARITY_VERDICTS = 16, 0.05, 0.02
#: A teacher that gives the end of a row less than this was taught to end otherwise.
_END_EXPECTED = 1e-3
#: Nats by which a likelihood is clearly worse than a blind guess.
_CLEARLY = 0.1


# ---- models ----------------------------------------------------------------------------------------------------------------


def models(trainer: SpecKDTrainer) -> Examination[None]:
    """What they are, and what they put on ids that do not count."""
    for line in described(trainer):
        yield ok(About.LOADED, line[0].lower() + line[1:].rstrip("."))
    if trainer.source is None or not trainer.objective.needs_teacher:
        return
    for source in trainer.model_sources:
        yield from _dropped_of_teacher(trainer, source)
    outside = trainer.vocabulary.outside(trainer.student.get_output_embeddings().weight.shape[0])
    dropped = trainer.mass(trainer.student, outside) if len(outside) else 0.0
    if dropped > trainer.args.max_dropped_mass:
        yield warning(
            About.LOADED,
            f"the student gives {dropped:.1%} of its probability to ids that the teacher lacks, such as padding of its head; "
            "training does not change that, and it may generate them",
            "Give it a head of the tokenizer's size, or generate with suppress_tokens",
        )


def best_checkpoint(trainer: SpecKDTrainer, settings: Settings) -> Examination[None]:
    """By what checkpoints will be chosen, which the doctor's own trainer does not do."""
    trainer.require_measured(settings.training)
    yield from ()


def _dropped_of_teacher(trainer: SpecKDTrainer, source: ModelSource) -> Iterator[Finding]:
    outside = source.vocabulary.outside(source.model.get_output_embeddings().weight.shape[0])
    if not len(outside):
        return
    dropped, most = trainer.mass(source.model, outside, source.device), trainer.args.max_dropped_mass
    who = f"the teacher {source.model.name_or_path}" if trainer.teachers else "the teacher"
    said = f"{who} puts {dropped:.2g} of its probability on ids that are left out (at most: {most:g})"
    if dropped <= most:
        yield ok(About.LOADED, said)
    else:
        fix = "Check that the teacher's weights and tokenizer belong together; its padding should be worth nothing"
        yield failure(About.LOADED, said, fix)


# ---- a sample --------------------------------------------------------------------------------------------------------------


def first_sample(trainer: SpecKDTrainer) -> Examination[None]:
    yield sample(trainer, next(sequences_in(trainer.train_dataset)))


# ---- the start -------------------------------------------------------------------------------------------------------------


def first_step(trainer: SpecKDTrainer) -> Examination[float]:
    """The first optimizer step's batches forward and backward, without the step; its seconds."""
    trainer.model.train()
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    wanted = trainer.args.gradient_accumulation_steps
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), wanted, trainer.accelerator.device)
    seconds: list[float] = []
    for batch in batches:
        if sum(seconds) < _SECONDS:
            seconds.append(_seconds_of(trainer, batch, count))
    metrics = trainer.window_metrics()
    supervised = sum(int((batch["labels"][:, 1:] != IGNORED_LABEL).sum()) for batch in batches[: len(seconds)])
    if "tar" in metrics:
        yield from _acceptance(trainer, metrics, supervised)
    if sum(seconds) < _SECONDS / 4:  # what is computed first is slow
        seconds += [_seconds_of(trainer, batches[0], count) for _ in range(3)]
        trainer.window_metrics()
    trainer.model.zero_grad(set_to_none=True)
    return median(seconds[1:] or seconds) * len(batches)


def _seconds_of(trainer: SpecKDTrainer, batch: dict[str, Any], count: Any) -> float:
    begin = time.perf_counter()
    trainer.training_step(trainer.model, dict(batch), count)
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.synchronize(trainer.accelerator.device)
    return time.perf_counter() - begin


def _acceptance(trainer: SpecKDTrainer, metrics: dict[str, float], supervised: int) -> Iterator[Finding]:
    gate, rate = trainer.objective.gate, metrics["tar_micro"]
    soft = isinstance(gate, (LabelRatio, ExpectedSpec)) and not getattr(gate, "hard", False)
    does = "weighs tokens with" if soft else "accepts"
    said = f"first step, {supervised:,} tokens: TAR {metrics['tar']:.4f} ({rate:.4f} of the tokens)"
    if "divergence" in metrics:
        said += f", divergence {metrics['divergence']:.4f} nats a token"
    yield ok(About.START, said)
    if isinstance(gate, NoGate):
        return
    if rate <= 1e-6:
        fix = "Fine-tune the student first (--recipe sft), verify less strictly, or take the recipe label-ratio"
        yield warning(About.START, f"the gate {does} nothing: hardly anything is learnt from the teacher", fix)
    elif rate < trainer.args.starvation_threshold:
        what = f"the gate {does} less than {trainer.args.starvation_threshold:.0%} (starvation_threshold)"
        yield warning(About.START, what, "Fine-tune the student first (--recipe sft), or verify less strictly")
    elif rate >= 1 - 1e-6 and soft:
        yield note(About.START, "so far the teacher explains the data better everywhere: the gate leaves all to it")
    elif rate >= 1 - 1e-6:
        what = "the gate accepts everything: this is plain distillation"
        yield warning(About.START, what, "Verify more strictly, or take the recipe ungated")


def likelihood(trainer: SpecKDTrainer) -> Examination[None]:
    """Do student and teacher expect the data?"""
    for loud in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(loud)
    held_out = trainer.eval_dataset
    name, dataset = ("training", trainer.train_dataset) if held_out is None else ("held-out", held_out)
    found = trainer.evaluate(_beginning(dataset))
    student, teacher = found["eval_nll"], found.get("eval_teacher_nll")
    guess, of_teacher = math.log(trainer.vocabulary.size), "" if teacher is None else f", of the teacher {teacher:.4f}"
    rows = f"{name} rows, {found['eval_tokens']:,.0f} tokens"
    yield ok(About.START, f"{rows}: NLL of the student {student:.4f}{of_teacher} nats a token; a blind guess has {guess:.2f}")
    if student > guess + _CLEARLY:
        yield note(
            About.START, "the student expects the data less than a blind guess does: it is not trained yet, or not on this"
        )
    if teacher is None:
        return
    named = {"eval_kl": "KL", "eval_kl_at_least": "KL at least", "eval_agreement": "agreement", "eval_tar": "Top-5 TAR"}
    told = ", ".join(f"{label} {found[key]:.4f}" for key, label in named.items() if key in found)
    if told:
        yield ok(About.START, f"{rows}: {told}")
    fix = "Check the teacher: its template, its tokenizer, its weights; or the data, if it is not the teacher's domain"
    if teacher > guess + _CLEARLY:
        yield warning(About.START, "the teacher expects the data less than a blind guess does", fix)
    elif teacher > student:
        yield warning(About.START, "the teacher expects the data less than the student does", fix)


def ends_expected(trainer: SpecKDTrainer, settings: Settings) -> Examination[None]:
    """Does the teacher give the end a chance where rows end?"""
    if trainer.source is None:
        return
    stops = stop_ids(trainer.processing_class, str(settings.model.model_name_or_path), settings.model.model_revision)
    some = some_sequences(trainer.train_dataset, LOOKED_AT)
    asked = list(islice((one for one in some if int(one.token_ids[one.positions[-1] + 1]) in stops), _COMPARED))
    if not asked:
        return
    last = torch.tensor([len(one.positions) for one in asked]).cumsum(0) - 1
    chance = float(verdicts(trainer, asked, trainer.source).teacher[last].median().exp())
    said = f"where rows end the teacher gives the end a probability of {chance:.2g} (median of {len(asked)})"
    if chance >= _END_EXPECTED:
        yield ok(About.START, said)
    else:
        fix = "Let rows end as the teacher ends (eos_token, chat_template_path), or the student will not learn to stop"
        yield warning(About.START, said, fix)


def _beginning(dataset: Dataset) -> Dataset:
    """The first rows, as many as are measured in seconds."""
    taken, held = 0, 0
    for row in dataset.select_columns(["input_ids"]):
        if taken and (taken == _MEASURED_ROWS or held + len(row["input_ids"]) > _MEASURED_TOKENS):
            break
        taken, held = taken + 1, held + len(row["input_ids"])
    return dataset.select(range(taken))


# ---- a teacher elsewhere against the one here ------------------------------------------------------------------------------


def parity(trainer: SpecKDTrainer, settings: Settings) -> Examination[None]:
    """Asks both about the same sequences."""
    name, elsewhere = settings.training.teacher_model_name_or_path, settings.training.teacher
    if trainer.source is None or not settings.teacher_elsewhere:
        return
    if not is_here(name):
        fix = "Name its folder (teacher_model_name_or_path), and what both say is compared"
        yield note(About.PARITY, f"the {elsewhere} was not compared with the teacher itself, which is not here", fix)
        return
    model = loaded(
        "teacher_model_name_or_path", str(name), lambda: load_teacher(str(name), trainer.args, trainer.student.dtype)
    )
    model.to(trainer.args.teacher_device or trainer.accelerator.device).eval().requires_grad_(False)
    here = ModelSource(model, trainer.source.vocabulary, trainer.accelerator.device)
    asked = some_sequences(trainer.train_dataset, _COMPARED)
    yield compared(verdicts(trainer, asked, trainer.source), verdicts(trainer, asked, here), elsewhere)


def compared(elsewhere: Verdicts, here: Verdicts, name: str) -> Finding:
    """What two teachers say of the same tokens."""
    gaps = torch.where(elsewhere.teacher == here.teacher, 0.0, (elsewhere.teacher - here.teacher).abs())
    apart = (elsewhere.acceptance - here.acceptance).abs()
    mean, most, verdict = float(gaps.mean()), float(gaps.max()), float(apart.mean()) if len(apart) else 0.0
    said = (
        f"{len(gaps):,} tokens: verdicts agree to {1 - verdict:.2%}; the log-probability of the data's token differs by "
        f"{mean:.2g} nats in the mean, {most:.2g} at most (allowed: {PARITY_VERDICTS:.0%} and {PARITY_NATS:g} in the mean)"
    )
    if mean <= PARITY_NATS and verdict <= PARITY_VERDICTS:
        return ok(About.PARITY, said)
    fix = "Capture anew" if name == "cache" else "Serve these weights, in this precision, and leave template and padding alone"
    return failure(About.PARITY, f"the {name} is not the teacher that is here: {said}", fix)


# ---- time and room ---------------------------------------------------------------------------------------------------------


def duration(trainer: SpecKDTrainer, seconds: float) -> Examination[None]:
    args = trainer.args
    batches = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(batches * args.num_train_epochs)
    yield ok(
        About.TIME,
        f"about {_span(steps * seconds)}: {steps:,} steps of about {_span(seconds)}, by the clock of the first one's forward "
        "and backward passes; updates, evaluations and checkpoints come on top",
    )


def _span(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def is_here(name: str | None) -> bool:
    """Is it a folder of this machine?"""
    return name is not None and os.path.isdir(name)
