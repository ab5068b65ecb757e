"""What is seen before a model is loaded: settings, vocabularies, the data as it is given, a teacher elsewhere."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from speckd.capture import layout_of, size_of
from speckd.checks import (
    check_shapes,
    checkpoint_to_resume,
    loaded,
    output_folder,
    require_k_below,
    require_reference,
    require_student,
    require_teacher,
    several_teachers,
    student_tokenizer,
    teacher_tokenizer,
    tokenizer_among_several,
)
from speckd.compatibility import SharedVocabulary, shared_vocabulary
from speckd.data import load_data
from speckd.doctor.findings import About, Examination, Finding, note, ok, warning
from speckd.errors import SpeckdError
from speckd.provenance import other_libraries
from speckd.run import describe_method
from speckd.settings import Settings, load_settings
from speckd.teacher_sources import probe_texts, source_elsewhere
from speckd.teachers.cached import CachedSource
from speckd.teachers.manifest import MANIFEST
from speckd.teachers.served import ServedSource
from speckd.teachers.source import require_answers

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
    require_reference(settings)
    for name in (settings.teacher_model, *several_teachers(settings).values()):
        if name is not None:
            yield ok(About.MODELS, f"teacher: {name}")
    return True


@dataclass(frozen=True)
class Teacher:
    """One that is known by name. `called`: in messages; `path`: or hub id."""

    called: str
    path: str
    revision: str
    tokenizer: Any


def teachers(settings: Settings) -> Examination[tuple[Teacher, ...]]:
    """None where no teacher is known by name, or it is elsewhere and not to be had here."""
    revision = settings.training.teacher_model_revision or "main"
    several = several_teachers(settings).items()
    if several:
        tokenizers = [tokenizer_among_several(settings, name, path) for name, path in several]
        named = zip(several, tokenizers, strict=True)
        return tuple(Teacher(f"teacher {name}", path, "main", tokenizer) for (name, path), tokenizer in named)
    path = settings.training.teacher_model_name_or_path
    if path is None:
        return ()
    try:
        return (Teacher("teacher", path, revision, teacher_tokenizer(settings, path)),)
    except SpeckdError:
        if settings.teacher_model is not None:
            raise
        yield note(About.MODELS, f"the teacher itself ({path}) is not here: it is not compared with what is elsewhere")
        return ()


def vocabulary(settings: Settings, own: Any, teacher: Teacher) -> Examination[bool]:
    """Do both cut text alike, and what has only one of them?"""
    sides = (str(settings.model.model_name_or_path), settings.model.model_revision), (teacher.path, teacher.revision)
    widths = [head_width(settings, name, revision) for name, revision in sides]
    known = own.get_vocab(), teacher.tokenizer.get_vocab()
    rows = [max(vocab.values()) + 1 if width is None else width for width, vocab in zip(widths, known, strict=True)]
    shared = shared_vocabulary(own, teacher.tokenizer, rows[0], rows[1])
    yield ok(About.MODELS, f"student and {teacher.called} cut text alike and share {shared.size:,} tokens")
    for name, width, vocab, other in zip(("student", teacher.called), widths, known, reversed(known), strict=True):
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


# ---- data as it is given ---------------------------------------------------------------------------------------------------


def data(settings: Settings) -> Examination[Data]:
    train, held_out = load_data(settings.run, settings.training.dataset_text_field, settings.kept_columns)
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
    some = first_rows(train)
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


def first_rows(train: Dataset) -> Dataset:
    """As many as are looked at one by one."""
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


def cache_to_be(settings: Settings, own: Any) -> Examination[None]:
    """Would the cache that is named, and still to be made, answer what this run asks?"""
    args = settings.training
    named = args.teacher_cache_dir
    if named is None or args.teacher_model_name_or_path is None or (Path(named) / MANIFEST).is_file():
        return
    layout = layout_of(settings, SharedVocabulary(len(own)))
    for objective in args.moving_objective().extremes():
        require_answers(objective, layout.capabilities, layout.vocabulary_size)
    kept = f"{layout.kind} of {layout.width:,}, {layout.precision} bits"
    yield ok(About.ELSEWHERE, f"what 'speckd cache' will keep ({kept}) answers what gate and divergence ask")


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
    others = other_libraries(store.manifest.libraries)
    if others is not None:
        yield note(About.ELSEWHERE, f"it was made with {others}")
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
