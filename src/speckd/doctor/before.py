"""What can be seen before a model is loaded: settings, tokenizers, end tokens, template, a teacher elsewhere, memory, disk."""

import copy
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from speckd.capture import free_beside, size_of
from speckd.checks import (
    check_shapes,
    checkpoint_to_resume,
    loaded,
    output_folder,
    require_end_token,
    require_k_below,
    require_student,
    require_teacher,
    require_template,
    student_tokenizer,
    teacher_tokenizer,
)
from speckd.compatibility import shared_vocabulary
from speckd.data import is_conversational, load_data
from speckd.doctor.findings import About, Examination, Finding, failure, note, ok, warning
from speckd.errors import DataError, SpeckdError
from speckd.memory_report import Foreseen, foresee
from speckd.run import adapter_of, describe_method
from speckd.settings import Settings, load_settings
from speckd.teacher_sources import probe_texts, source_elsewhere
from speckd.teachers.cached import CachedSource
from speckd.teachers.served import ServedSource
from speckd.trl_internals import marks_assistant

Data = tuple[Dataset, Dataset | None]

#: Seconds that a teacher's server may take to answer for the first time; a run waits longer.
READY_S = 5.0
#: A cache up to this size is read through.
SMALL_CACHE = 256 * 2**20
#: Rows that are looked at one by one.
_ROWS = 100_000


def settings_of(config: Path | None, recipe: str | None, flags: list[str]) -> Examination[Settings]:
    settings = load_settings(config, recipe, flags)
    named = f"recipe {settings.recipe}: " if settings.recipe else ""
    yield ok(About.SETTINGS, f"{named}{describe_method(settings)}")
    return settings


def output(settings: Settings) -> Examination[None]:
    folder = output_folder(settings)
    checkpoint = checkpoint_to_resume(settings, folder)
    goes_on = "is written into" if checkpoint is None else f"goes on from {checkpoint} in"
    yield ok(About.SETTINGS, f"the run {goes_on} {folder}")


# ---- models and vocabulary -------------------------------------------------------------------------------------------------


def student(settings: Settings) -> Examination[Any]:
    """The student's tokenizer as it is trained with."""
    require_student(settings)
    own = as_trained(settings, student_tokenizer(settings))
    require_k_below(settings, len(own))
    yield ok(About.MODELS, f"student: {settings.model.model_name_or_path}, a tokenizer of {len(own):,} tokens")
    return own


def as_trained(settings: Settings, tokenizer: Any) -> Any:
    """With the template and the end token that TRL will give it."""
    path = settings.training.chat_template_path
    if path is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if path.endswith((".jinja", ".j2")):
        if Path(path).is_file():  # else refused where the template is looked at
            tokenizer.chat_template = Path(path).read_text()
        return tokenizer
    source = loaded("chat_template_path", path, lambda: AutoTokenizer.from_pretrained(path))
    tokenizer.chat_template = source.chat_template
    tokenizer.eos_token = source.eos_token
    return tokenizer


def teacher(settings: Settings) -> Examination[bool]:
    """Is it there, as far as this process has to load it?"""
    require_teacher(settings)
    if settings.teacher_model is not None:
        yield ok(About.MODELS, f"teacher: {settings.teacher_model}")
    return True


def tokenizer_of_teacher(settings: Settings) -> Examination[Any]:
    """None where the teacher is not known by name, or is elsewhere and not to be had here."""
    name = settings.training.teacher_model_name_or_path
    if name is None:
        return None
    if settings.teacher_model is not None:
        return teacher_tokenizer(settings, name)
    try:
        return teacher_tokenizer(settings, name)
    except SpeckdError:
        yield note(About.MODELS, f"the teacher itself ({name}) is not here: it is not compared with what is elsewhere")
        return None


def vocabulary(settings: Settings, own: Any, theirs: Any) -> Examination[bool]:
    """Do both cut text alike, and what has only one of them?"""
    names = settings.model.model_name_or_path, settings.training.teacher_model_name_or_path
    revisions = settings.model.model_revision, settings.training.teacher_model_revision or "main"
    widths = [head_width(settings, str(name), revision) for name, revision in zip(names, revisions, strict=True)]
    known = own.get_vocab(), theirs.get_vocab()
    rows = [max(vocab.values()) + 1 if width is None else width for width, vocab in zip(widths, known, strict=True)]
    shared = shared_vocabulary(own, theirs, rows[0], rows[1])
    yield ok(About.MODELS, f"both cut text alike and share {shared.size:,} tokens")
    for name, width, vocab, other in zip(("student", "teacher"), widths, known, reversed(known), strict=True):
        yield from _one_sided(name, vocab, other)
        if width is not None:
            yield from _padded(name, width, vocab)
    return True


