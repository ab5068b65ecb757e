"""`speckd cache`: the teacher's answers for exactly the sequences that a run will train on and be measured by, kept on disk."""

import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from speckd import provenance
from speckd.collation import Wanted, question_about
from speckd.compatibility import SharedVocabulary
from speckd.engine import default_chunk_size
from speckd.errors import ConfigError
from speckd.randomness import uniforms
from speckd.run import leave_together, prepared_trainer, say_things_once
from speckd.settings import Settings, load_settings
from speckd.teachers.answers import Answer
from speckd.teachers.draws import answer_of_draws
from speckd.teachers.layout import Compression, Kind, Layout
from speckd.teachers.record import sequence_key
from speckd.teachers.source import require_answers
from speckd.teachers.store import StoreWriter
from speckd.trainer import SpecKDTrainer
from speckd.types import TeacherRows, TopKSignal

logger = logging.getLogger(__name__)

#: A shard is what is lost when a capture is killed, and what one process works on: some seconds to minutes of a teacher.
SHARD_BYTES = 32 * 2**20
SHARD_ANSWERS = 2**17
_STREAM = 3  # of random draws, apart from the gates' and the scrambling's


def capture(config: Path | None, recipe: str | None, flags: list[str]) -> Path:
    """Fills `teacher_cache_dir`; returns it. Killed and started again, it goes on, to the same bytes.

    Raises:
        SpeckdError: for whatever the user can mend.
    """
    with TemporaryDirectory(prefix="speckd-cache-") as unused:  # a Trainer makes its output folder
        settings = load_settings(config, recipe, [*flags, "--teacher", "model", "--output_dir", unused])
        say_things_once(settings)
        folder = _folder(settings)
        if settings.training.teachers:
            raise ConfigError("teachers: a cache holds the answers of one teacher", "Set teacher_model_name_or_path instead")
        if settings.training.writes:
            raise ConfigError(
                f"sequence_source: {settings.training.sequence_source}: no cache can know what is written in training",
                "Set sequence_source: dataset",
            )
        _fill(folder, settings, prepared_trainer(settings, Path(unused)))
    return folder


def _fill(folder: Path, settings: Settings, trainer: SpecKDTrainer) -> None:
    if trainer.source is None and settings.teacher_model is not None:
        raise ConfigError(
            "there is nothing to cache: this method asks no teacher, and no rows are held out",
            "Name the recipe that will use the cache, or give eval_dataset",
        )
    if trainer.source is None:
        raise ConfigError("teacher_model_name_or_path is not set: there is no teacher to cache", "Give a path or hub id")
    layout = layout_of(settings, trainer.vocabulary)
    for objective in trainer.moving.extremes():  # the run that uses it will ask the same
        require_answers(objective, layout.capabilities, layout.vocabulary_size)
    wanted = trainer.sequences()
    shards = cut_into_shards(wanted, layout)
    _announce(wanted, layout, len(shards), folder)
    keys = [[sequence_key(trainer.vocabulary.labels(one.token_ids)) for one in shard] for shard in shards]
    writer = StoreWriter.open(folder, layout, provenance.of_capture(settings, trainer), keys, libraries=provenance.libraries())
    process, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    share = range(process, len(shards), processes)
    own = writer.missing(share)
    trainer.accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    if len(own) < len(share):
        logger.info("%d of %d shards are there already.", len(share) - len(own), len(shards))
    answers = Answers(trainer, layout, settings.training.effective_gate_seed)
    total = sum(len(one.positions) for number in own for one in shards[number])
    silent = settings.training.disable_tqdm or process > 0
    with tqdm(total=total, unit=" tokens", desc="Caching", disable=silent) as bar:
        for number in own:
            writer.write(number, _counted(answers.of(shards[number]), bar))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        writer.publish()
        logger.info("The cache is in %s: 'teacher: cache' with teacher_cache_dir uses it.", folder)
    leave_together(trainer)


def _folder(settings: Settings) -> Path:
    if settings.training.teacher_cache_dir is None:
        raise ConfigError("teacher_cache_dir is not set", "Say where the cache goes: --teacher_cache_dir FOLDER")
    return Path(settings.training.teacher_cache_dir)


def layout_of(settings: Settings, vocabulary: SharedVocabulary) -> Layout:
    args, kind, size = settings.training, Kind(settings.training.teacher_cache_kind), vocabulary.size
    width, draws = {
        Kind.TOP_K: (args.teacher_top_k, 0),
        Kind.SAMPLED: (min(args.teacher_cache_samples, size), args.teacher_cache_samples),
        Kind.FULL: (size, 0),
    }[kind]
    return Layout(kind, size, min(width, size), args.teacher_cache_bits, Compression(args.teacher_cache_compression), draws)


# ---- which sequences -------------------------------------------------------------------------------------------------------


def cut_into_shards(wanted: Sequence[Wanted], layout: Layout) -> list[list[Wanted]]:
    """Neighbours, as many as fill a shard; a matter of data and layout alone, so that every process finds the same."""
    most = max(1, min(SHARD_ANSWERS, int(SHARD_BYTES / layout.bytes_per_token())))
    shards: list[list[Wanted]] = []
    held = most
    for one in wanted:
        if held >= most:
            shards.append([])
            held = 0
        shards[-1].append(one)
        held += len(one.positions)
    return shards


