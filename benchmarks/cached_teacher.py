"""What a cached teacher takes on disk, what capturing and reading it cost beside the teacher's bare forward, and what it saves.

    python benchmarks/cached_teacher.py
    python benchmarks/cached_teacher.py --student 64x2 --teacher 512x8 --vocabulary 32000

Random models whose distributions are as peaked as those of trained ones (`trainers.py`); prints markdown and writes it with
every single measurement to `benchmarks/results/`. Times are CPU seconds of one thread where there is one.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from measure import markdown, ratio, spread, write
from speckd.arguments import SpecKDConfig
from speckd.capture import Answers, cut_into_shards
from speckd.compatibility import SharedVocabulary
from speckd.recipe_book import recipe_text
from speckd.teachers.cached import CachedSource
from speckd.teachers.layout import Compression, Kind, Layout
from speckd.teachers.record import sequence_key
from speckd.teachers.source import Question
from speckd.teachers.store import Store, StoreWriter
from speckd.tokens import sequences
from speckd.trainer import SpecKDTrainer
from trainers import Ends, Work, both_models, common, rows, with_labels, word_tokenizer

DISTILLKIT = "DistillKit's caches are reported at about 300 bytes a token, 114 compressed"
WIDTHS = (8, 32, 128)


@dataclass(frozen=True)
class Captured:
    """One cache: where it is, and what it took."""

    layout: Layout
    folder: Path
    seconds: float
    bytes_per_token: float


def layouts(vocabulary: int) -> Iterator[Layout]:
    for width in WIDTHS:
        for compression in Compression:
            yield Layout(Kind.TOP_K, vocabulary, width, 16, compression)
    yield Layout(Kind.TOP_K, vocabulary, 32, 32)
    yield Layout(Kind.SAMPLED, vocabulary, 50, 16, draws=50)
    yield Layout(Kind.FULL, vocabulary, vocabulary, 16)


def name_of(layout: Layout) -> str:
    kept = {Kind.TOP_K: f"top {layout.width}", Kind.SAMPLED: f"{layout.draws} draws", Kind.FULL: "all"}[layout.kind]
    return f"{kept}, {layout.precision} bits" + (", zlib" if layout.compression is Compression.ZLIB else "")


def captured(trainer: SpecKDTrainer, layout: Layout, folder: Path) -> Captured:
    wanted = trainer.sequences()
    shards = cut_into_shards(wanted, layout)
    begin = time.process_time()
    writer = StoreWriter.open(folder, layout, {}, [[sequence_key(one.token_ids) for one in shard] for shard in shards])
    answers = Answers(trainer, layout, seed=0)
    for number in writer.missing():
        writer.write(number, answers.of(shards[number]))
    writer.publish()
    return Captured(layout, folder, time.process_time() - begin, Store.open(folder).bytes_per_token())


def questions(trainer: SpecKDTrainer) -> list[Question]:
    found = []
    for batch in trainer.get_train_dataloader():
        found.append(trainer._question(batch, trainer._rows(batch)))
    return found


@torch.no_grad()
def bare_forward(trainer: SpecKDTrainer, asked: list[Question]) -> float:
    """The teacher's whole forward of every batch, its head at the supervised positions alone."""
    begin = time.process_time()
    for question in asked:
        hidden = trainer.teacher.get_decoder()(**question.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        trainer.teacher.get_output_embeddings()(hidden[question.rows.index])
    return time.process_time() - begin


def reading(store: Store, asked: list[Question]) -> float:
    begin = time.process_time()
    for question in asked:
        for one in sequences(question.tokens, question.rows):
            store.answer(one.token_ids, one.positions)
    return time.process_time() - begin


def training(work: Work, make: Callable[[str, list[Any]], SpecKDTrainer]) -> float:
    """CPU seconds a step, the median after two to warm up."""
    ends = Ends()
    with TemporaryDirectory() as output:
        make(output, [ends]).train()
    steps = [b - a for a, b in zip(ends.cpu[1:], ends.cpu[2:], strict=False)]
    return statistics.median(steps)


def trainer_of(work: Work, output: str, callbacks: list[Any], store: Store | None = None) -> SpecKDTrainer:
    student, teacher = both_models(work)
    settings = common(work, output) | yaml.safe_load(recipe_text("top-k-label")) | {"max_length": work.longest}
    tokenizer = word_tokenizer(work.vocabulary)
    model = {"teacher_model": teacher, "teacher_processing_class": tokenizer}
    if store is not None:
        model = {"teacher_source": CachedSource(store, SharedVocabulary(work.vocabulary))}
    return SpecKDTrainer(
        model=student,
        args=SpecKDConfig(**settings),
        train_dataset=with_labels(rows(work)),
        processing_class=tokenizer,
        callbacks=callbacks,
        **model,
    )


def shape(text: str) -> tuple[int, int]:
    width, layers = text.split("x")
    return int(width), int(layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--student", type=shape, default=(128, 2), help="width x layers")
    parser.add_argument("--teacher", type=shape, default=(512, 8))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work = Work("cached teacher", args.vocabulary, args.batch, 60, 60, 256, args.steps, 0.5, args.student, args.teacher)
    with TemporaryDirectory() as place:
        whole = trainer_of(work, place, [])
        asked = questions(whole)
        answered = sum(len(question.rows) for question in asked)
        bare_forward(whole, asked[:1])
        forward = [bare_forward(whole, asked) for _ in range(args.repeats)]
        found = [
            captured(whole, layout, Path(place) / f"cache-{number}") for number, layout in enumerate(layouts(work.vocabulary))
        ]
        read = {one.folder: [reading(Store.open(one.folder), asked) for _ in range(args.repeats)] for one in found}
        bare = statistics.median(forward)
        sizes = markdown(
            [
                "cache",
                "bytes a token",
                "raw float32, ids in 32 bits",
                "capture ÷ bare forward",
                "reading ÷ bare forward",
                "tokens/s read",
            ],
            [
                [
                    name_of(one.layout),
                    f"{one.bytes_per_token:,.0f}",
                    f"{(1 if one.layout.kind is Kind.FULL else 2) * 4 * one.layout.width:,}",
                    f"{one.seconds / bare:.2f}",
                    f"{statistics.median(read[one.folder]) / bare:.3f}",
                    f"{answered / statistics.median(read[one.folder]):,.0f}",
                ]
                for one in found
            ],
        )
        top_32 = next(one for one in found if one.layout.width == 32)
        store = Store.open(top_32.folder)
        steps: dict[str, list[float]] = {"in process": [], "from the cache": []}
        for _ in range(args.repeats):
            steps["in process"].append(training(work, lambda output, more: trainer_of(work, output, more)))
            steps["from the cache"].append(training(work, lambda output, more: trainer_of(work, output, more, store)))
        gain = ratio(steps["in process"], steps["from the cache"])
        times = markdown(
            ["teacher", "CPU s a step", "±"],
            [[name, f"{statistics.median(taken):.3f}", f"{spread(taken):.0%}"] for name, taken in steps.items()],
        )
    words = (
        f"Student {args.student[0]}x{args.student[1]}, teacher {args.teacher[0]}x{args.teacher[1]}, V {args.vocabulary:,}, "
        f"{len(asked)} batches of {args.batch} rows, {answered:,} supervised tokens, {args.threads} thread(s)"
    )
    text = (
        f"{words}.\n\nBare forward: the teacher's decoder over every row and its head at the supervised positions, "
        f"{1e6 * bare / answered:.0f} µs of CPU a supervised token. Raw float32: log-probabilities and, where not all, ids "
        f"in 32 bits; of the whole vocabulary {4 * work.vocabulary:,}. {DISTILLKIT}.\n\n{sizes}\n\n"
        f"One training step (Top-5 gate, label fallback), top 32 at 16 bits: **{gain:.2f} ×** faster from the cache.\n\n{times}"
    )
    result = {
        "forward": forward,
        "caches": [
            {
                "name": name_of(one.layout),
                "bytes_per_token": one.bytes_per_token,
                "capture": one.seconds,
                "read": read[one.folder],
            }
            for one in found
        ],
        "steps": steps,
        "markdown": text.splitlines(),
    }
    path = write(args.out, f"cached-teacher-V{args.vocabulary}", torch.device("cpu"), result | {"setting": words})
    print(f"\n{text}\n\nWritten: {path.name}")


if __name__ == "__main__":
    main()
