"""`speckd quickstart`: every method from the same starting students, with a clean and with an unreliable teacher."""

import json
import multiprocessing
import shutil
import signal
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from speckd import LMHead, Objective, distillation_loss, supervised_rows
from speckd.errors import ConfigError
from speckd.evaluate import evaluate
from speckd.gates import LabelRatio, NoGate, TopK
from speckd.metrics import AcceptanceTally
from speckd.policies import Label, Mask
from speckd.quickstart import report
from speckd.quickstart.data import Encoded, batches, collate, encode
from speckd.quickstart.evaluation import accuracy, block_efficiency, generate_greedy
from speckd.quickstart.models import llama, load_teacher, quiet_loading
from speckd.tasks import distinct, stream
from speckd.teachers import DenseTeacher, ScrambledTeacher
from speckd.tokens import SupervisedRows, TokenBatch
from speckd.types import TeacherRows

LEVEL = 2
TRAIN_EXAMPLES, TEST_EXAMPLES = 6000, 300
BATCH_SIZE, START_STEPS, START_LEARNING_RATE, LEARNING_RATE = 24, 1500, 4e-3, 2e-3
STUDENT = {"hidden": 48, "layers": 2, "heads": 4}
UNRELIABLE = 0.25
STORED = ("teacher.safetensors", "teacher-texts.json")  # what the teacher said, kept while students are trained

METHODS: dict[str, Objective] = {
    "SFT": Objective(label_loss_weight=1.0),
    "ungated": Objective(NoGate(), Mask()),
    "Top-5, mask (paper)": Objective(TopK(5), Mask()),
    "Top-5, label": Objective(TopK(5), Label()),
    "label ratio, label": Objective(LabelRatio(), Label()),
}
TEACHERS = {"clean": 0.0, "25 % unreliable": UNRELIABLE}


@dataclass(frozen=True)
class Job:
    """One training run; the SFT start where `method` is None."""

    seed: int
    steps: int
    method: str | None = None
    teacher: str = "clean"

    @property
    def name(self) -> str:
        label = f"{self.method}-{self.teacher}" if self.method else "start"
        return "-".join("".join(c if c.isalnum() else " " for c in label).split()) + f"-seed{self.seed}"


def run(output_dir: Path, seeds: int = 3, steps: int = 300) -> None:
    """Trains, measures, prints the table, and writes it with curves and students into a new folder.

    Raises:
        ConfigError: the folder is not empty, or a number makes no sense.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConfigError(f"{output_dir} exists and is not an empty folder", "Choose another with --output-dir")
    if seeds < 1 or steps < 1:
        raise ConfigError(f"--seeds {seeds}, --steps {steps}", "Give at least 1 of each")
    if output_dir.resolve() == Path.cwd():
        raise ConfigError("--output-dir is the folder that you are in", "Name one that does not exist yet")
    work = output_dir.with_name(output_dir.name + ".unfinished")  # renamed when complete, so a folder is never half a result
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    console = Console()
    console.print(
        f"A shipped teacher, students of a quarter of a megabyte, {len(METHODS)} methods, {seeds} seeds, {steps} steps each."
    )
    with console.status("the teacher reads the training data"):
        _store_teacher(work)
    results = _train_all(work, seeds, steps, console)
    results.sort(key=lambda found: _place(found["job"]))
    finish(work, output_dir, results, console)


def _train_all(work: Path, seeds: int, steps: int, console: Console) -> list[dict[str, Any]]:
    """All runs by two workers; a seed's methods begin as soon as their common start is there."""
    methods = [(m, t) for t in TEACHERS for m in METHODS if not (m == "SFT" and t != "clean")]
    results: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    done_steps = context.Value("q", 0)
    with Progress(console=console) as progress, _workers(context, done_steps) as pool:
        bar = progress.add_task("training", total=seeds * (START_STEPS + steps * len(methods)))
        waiting: set[Future] = {pool.submit(_work, Job(seed, START_STEPS), work) for seed in range(seeds)}
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            progress.update(bar, completed=done_steps.value)
            for found in (future.result() for future in finished):
                results.append(found)
                if found["job"]["method"] is None:
                    seed = found["job"]["seed"]
                    waiting |= {pool.submit(_work, Job(seed, steps, m, t), work) for m, t in methods}
    return results