def head_width(settings: Settings, name: str, revision: str) -> int | None:
    """Rows of a model's head, by its configuration; None where that does not say."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=settings.training.trust_remote_code)
    except (OSError, ValueError):  # an adapter's folder
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def _one_sided(name: str, vocab: dict[str, int], other: dict[str, int]) -> Iterator[Finding]:
    alone = sorted(vocab.keys() - other.keys(), key=vocab.__getitem__)
    if alone:
        shown = ", ".join(map(repr, alone[:3])) + (", …" if len(alone) > 3 else "")
        does = "the data may not hold them" if name == "student" else "what it puts on them may be max_dropped_mass at most"
        yield note(About.MODELS, f"{len(alone):,} tokens are the {name}'s alone ({shown}): {does}")


def _padded(name: str, width: int, vocab: dict[str, int]) -> Iterator[Finding]:
    padding, beyond = width - sum(i < width for i in vocab.values()), sum(i >= width for i in vocab.values())
    if padding:
        yield note(
            About.MODELS,
            f"the {name}'s head is padded: {width:,} rows for {width - padding:,} tokens; the other {padding:,} are left out "
            "of gate and loss",
        )
    if beyond:
        yield warning(
            About.MODELS,
            f"{beyond:,} tokens of the {name}'s tokenizer have no row in its head ({width:,} rows)",
            "Resize the model's embeddings, or use the tokenizer that it was trained with",
        )


# ---- end tokens and template -----------------------------------------------------------------------------------------------


def end_tokens(settings: Settings, own: Any, theirs: Any) -> Examination[bool]:
    """Will the student learn to stop, and does the teacher expect the end where the student learns it?"""
    require_end_token(own)
    begins = "" if own.bos_token is None else f", begins with {own.bos_token!r}"
    pads = "its end token, which is learnt nevertheless" if own.pad_token == own.eos_token else repr(own.pad_token)
    yield ok(About.ENDS, f"the student ends with {own.eos_token!r} (id {own.eos_token_id}), pads with {pads}{begins}")
    name, revision = str(settings.model.model_name_or_path), settings.model.model_revision
    configured = stop_ids(None, name, revision)
    if configured and own.eos_token_id not in configured:
        yield note(About.ENDS, f"the student's generation_config stops at {sorted(configured)}; training adds its end token")
    if theirs is not None:
        yield from _ends_of_both(settings, own, theirs)
    return True


def _ends_of_both(settings: Settings, own: Any, theirs: Any) -> Iterator[Finding]:
    name = str(settings.training.teacher_model_name_or_path)
    stops = stop_ids(theirs, name, settings.training.teacher_model_revision or "main")
    if not stops:
        yield warning(About.ENDS, "the teacher has no end token: it may never expect an end", "Use a teacher that has one")
    elif own.eos_token_id not in stops:
        there = ", ".join(repr(theirs.convert_ids_to_tokens(i)) for i in sorted(stops))
        shared = theirs.eos_token in own.get_vocab()
        fix = f"Set eos_token: {json.dumps(theirs.eos_token, ensure_ascii=False)}" if shared else "Do not mix them"
        yield failure(
            About.ENDS,
            f"the student ends with {own.eos_token!r}, the teacher with {there}, as when one is a base and the other an "
            "instruct model: the teacher never expects the end of the data, and the student would not learn to stop",
            f"{fix}, or chat_template_path: {name}, or use a student and a teacher that are both base or both instruct",
        )
    else:
        yield ok(About.ENDS, "the teacher ends with the same")


def stop_ids(tokenizer: Any, name: str, revision: str) -> set[int]:
    """At which tokens a model stops: its tokenizer's end (if given), and those of its generation configuration."""
    own = [] if tokenizer is None else [tokenizer.eos_token_id]
    try:
        configured = GenerationConfig.from_pretrained(name, revision=revision).eos_token_id
    except (OSError, ValueError):  # there need not be one
        configured = None
    return {i for i in (*own, *(configured if isinstance(configured, list) else [configured])) if i is not None}


def template(settings: Settings, own: Any, theirs: Any, train: Dataset) -> Examination[bool]:
    """Does it render the data (else it raises), and does it say what is to be learnt?"""
    conversational = is_conversational(train)
    taught_by_template = theirs is not None and theirs.chat_template is not None
    borrowed = f"Set chat_template_path: {settings.training.teacher_model_name_or_path}"
    try:
        require_template(settings, own, conversational)
    except SpeckdError as error:
        if taught_by_template and own.chat_template is None:
            what = f"{error.what}, and the teacher's has one: a base student with an instruct teacher"
            raise DataError(what, f"{borrowed}, or use a student of the teacher's kind") from None
        raise
    if taught_by_template and own.chat_template != theirs.chat_template:
        has = "has none" if own.chat_template is None else "has another"
        fix = f"{borrowed} and give messages" if not conversational else borrowed
        what = f"the teacher has a chat template and the student {has}: the teacher may not be used to what it reads"
        yield warning(About.ENDS, what, f"{fix}, or use a teacher of the student's kind")
    if not conversational:
        return True
    _render(own, train)
    return (yield from _assistant_mask(settings, own, train))


