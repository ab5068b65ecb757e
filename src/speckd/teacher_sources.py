"""Settings to a teacher that is not a model in this process, checked against the run before anything is asked of it."""

from pathlib import Path
from typing import Any

import torch

from speckd import fingerprints
from speckd.compatibility import SharedVocabulary
from speckd.errors import ConfigError, DataError
from speckd.settings import Settings
from speckd.teachers.cached import CachedSource
from speckd.teachers.source import TeacherSource
from speckd.teachers.store import Store
from speckd.trainer import SpecKDTrainer


def source_elsewhere(settings: Settings, tokenizer: Any, width: int) -> TeacherSource | None:
    """The cache or the servers that the settings name; None where the teacher is a model here, or where there is none.

    Args:
        settings: of the run.
        tokenizer: the student's.
        width: rows of the student's head.

    Raises:
        SpeckdError: it does not belong to this run, naming what differs.
    """
    match settings.training.teacher:
        case "cache":
            return _cached(settings, tokenizer, width)
        case _:
            return None


def of_run(settings: Settings, tokenizer: Any) -> dict[str, Any]:
    """What a run can say of itself, to be compared with a cache's provenance; of the teacher's weights, where they are here."""
    args = settings.training
    template = tokenizer.chat_template
    if args.chat_template_path is not None and Path(args.chat_template_path).is_file():
        template = Path(args.chat_template_path).read_text()
    name = args.teacher_model_name_or_path
    here = {"teacher_weights": fingerprints.of_model_folder(Path(name))} if name is not None and Path(name).is_dir() else {}
    return {"tokenizer": fingerprints.of_tokenizer(tokenizer), "chat_template": fingerprints.of_text(template), **here}


def written(vocabulary: SharedVocabulary) -> dict[str, Any]:
    """As JSON."""
    ids = None if vocabulary.ids is None else vocabulary.ids.tolist()
    return {"size": vocabulary.size, "ids": ids, "teacher_only": list(vocabulary.teacher_only)}


def _read(values: dict[str, Any]) -> SharedVocabulary:
    ids = values["ids"]
    return SharedVocabulary(values["size"], None if ids is None else torch.tensor(ids), tuple(values["teacher_only"]))


def _cached(settings: Settings, tokenizer: Any, width: int) -> CachedSource:
    store = Store.open(Path(str(settings.training.teacher_cache_dir)))
    store.require(of_run(settings, tokenizer))
    vocabulary = _read(store.manifest.provenance["vocabulary"])
    largest = vocabulary.size - 1 if vocabulary.ids is None else int(vocabulary.ids[-1])
    if largest >= width:
        raise ConfigError(
            f"teacher_cache_dir: it is about token ids up to {largest}, but the student's head has {width} rows",
            "Use the student that it was captured for, or capture anew for this one",
        )
    return CachedSource(store, vocabulary)


def require_covered(trainer: SpecKDTrainer) -> None:
    """Refuses data of which a cache knows nothing, before the first step.

    Raises:
        DataError: naming the first row that is missing, and how many are.
    """
    if not isinstance(trainer.source, CachedSource):
        return
    wanted = trainer.sequences()
    missing = [one for one in wanted if one.token_ids not in trainer.source.store]
    if missing:
        raise DataError(
            f"teacher_cache_dir: {len(missing)} of {len(wanted)} sequences are not in the cache, first that of row "
            f"{missing[0].row}: its tokens are not those that were captured",
            "Run 'speckd cache' with this very configuration, into a new folder",
        )
