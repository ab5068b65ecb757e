"""Room for a run: memory for its steps, disk for its checkpoints and its cache."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speckd.capture import CacheRoom, free_beside, layout_of, size_of
from speckd.doctor.before import Data
from speckd.doctor.findings import About, Examination, failure, note, ok
from speckd.memory_plan import optimizer_bytes
from speckd.memory_report import Foreseen, foresee
from speckd.run import adapter_of
from speckd.settings import Settings
from speckd.teachers.manifest import MANIFEST
from speckd.trainer import SpecKDTrainer


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


def saved_bytes_foreseen(foreseen: Foreseen) -> SavedBytes:
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


def saved_bytes(trainer: SpecKDTrainer) -> SavedBytes:
    """Of what is loaded."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    own = trained if trainer.model is not trainer.student else trainer.model.parameters()
    size, count = sum(p.nbytes for p in trained), sum(p.numel() for p in trained)
    return SavedBytes(sum(p.nbytes for p in own), optimizer_bytes(trainer.args.optim.value, count, size))


def room_for_cache(trainer: SpecKDTrainer, settings: Settings) -> Examination[None]:
    """Where a cache is named that is still to be made."""
    named = settings.training.teacher_cache_dir
    if named is None or (Path(named) / MANIFEST).is_file():
        return
    room = CacheRoom.of(trainer.sequences(), layout_of(settings, trainer.vocabulary), Path(named))
    said = (
        f"teacher_cache_dir: 'speckd cache' will write about {size_of(room.needed)}; {room.place} has {size_of(room.free)} free"
    )
    if room.fits:
        yield ok(About.DISK, said)
    else:
        yield failure(About.DISK, f"too little room: {said}", CacheRoom.FIX)