def _turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    return row["messages"] if "messages" in row else row["prompt"] + row["completion"]


def _render(own: Any, train: Dataset) -> None:
    try:
        own.apply_chat_template(_turns(train[0]), tokenize=False)
    except Exception as error:  # a template is a program, and may raise anything
        raise DataError(
            f"the chat template cannot render row 1 ({' '.join(str(error).split())[:160]})",
            "Correct the data's turns, or give another template by chat_template_path",
        ) from error


def _assistant_mask(settings: Settings, own: Any, train: Dataset) -> Examination[bool]:
    marks = marks_assistant(own)
    how = "assistant_only_loss: true" if marks else "a template with {% generation %} and assistant_only_loss: true"
    if settings.training.assistant_only_loss and not marks:
        yield failure(
            About.ENDS,
            "assistant_only_loss: the chat template does not mark the assistant's turns, so there is no mask",
            "Put {% generation %} … {% endgeneration %} around them (chat_template_path), or give prompt and completion",
        )
        return False
    some = _first(train)
    silent = [row for row, one in enumerate(some, 1) if all(turn["role"] != "assistant" for turn in _turns(one))]
    if len(silent) == len(some):
        what = "all rows are prompts: not one has an assistant's turn, so there is nothing to learn from"
        yield failure(About.ENDS, what, "Add the answers, as turns of the role 'assistant'")
        return False
    if silent:
        what = f"{len(silent):,} of {len(some):,} rows (row {silent[0]}, …) have no assistant's turn"
        yield warning(About.ENDS, what, "Remove these rows, or add their answers")
    if "messages" in train.column_names and not settings.training.assistant_only_loss:
        yield warning(
            About.ENDS, "every turn is learnt, the user's and the system's too", f"Use {how}, or prompt and completion"
        )
    else:
        yield ok(About.ENDS, "the chat template renders the data; only the assistant's turns are learnt")
    return True


# ---- data as it is given ---------------------------------------------------------------------------------------------------


def data(settings: Settings) -> Examination[Data]:
    train, held_out = load_data(settings.run, settings.training.dataset_text_field)
    yield from ()
    return train, held_out


def shapes(settings: Settings, given: Data) -> Examination[bool]:
    check_shapes(settings, *given)
    yield from ()
    return True


def rows(given: Data) -> Examination[None]:
    """Counts, empty completions, repetitions."""
    train, held_out = given
    yield ok(About.DATA, f"{len(train):,} rows to train on, {len(held_out) if held_out is not None else 'none'} held out")
    some = _first(train)
    empty = [row for row, one in enumerate(some, 1) if not _answer(one)]
    if empty:
        what = f"{len(empty):,} of {len(some):,} rows have an empty completion (row {empty[0]}, …)"
        yield warning(About.DATA, what, "Remove them: they teach the student to say nothing")
    seen = set(map(_key, some))
    repeated = len(some) - len(seen)
    if repeated:
        yield note(About.DATA, f"{repeated:,} of {len(some):,} rows repeat an earlier one")
    if held_out is not None:
        leaked = sum(_key(one) in seen for one in held_out)
        if leaked:
            what = f"{leaked:,} of {len(held_out):,} held-out rows are trained on"
            yield warning(About.DATA, what, "Hold out other rows, or what is measured is memory")


def _first(train: Dataset) -> Dataset:
    return train.select(range(min(len(train), _ROWS)))


def _answer(row: dict[str, Any]) -> Any:
    """What a row is to teach, as far as it is text."""
    if "completion" in row:
        said = row["completion"]
    elif "messages" in row:
        said = [turn for turn in row["messages"] if turn["role"] == "assistant"] or row["messages"]
    else:
        return True
    turns = said if isinstance(said, list) else [{"content": said}]
    return any(turn.get("tool_calls") or str(turn.get("content") or "").strip() for turn in turns)


def _key(row: dict[str, Any]) -> int:
    return hash(json.dumps(row, sort_keys=True, default=str))


# ---- a teacher elsewhere ---------------------------------------------------------------------------------------------------


def elsewhere(settings: Settings, own: Any, thorough: bool) -> Examination[bool]:
    """Opens the cache, or asks the servers."""
    width = head_width(settings, str(settings.model.model_name_or_path), settings.model.model_revision) or len(own)
    source = source_elsewhere(settings, own, width, READY_S)
    match source:
        case CachedSource():
            yield from _cache(source, thorough)
        case ServedSource():
            try:
                yield from _servers(source, own)
            finally:
                source.close()
    return True


