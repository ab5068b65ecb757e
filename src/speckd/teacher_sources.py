"""Settings to a teacher that is not a model in this process, checked against the run before anything is asked of it."""

import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speckd import provenance
from speckd.checks import CANARY, resumes
from speckd.collation import sequences_in
from speckd.compatibility import PROBES, SharedVocabulary
from speckd.errors import ConfigError, DataError, VocabularyError
from speckd.settings import Settings
from speckd.teachers.answers import Answer
from speckd.teachers.cached import CachedSource
from speckd.teachers.client import Load, ServerPool
from speckd.teachers.exchange import Timeouts
from speckd.teachers.served import ServedSource
from speckd.teachers.sglang import SGLang
from speckd.teachers.source import TeacherSource
from speckd.teachers.store import Store
from speckd.teachers.vllm import VLLM
from speckd.trainer import SpecKDTrainer

logger = logging.getLogger(__name__)

#: Of the data's first sequences, where it is looked what a served teacher puts on ids that the student lacks.
_FIRST_SEQUENCES, _FIRST_TOKENS = 4, 16


def source_elsewhere(settings: Settings, tokenizer: Any, width: int, ready_s: float = Timeouts.ready_s) -> TeacherSource | None:
    """The cache or the servers that the settings name; None where the teacher is a model here, or where there is none.

    Args:
        settings: of the run.
        tokenizer: the student's.
        width: rows of the student's head.
        ready_s: how long servers may take to be up when they are probed.

    Raises:
        SpeckdError: it does not belong to this run, naming what differs.
    """
    match settings.training.teacher:
        case "cache":
            return _cached(settings, tokenizer, width)
        case "server":
            return _served(settings, len(tokenizer), width, ready_s)
        case _:
            return None


def _cached(settings: Settings, tokenizer: Any, width: int) -> CachedSource:
    store = Store.open(Path(str(settings.training.teacher_cache_dir)))
    kept = store.manifest.provenance
    store.require(provenance.of_run(settings, tokenizer, kept, store.layout))
    others = provenance.other_libraries(store.manifest.libraries)
    if others is not None:
        logger.info("The cache was made with %s.", others)
    vocabulary = provenance.read(kept["vocabulary"])
    largest = vocabulary.size - 1 if vocabulary.ids is None else int(vocabulary.ids[-1])
    if largest >= width:
        raise ConfigError(
            f"teacher_cache_dir: it is about token ids up to {largest}, but the student's head has {width} rows",
            "Use the student that it was captured for, or capture anew for this one",
        )
    return CachedSource(store, vocabulary)


def _served(settings: Settings, tokens: int, width: int, ready_s: float) -> ServedSource:
    args = settings.training
    vocabulary = SharedVocabulary(min(tokens, width))
    whole = args.teacher_top_k >= vocabulary.size
    pool = ServerPool(
        args.teacher_server_urls or (),
        SGLang() if args.teacher_server_api == "sglang" else VLLM(),
        vocabulary=vocabulary.size,
        top_k=None if whole else args.teacher_top_k,
        model=args.teacher_server_model,
        timeouts=Timeouts(
            read_s=args.teacher_server_timeout_s,  # a server computes in silence
            request_s=args.teacher_server_timeout_s,
            ready_s=ready_s,
            patience_s=args.teacher_server_patience_s,
        ),
        load=Load(concurrency=args.teacher_server_concurrency, tokens=args.teacher_server_tokens),
    )
    return ServedSource(pool, vocabulary, None if whole else args.teacher_top_k)


def source_named(source: TeacherSource | None) -> tuple[str, str] | None:
    """Of a teacher elsewhere: which model it is, as the cache or the servers say, and how its answers came."""
    match source:
        case CachedSource(store):
            layout, said = store.layout, store.manifest.provenance
            kept = f"{layout.kind} of {layout.draws or layout.width} tokens, {layout.precision} bits"
            revision = f"revision {said['teacher_revision']}; " if said.get("teacher_revision") else ""
            return str(said.get("teacher")), f"{revision}from a cache of its answers: {kept}"
        case ServedSource(pool=pool) if pool.models:
            k = source.capabilities.top_k
            return ", ".join(pool.models), f"served; {'the whole vocabulary' if k is None else f'its top {k} tokens'}"
        case _:
            return None