def _place(job: dict[str, Any]) -> tuple[int, int, int]:
    """Seeds, then teachers, then methods, as they stand above: the order of the table."""
    return job["seed"], list(TEACHERS).index(job["teacher"]), list(METHODS).index(job["method"] or "SFT")


def finish(work: Path, output_dir: Path, results: list[dict[str, Any]], console: Console) -> None:
    """Writes the reports, keeps the first seed's students, and gives the folder its name."""
    for name in STORED:
        (work / name).unlink()
    for folder in work.glob("students/*"):
        if not folder.name.endswith("seed0"):
            shutil.rmtree(folder)
    (work / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    runs = [found for found in results if found["job"]["method"]]
    (work / "table.md").write_text(report.markdown(runs) + "\n\n" + report.sentence(runs) + "\n")
    report.draw(runs, work / "curves.png")
    if output_dir.exists():
        output_dir.rmdir()
    work.rename(output_dir)
    console.print(report.rich_table(runs))
    console.print(report.legend(runs) + "\n")
    console.print(report.sentence(runs) + "\n")
    console.print(
        f"Curves: {output_dir / 'curves.png'}; students: {output_dir / 'students'}; every number: {output_dir / 'results.json'}"
    )
    console.print("Your own models: speckd train --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER "
                  "--dataset_name DATA.jsonl --output_dir OUT")  # fmt: skip


@contextmanager
def _workers(context: Any, done_steps: Any) -> Iterator[ProcessPoolExecutor]:
    """Two worker processes, which end at once where something fails or the user interrupts."""
    pool = ProcessPoolExecutor(2, context, _begin, (done_steps,))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        workers = multiprocessing.active_children()
        for process in workers:
            process.terminate()
        for process in workers:
            process.join(_PATIENCE_S)
            if process.is_alive():  # seen once, on a busy machine
                process.kill()
        raise
    pool.shutdown()


_PATIENCE_S = 10

#: In a worker: how many steps all workers have done, for the progress bar.
_done_steps: Any = None


def _begin(done_steps: Any) -> None:
    global _done_steps  # noqa: PLW0603  (a worker's only state, set once)
    _done_steps = done_steps
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    torch.set_num_threads(1)  # two workers share two cores
    quiet_loading()


def _count_step() -> None:
    with _done_steps.get_lock():
        _done_steps.value += 1


def _train_examples(tokenizer: Any) -> list[Encoded]:
    return encode(list(islice(stream("train", LEVEL), TRAIN_EXAMPLES)), tokenizer)


@torch.no_grad()
def _store_teacher(work: Path) -> None:
    """The clean teacher's logits at every supervised token, in the order of samples and positions; its own test answers."""
    quiet_loading()
    teacher, tokenizer = load_teacher()
    encoded, pieces = _train_examples(tokenizer), []
    for start in range(0, len(encoded), 200):
        batch, mask = collate(encoded[start : start + 200], tokenizer.pad_token_id)
        rows = supervised_rows(batch)
        hidden = teacher.get_decoder()(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        pieces.append(LMHead.from_model(teacher)(hidden.flatten(0, 1)[rows.index]))
    save_file({"logits": torch.cat(pieces)}, work / STORED[0])
    asked = encode(distinct("test", TEST_EXAMPLES, LEVEL), tokenizer)
    texts = generate_greedy(teacher, asked, tokenizer.eos_token_id, tokenizer.pad_token_id)
    (work / STORED[1]).write_text(json.dumps(texts))


def _work(job: Job, work: Path) -> dict[str, Any]:
    """One job in a worker: train, measure, keep the student."""
    teacher, tokenizer = load_teacher()
    encoded = _train_examples(tokenizer)
    if job.method is None:
        student = llama(len(tokenizer), seed=job.seed, **STUDENT)
    else:
        student = type(teacher).from_pretrained(work / "students" / Job(job.seed, 0).name)
    logits = load_file(work / STORED[0])["logits"]
    curve = _train(student, job, encoded, logits, tokenizer.pad_token_id)
    student.save_pretrained(work / "students" / job.name)
    tokenizer.save_pretrained(work / "students" / job.name)
    measures = measure(student, teacher, tokenizer, json.loads((work / STORED[1]).read_text())) if job.method else {}
    return {"job": asdict(job), "measures": measures, "curve": curve}


def _train(student: Any, job: Job, encoded: list[Encoded], logits: Tensor, pad: int) -> list[dict[str, float]]:
    """A plain loop: batch, hidden states, objective, step. Returns loss and acceptance rate of every tenth step."""
    objective = METHODS[job.method or "SFT"]
    first = torch.tensor([0] + [len(e.ids) - e.prompt_length for e in encoded]).cumsum(0)  # where a sample's logits begin
    rate = LEARNING_RATE if job.method else START_LEARNING_RATE
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, job.steps + 1, pct_start=0.1)
    curve, tally, losses = [], AcceptanceTally(), []
    for step, chosen in enumerate(batches(len(encoded), BATCH_SIZE, job.seed + (1000 if job.method else 0), job.steps), 1):
        batch, mask = collate([encoded[i] for i in chosen], pad)
        rows = supervised_rows(batch, seed=job.seed)
        teacher: TeacherRows = DenseTeacher(logits, places(batch, rows, [encoded[i] for i in chosen], first))
        if TEACHERS[job.teacher]:
            teacher = ScrambledTeacher(teacher, UNRELIABLE, batch.sample_ids.flatten(), batch.position_ids.flatten(), job.seed)
        hidden = student.get_decoder()(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        output = distillation_loss(objective, hidden.flatten(0, 1), LMHead.from_model(student), teacher, rows)
        (output.sum / output.count).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        _count_step()
        tally.add(output)
        losses.append(float(output.sum.detach() / output.count))
        if step % 10 == 0 or step == job.steps:
            curve.append({"step": step, "loss": statistics.mean(losses), **_rate(tally)})
            tally, losses = AcceptanceTally(), []
    return curve


def places(batch: TokenBatch, rows: SupervisedRows, chosen: Sequence[Encoded], first: Tensor) -> Tensor:
    """[B·L]: for each supervised position of a batch, the row of the stored logits. `first`: where each sample's rows begin."""
    place = torch.zeros(batch.input_ids.numel(), dtype=torch.long)
    prompts = torch.tensor([e.prompt_length for e in chosen])
    place[rows.index] = first[rows.keys.sample] + rows.keys.position - prompts[rows.index // batch.input_ids.shape[1]]
    return place


def _rate(tally: AcceptanceTally) -> dict[str, float]:
    found = tally.result()
    return {"tar": found["tar"]} if "tar" in found else {}


def measure(student: Any, teacher: Any, tokenizer: Any, teacher_texts: list[list[int]]) -> dict[str, float]:
    """Held-out measures against the clean teacher, by one rule for all methods."""
    student.eval()
    examples = distinct("test", TEST_EXAMPLES, LEVEL)
    encoded = encode(examples, tokenizer)
    found = evaluate(student, teacher, None, [collate(encoded, tokenizer.pad_token_id)])
    answers = generate_greedy(student, encoded, tokenizer.eos_token_id, tokenizer.pad_token_id)
    found |= accuracy(examples, tokenizer.batch_decode(answers))
    return found | {"tau": block_efficiency(matches(student, encoded, teacher_texts, tokenizer))}


@torch.no_grad()
def matches(student: Any, encoded: list[Encoded], texts: list[list[int]], tokenizer: Any) -> list[Tensor]:
    """For each prompt, where the student's greedy token is the teacher's, along the teacher's greedy completion."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    written = [
        Encoded([*e.ids[: e.prompt_length], *t, end], e.prompt_length, e.sample) for e, t in zip(encoded, texts, strict=True)
    ]
    batch, mask = collate(written, pad)
    rows = supervised_rows(batch)
    ids, mask = batch.input_ids.to(student.device), mask.to(student.device)
    hidden = student.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    greedy = LMHead.from_model(student)(hidden.flatten(0, 1)[rows.index.to(hidden.device)]).argmax(-1)
    equal = greedy.cpu() == rows.labels
    return list(equal.split([len(e.ids) - e.prompt_length for e in written]))