def _announce(wanted: Sequence[Wanted], layout: Layout, shards: int, folder: Path) -> None:
    answers, room = sum(len(one.positions) for one in wanted), CacheRoom.of(wanted, layout, folder)
    logger.info(
        "Cache: %s sequences, %s answered tokens, %s each (%s, %d bits): about %s in %d shards; %s are free.",
        f"{len(wanted):,}",
        f"{answers:,}",
        f"{layout.bytes_per_token():,.0f} bytes",
        f"top {layout.width}" if layout.kind is Kind.TOP_K else layout.kind,
        layout.precision,
        size_of(room.needed),
        shards,
        size_of(room.free),
    )
    if not room.fits:
        raise ConfigError(
            f"teacher_cache_dir: the cache takes about {size_of(room.needed)}, but {room.place} has {size_of(room.free)} free",
            CacheRoom.FIX,
        )


@dataclass(frozen=True)
class CacheRoom:
    """Bytes: what a whole cache takes, what of it is there already, and what is free at `place`."""

    FIX: ClassVar[str] = "Lower teacher_top_k, take teacher_cache_bits: 16, or name a folder on a larger disk"
    needed: int
    there: int
    place: Path
    free: int

    @classmethod
    def of(cls, wanted: Sequence[Wanted], layout: Layout, folder: Path) -> "CacheRoom":
        tokens, answers = sum(len(one.token_ids) for one in wanted), sum(len(one.positions) for one in wanted)
        there = sum(path.stat().st_size for path in folder.glob("shard-*"))
        return cls(layout.estimated_bytes(len(wanted), tokens, answers), there, *free_beside(folder))

    @property
    def fits(self) -> bool:
        return self.needed - self.there <= self.free


def free_beside(folder: Path) -> tuple[Path, int]:
    """Where a folder is or would be made, and the bytes that are free there."""
    place = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    return place, shutil.disk_usage(place).free


def size_of(count: float) -> str:
    step = min(4, int(math.log(max(count, 1), 1024)))
    return f"{count / 1024**step:,.1f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[step]}"


def _counted(answers: Iterable[tuple[Tensor, Answer]], bar: Any) -> Iterator[tuple[Tensor, Answer]]:
    for token_ids, answer in answers:
        yield token_ids, answer
        bar.update(len(answer.positions))


# ---- the answers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Asks the run's own teacher, batch by batch, and keeps of its distribution what the layout says."""

    trainer: SpecKDTrainer
    layout: Layout
    seed: int

    def of(self, shard: Sequence[Wanted]) -> Iterator[tuple[Tensor, Answer]]:
        """One shard's, in its order; asked in batches of about equal length."""
        found: dict[int, Answer] = {}
        order = sorted(range(len(shard)), key=lambda place: (-len(shard[place].token_ids), place))
        size = self.trainer.args.per_device_train_batch_size
        for start in range(0, len(order), size):
            places = order[start : start + size]
            found |= zip(places, self._batch([shard[place] for place in places]), strict=True)
        for place, one in enumerate(shard):
            yield self.trainer.vocabulary.labels(one.token_ids), found[place]  # a store knows the shared axis only

    @torch.no_grad()
    def _batch(self, asked: Sequence[Wanted]) -> Iterator[Answer]:
        source = self.trainer.source
        assert source is not None
        device = self.trainer.accelerator.device
        question = question_about(asked, source.vocabulary, device)
        rows, answers = question.rows, source.launch(question).rows()
        samples = torch.tensor([int.from_bytes(sequence_key(one.token_ids)[:4], "little") for one in asked], device=device)
        parts = [
            self._kept(answers, rows.index[some], rows.labels[some], samples[rows.keys.sample[some]], rows.keys.position[some])
            for some in torch.arange(len(rows), device=device).split(default_chunk_size(self.layout.vocabulary_size))
        ]
        sizes = [len(one.positions) for one in asked]
        columns = [torch.cat(column).cpu().split(sizes) for column in zip(*parts, strict=True)]
        for one, ids, log_probs, own in zip(asked, *columns, strict=True):
            if self.layout.kind is Kind.SAMPLED:
                yield answer_of_draws(one.positions, ids, own, self.layout)
            else:
                yield Answer(one.positions, None if self.layout.kind is Kind.FULL else ids, log_probs, own)

    def _kept(
        self, answers: TeacherRows, index: Tensor, labels: Tensor, samples: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of some rows: token ids (none of the whole vocabulary), log-probabilities (none of drawn tokens), those of labels."""
        signal, width = answers.signal(index), self.layout.width
        own = signal.label_log_prob(labels)
        if isinstance(signal, TopKSignal):
            return signal.token_ids[:, :width], signal.log_probs[:, :width], own
        if self.layout.kind is Kind.FULL:
            return labels[:, None][:, :0], signal.log_probs, own
        if self.layout.kind is Kind.TOP_K:
            ids = signal.logits.topk(width).indices
            return ids, signal.log_prob(ids), own
        # Sparse Logit Sampling (Anshumann et al. 2025) at temperature 1: without bias for what is linear in p.
        draws = uniforms(self.seed, 0, samples, positions, self.layout.draws, stream=_STREAM)[..., 0]
        return signal.sample(draws.to(signal.logits.device)), signal.logits[:, :0], own