def _cache(source: CachedSource, thorough: bool) -> Iterator[Finding]:
    store, said = source.store, source.store.manifest.provenance
    kept = f"{len(store):,} sequences, {store.totals.answers:,} answers, {store.layout.kind} of {store.layout.width}"
    yield ok(About.ELSEWHERE, f"{store.folder}: {kept}, of {said['teacher']} ({said['teacher_dtype']}), as this run needs it")
    if not thorough and store.totals.size > SMALL_CACHE:
        yield note(About.ELSEWHERE, f"its {size_of(store.totals.size)} are not read through", "--thorough does it")
        return
    store.verify()
    yield ok(About.ELSEWHERE, f"every byte of its {size_of(store.totals.size)} is as it was written")


def _servers(source: ServedSource, own: Any) -> Iterator[Finding]:
    for server in source.pool.probe(1, probe_texts(own)):
        longest = "" if server.longest is None else f", rows of up to {server.longest - 1:,} tokens"
        yield ok(About.ELSEWHERE, f"{server.url} serves {server.model}{longest}; its answers vary by {server.noise:.1g} nats")
        if not server.tokenizer_checked:
            yield note(About.ELSEWHERE, f"{server.url} does not tokenize: its tokenizer could not be compared")


# ---- memory and disk -------------------------------------------------------------------------------------------------------


def memory(settings: Settings, given: Data, own: Any) -> Examination[Foreseen | None]:
    """The plan against what is free; None where there is no plan."""
    foreseen = foresee(settings, adapter_of(settings.model), given, own)
    if isinstance(foreseen, str):
        yield note(About.MEMORY, f"what the run will need is not foreseen ({foreseen})")
        return None
    said, remedy = str(foreseen).removeprefix("Memory: "), foreseen.remedy()
    if remedy is None:
        yield ok(About.MEMORY, said)
    else:
        yield failure(About.MEMORY, f"more is needed than is free: {said}", remedy[0].upper() + remedy[1:])
    return foreseen


def can_be_loaded(foreseen: Foreseen) -> bool:
    """Is there room for both models and a forward of each?"""
    peak = foreseen.plan.moments["the teacher's forward"], foreseen.plan.moments["the student's forward"]
    return max(parts.student + parts.teacher + parts.activations + parts.teacher_at_work for parts in peak) < foreseen.free


@dataclass(frozen=True)
class SavedBytes:
    """What a checkpoint holds: the student's weights (of an adapter, its own), and the optimizer's state."""

    weights: int
    optimizer: int


def saved_bytes(foreseen: Foreseen) -> SavedBytes:
    facts = foreseen.facts
    return SavedBytes(facts.student if foreseen.run.adapter is None else facts.gradients, facts.optimizer)


def disk(settings: Settings, saved_each: SavedBytes, train_rows: int) -> Examination[None]:
    """Room for the checkpoints and the student."""
    args, weights = settings.training, saved_each.weights
    checkpoint = weights + (0 if args.save_only_model else saved_each.optimizer)
    kept = checkpoints(settings, train_rows)
    needed = weights + kept * checkpoint
    place, free = free_beside(Path(str(args.output_dir)))
    saved = f"the student ({size_of(weights)})" + (f" and {kept} × a checkpoint ({size_of(checkpoint)})" if kept else "")
    said = f"output_dir: {saved} will take about {size_of(needed)}; {place} has {size_of(free)} free"
    if needed <= free:
        yield ok(About.DISK, said)
        return
    fix = "Name a folder on a larger disk"
    if kept > 1 and weights + 2 * checkpoint <= free:
        fix = "Set save_total_limit: 1, save less often (save_steps), or name a folder on a larger disk"
    yield failure(About.DISK, f"too little room for {said}", fix)


def optimizer_steps(settings: Settings, train_rows: int) -> int:
    """Of the whole run; with packing at most."""
    args = settings.training
    if args.max_steps > 0:
        return args.max_steps
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return math.ceil(math.ceil(train_rows / a_step) * args.num_train_epochs)


def checkpoints(settings: Settings, train_rows: int) -> int:
    """How many lie on the disk at once: the oldest goes when the next is there."""
    args, strategy = settings.training, str(settings.training.save_strategy.value)
    steps = optimizer_steps(settings, train_rows)
    match strategy:
        case "no":
            return 0
        case "epoch":
            saves = math.ceil(args.num_train_epochs)
        case _:
            every = args.save_steps if args.save_steps >= 1 else max(1, args.save_steps * steps)
            saves = math.ceil(steps / every)
    return saves if not args.save_total_limit else min(saves, args.save_total_limit + 1)


def is_here(name: str | None) -> bool:
    """Is it a folder of this machine?"""
    return name is not None and os.path.isdir(name)