def require_ready(trainer: SpecKDTrainer, output: Path) -> None:
    """Asks a teacher elsewhere whether it can answer what this run will ask, and servers of the student to take its weights.

    Args:
        trainer: with its data prepared.
        output: of the run: what the servers said before is kept there, and a resumed run compares.

    Raises:
        SpeckdError: what it cannot, and what to do about it.
    """
    match trainer.source:
        case CachedSource():
            _require_covered(trainer, trainer.source.store)
        case ServedSource():
            _probe(trainer, trainer.source.pool, output / CANARY)
            if trainer.objective.needs_teacher:
                _require_little_dropped(trainer, trainer.source.pool)
    if trainer.served_student is not None:
        trainer.served_student.sync(0)


def probe_texts(tokenizer: Any) -> list[tuple[str, list[int]]]:
    """Texts and their token ids by the student's tokenizer, for `ServerPool.probe`."""
    return [(text, tokenizer.encode(text, add_special_tokens=False)) for text in PROBES]


def _probe(trainer: SpecKDTrainer, pool: ServerPool, remembered: Path) -> None:
    texts = probe_texts(trainer.processing_class)
    before = None
    if remembered.is_file() and resumes(trainer.args):
        values = json.loads(remembered.read_text())
        positions, log_probs, labels = (torch.tensor(values[name]) for name in ("positions", "log_probs", "label_log_probs"))
        ids = values["token_ids"]
        before = Answer(positions, None if ids is None else torch.tensor(ids), log_probs, labels)
    facts = pool.probe(max(trainer.longest_row.values()), texts, before)
    for server in facts:
        logger.info(
            "Teacher: %s at %s%s; its answers vary by %.1g nats.",
            server.model,
            server.url,
            "" if server.tokenizer_checked else " (its tokenizer could not be compared)",
            server.noise,
        )


def _require_little_dropped(trainer: SpecKDTrainer, pool: ServerPool) -> None:
    """As of a teacher in this process, in the data's first rows. Of a top-K, what the servers list is known, and no more."""
    first = islice(sequences_in(trainer.train_dataset), _FIRST_SEQUENCES)
    answers = pool.gather([pool.ask(one.token_ids, one.positions[:_FIRST_TOKENS]) for one in first])
    dropped = float(torch.cat([answer.dropped for answer in answers if answer.dropped is not None]).mean())
    if dropped > trainer.args.max_dropped_mass:
        bound = "" if pool.capabilities.top_k is None else "at least "
        raise VocabularyError(
            f"teacher_server_urls: the teacher puts {bound}{dropped:.2%} of its probability on ids that the student does not "
            "have: tokens, or padding of its head",
            f"Serve a teacher with the same tokens, or accept it: max_dropped_mass above {dropped:.2g}",
        )


def remember_servers(trainer: SpecKDTrainer, output: Path) -> None:
    """Keeps what the servers say of a fixed sequence, so that a resumed run notices another teacher."""
    if isinstance(trainer.source, ServedSource):
        said = trainer.source.pool.canary
        kept = {"positions": said.positions, "log_probs": said.log_probs, "label_log_probs": said.label_log_probs}
        values: dict[str, Any] = {name: tensor.tolist() for name, tensor in kept.items()}
        values["token_ids"] = None if said.token_ids is None else said.token_ids.tolist()
        (output / CANARY).write_text(json.dumps(values) + "\n")


def _require_covered(trainer: SpecKDTrainer, store: Store) -> None:
    """Refuses data of which a cache does not know everything, before the first step."""
    count, missing, masked = 0, [], []  # rows, from 1
    for one in trainer.all_sequences():
        count += 1
        there = store.positions(trainer.vocabulary.labels(one.token_ids))
        if there is None:
            missing.append(one.row)
        elif not (torch.equal(one.positions, there) or np.isin(one.positions.numpy(), there.numpy()).all()):
            masked.append(one.row)
    again = "Run 'speckd cache' with this very configuration, into a new folder"
    if missing:
        raise DataError(
            f"teacher_cache_dir: {len(missing)} of {count} sequences are not in the cache, first that of row "
            f"{missing[0]}: its tokens are not those that were captured",
            again,
        )
    if masked:
        raise DataError(
            f"teacher_cache_dir: of {len(masked)} of {count} sequences the cache does not hold every supervised position, "
            f"first of that of row {masked[0]}: another mask was captured",
            f"Set completion_only_loss and assistant_only_loss as they were then. {again}",
        )
