"""What is seen with the models and the prepared data at hand: tokens, a sample, the start of the run, its time."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from speckd.capture import free_beside, layout_of, size_of
from speckd.checks import loaded
from speckd.collation import Wanted, sequences_in
from speckd.doctor.before import SavedBytes, is_here, stop_ids
from speckd.doctor.findings import About, Examination, Finding, failure, note, ok, warning
from speckd.doctor.verdicts import Verdicts, sample, verdicts
from speckd.gates import ExpectedSpec, LabelRatio, NoGate
from speckd.memory_plan import optimizer_bytes
from speckd.settings import Settings
from speckd.teachers.manifest import MANIFEST
from speckd.teachers.model import ModelSource
from speckd.trainer import SpecKDTrainer, load_teacher
from speckd.types import IGNORED_LABEL

#: Rows of the data whose tokens are looked at, spread evenly.
LOOKED_AT = 5_000
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
#: A share that is cut from which on it is worth a warning.
_MANY = 0.1


# ---- tokens of the data ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenFacts:
    """Of some sequences. `tokens`, `supervised`: in all; `whole`: sequences of which everything is supervised; `at_limit`: as
    long as max_length; `ended`: whose supervised tokens end with a stop token; `begun`, `begun_twice`: with the begin token
    once, or twice."""

    sequences: int = 0
    tokens: int = 0
    supervised: int = 0
    whole: int = 0
    at_limit: int = 0
    ended: int = 0
    begun: int = 0
    begun_twice: int = 0
    shortest: int = 0


def token_facts(sequences: list[Wanted], stops: set[int], begin: int | None, limit: int | None) -> TokenFacts:
    return TokenFacts(
        sequences=len(sequences),
        tokens=sum(len(one.token_ids) for one in sequences),
        supervised=sum(len(one.positions) for one in sequences),
        whole=sum(len(one.positions) == len(one.token_ids) - 1 for one in sequences),
        at_limit=sum(len(one.token_ids) == limit for one in sequences),
        # A template may write a line break behind the end of a turn.
        ended=sum(bool(stops & {int(i) for i in one.token_ids[one.positions[-3:] + 1]}) for one in sequences),
        begun=sum(int(one.token_ids[0]) == begin for one in sequences),
        begun_twice=sum(one.token_ids[:2].tolist() == [begin, begin] for one in sequences),
        shortest=min((len(one.token_ids) for one in sequences), default=0),
    )


def some_sequences(dataset: Dataset, most: int) -> list[Wanted]:
    """Sequences from all over a prepared data set."""
    step = max(1, len(dataset) // most)
    return list(islice(sequences_in(dataset.select(range(0, len(dataset), step))), most))


def tokens(trainer: SpecKDTrainer, settings: Settings) -> Examination[None]:
    """Lengths, what is cut and dropped, what is supervised, how rows begin and end."""
    tokenizer, limit = trainer.processing_class, settings.training.max_length
    stops = stop_ids(tokenizer, str(settings.model.model_name_or_path), settings.model.model_revision)
    facts = token_facts(some_sequences(trainer.train_dataset, LOOKED_AT), stops, tokenizer.bos_token_id, limit)
    share = facts.supervised / facts.tokens
    yield ok(
        About.DATA,
        f"{facts.shortest:,} to {trainer.longest_row['train']:,} tokens a row; {share:.0%} of the tokens are supervised "
        f"({facts.supervised:,} of {facts.tokens:,}, in {facts.sequences:,} rows looked at)",
    )
    yield from _lost(trainer, facts, limit)
    yield from _supervised(trainer, facts)
    yield from _ends(tokenizer, facts)
    yield from _begins(tokenizer, facts)


def _lost(trainer: SpecKDTrainer, facts: TokenFacts, limit: int | None) -> Iterator[Finding]:
    raise_it = f"Raise max_length (now {limit}), or shorten the rows"
    for name, dropped in trainer.dropped_rows.items():
        if dropped.rows:
            yield warning(About.DATA, f"{name} data: {dropped}; they are left out", raise_it)
    cut = facts.at_limit / facts.sequences
    if cut:
        said = f"{facts.at_limit:,} of {facts.sequences:,} rows are cut at max_length, or just as long"
        yield (warning if cut > _MANY else note)(About.DATA, said, raise_it)


def _supervised(trainer: SpecKDTrainer, facts: TokenFacts) -> Iterator[Finding]:
    if trainer.completion_only_loss and facts.whole:
        what = f"{facts.whole:,} of {facts.sequences:,} rows are supervised as a whole: their prompts are empty"
        yield warning(About.DATA, what, "Put the prompt into its own column (dataset_prompt_column)")


def _ends(tokenizer: Any, facts: TokenFacts) -> Iterator[Finding]:
    said = f"{facts.ended:,} of {facts.sequences:,} rows end with a supervised {tokenizer.eos_token!r}"
    if not facts.ended:
        fix = "Let the data or the template end with it, inside of what is supervised, or set eos_token to what they end with"
        yield warning(About.DATA, f"{said}: the student will not learn to stop", fix)
    else:
        yield ok(About.DATA, said)


def _begins(tokenizer: Any, facts: TokenFacts) -> Iterator[Finding]:
    if facts.begun_twice:
        what = f"{facts.begun_twice:,} of {facts.sequences:,} rows begin with {tokenizer.bos_token!r} twice"
        yield warning(About.DATA, what, "Take it out of the data: the tokenizer adds it")
    elif facts.begun < facts.sequences and tokenizer.bos_token_id in tokenizer.encode("a")[:1]:
        what = f"{facts.sequences - facts.begun:,} of {facts.sequences:,} rows do not begin with {tokenizer.bos_token!r}"
        yield note(About.DATA, f"{what}, which the tokenizer puts before text")


# ---- models ----------------------------------------------------------------------------------------------------------------


def models(trainer: SpecKDTrainer) -> Examination[None]:
    """What they are, and what they put on ids that do not count."""
    for model, name in ((trainer.model, "student"), (trainer.teacher, "teacher")):
        if model is not None:
            size = sum(p.numel() for p in model.parameters())
            learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
            trained = f", {learning:,} of them trained" if 0 < learning < size else ""
            yield ok(About.LOADED, f"{name}: {size:,} parameters{trained}, {model.dtype}, on {model.device}")
    if trainer.source is None or not trainer.objective.needs_teacher:
        return
    if trainer.teacher is not None:
        yield from _dropped_of_teacher(trainer)
    outside = trainer.vocabulary.outside(trainer.student.get_output_embeddings().weight.shape[0])
    dropped = trainer.mass(trainer.student, outside) if len(outside) else 0.0
    if dropped > trainer.args.max_dropped_mass:
        yield warning(
            About.LOADED,
            f"the student gives {dropped:.1%} of its probability to ids that the teacher lacks, such as padding of its head; "
            "training does not change that, and it may generate them",
            "Give it a head of the tokenizer's size, or generate with suppress_tokens",
        )


def _dropped_of_teacher(trainer: SpecKDTrainer) -> Iterator[Finding]:
    outside = trainer.vocabulary.outside(trainer.teacher.get_output_embeddings().weight.shape[0])
    if not len(outside):
        return
    dropped, most = trainer.mass(trainer.teacher, outside), trainer.args.max_dropped_mass
    said = f"the teacher puts {dropped:.2g} of its probability on ids that are left out (at most: {most:g})"
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
    asked = [
        one for one in some_sequences(trainer.train_dataset, _COMPARED) if int(one.token_ids[one.positions[-1] + 1]) in stops
    ]
    if not asked:
        return
    last = torch.tensor([len(one.positions) for one in asked]).cumsum(0) - 1
    chance = float(verdicts(trainer, asked, trainer.source).teacher[last].median().exp())
    said = f"where rows end the teacher gives the end a probability of {chance:.2g} (median of {len(asked)} rows)"
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


def saved_bytes(trainer: SpecKDTrainer) -> SavedBytes:
    """As `before.saved_bytes`, of what is loaded."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    own = trained if trainer.model is not trainer.student else trainer.model.parameters()
    size, count = sum(p.nbytes for p in trained), sum(p.numel() for p in trained)
    return SavedBytes(sum(p.nbytes for p in own), optimizer_bytes(trainer.args.optim.value, count, size))


def room_for_cache(trainer: SpecKDTrainer, settings: Settings) -> Examination[None]:
    """Where a cache is named that is still to be made."""
    named = settings.training.teacher_cache_dir
    if named is None or (Path(named) / MANIFEST).is_file():
        return
    wanted, layout = trainer.sequences(), layout_of(settings, trainer.vocabulary)
    answers = sum(len(one.positions) for one in wanted)
    needed = layout.estimated_bytes(len(wanted), sum(len(one.token_ids) for one in wanted), answers)
    place, free = free_beside(Path(named))
    said = f"teacher_cache_dir: 'speckd cache' will write about {size_of(needed)}; {place} has {size_of(free)} free"
    if needed <= free:
        yield ok(About.DISK, said)
    else:
        fix = "Lower teacher_top_k, take teacher_cache_bits: 16, or name a folder on a larger disk"
        yield failure(About.DISK, f"too little room: {said}", fix)
