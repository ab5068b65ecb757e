"""The models that runs begin with, made once and kept: teachers, what they say of the training tasks, starting students."""

import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speckd import LMHead, supervised_rows
from speckd.bench.plan import Run, Shape, Teacher, TrainedOn, World
from speckd.fingerprints import of_bytes
from speckd.quickstart.data import Encoded, batches, collate, encode
from speckd.quickstart.evaluation import generate_greedy
from speckd.quickstart.models import llama, load_teacher, quiet_loading
from speckd.tasks import Example, distinct, stream

_GROUP = 32  # of weights that share a scale
_AT_ONCE = 200


# ---- tasks -------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return load_teacher()[1]


@lru_cache(maxsize=2)
def training_tasks(world: World) -> list[Encoded]:
    """As a student sees them."""
    return encode(list(islice(stream("train", world.level), world.train)), tokenizer())


@lru_cache(maxsize=4)
def measured_examples(world: World, split: str) -> list[Example]:
    return distinct(split, world.test if split == "test" else world.validation, world.level)  # type: ignore[arg-type]


# ---- training by cross-entropy -------------------------------------------------------------------------------------------


def fit(model: Any, batches: Iterator[list[Encoded]], steps: int, learning_rate: float, decay: float = 0.0) -> None:
    """Plain AdamW on completions, one cycle."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps + 1, pct_start=0.1)
    model.train()
    for chosen in islice(batches, steps):
        batch, mask = collate(chosen, tokenizer().pad_token_id)
        device = model.device
        loss = model(input_ids=batch.input_ids.to(device), attention_mask=mask.to(device), labels=batch.labels.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def _stream_batches(world: World, trained: TrainedOn, seed: int) -> Iterator[list[Encoded]]:
    """Tasks without end, of the same kind as the training tasks but other ones; some with another task's completion."""
    examples = stream("train", world.level, seed + 1, trained.families)
    draw = random.Random(f"noise/{seed}")
    while True:
        own = list(islice(examples, world.batch_size * 2))
        mixed = []
        for example in own:
            others = [other for other in own if other.family == example.family]
            wrong = draw.random() < trained.label_noise
            completion = draw.choice(others).completion if wrong else example.completion
            mixed.append(Example(example.family, example.level, example.core, example.prompt, completion, example.answer))
        yield encode(mixed, tokenizer())


# ---- teachers ----------------------------------------------------------------------------------------------------------------


def clean_teacher(world: World, folder: Path) -> Any:
    """The measures' teacher: the shipped one, or one of the plan's, trained once."""
    return teacher_model(world, Teacher(), folder)


@lru_cache(maxsize=2)
def teacher_model(world: World, teacher: Teacher, folder: Path) -> Any:
    """A base teacher's model, loaded, or made and kept."""
    teacher = replace(teacher, prefix="")  # which is of the question, not of the model
    path = folder / f"teacher-{_name(world, teacher, 'model')}"
    if not path.exists():
        model = _make_teacher(world, teacher, folder)
        model.save_pretrained(_temporary(path))
        _publish(path)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(world.device).eval()
    return model.requires_grad_(False)


def _make_teacher(world: World, teacher: Teacher, folder: Path) -> Any:
    if teacher.shape is not None or (world.teacher is not None and _plain(teacher)):
        shape, trained = teacher.shape or world.teacher, teacher.trained or world.teacher_trained
        assert shape is not None
        assert trained is not None
        model = build(shape, seed=1).to(world.device)
        fit(model, _stream_batches(world, trained, seed=1), trained.steps, trained.learning_rate, decay=0.01)
    elif _plain(teacher):
        model = load_teacher()[0]
    else:
        model = clean_teacher(world, folder).requires_grad_(True)
        teacher_model.cache_clear()  # the clean one is changed here
        if teacher.trained is not None:
            fit(model, _stream_batches(world, teacher.trained, seed=2), teacher.trained.steps, teacher.trained.learning_rate)
    if teacher.bits is not None:
        _round_matrices(model, teacher.bits)
    return model


def _plain(teacher: Teacher) -> bool:
    return teacher.shape is None and teacher.trained is None and teacher.bits is None


def build(shape: Shape, seed: int) -> Any:
    return llama(len(tokenizer()), shape.hidden, shape.layers, shape.heads, seed)


@torch.no_grad()
def _round_matrices(model: Any, bits: int) -> None:
    """Each group of 32 weights to the nearest of 2^bits − 1 levels around 0, as weight-only quantisation does."""
    top = 2 ** (bits - 1) - 1
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            weight = module.weight
            padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % _GROUP))
            groups = padded.unflatten(1, (-1, _GROUP))
            scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
            weight.copy_(((groups / scale).round() * scale).flatten(1)[:, : weight.shape[1]])


# ---- what teachers say ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def supervised_logits(model: Any, encoded: Sequence[Encoded]) -> Tensor:
    """[tokens, V] float32 on the CPU, at every supervised token, sample after sample."""
    pieces = []
    for start in range(0, len(encoded), _AT_ONCE):
        batch, mask = collate(encoded[start : start + _AT_ONCE], tokenizer().pad_token_id)
        rows = supervised_rows(batch)
        ids, mask = batch.input_ids.to(model.device), mask.to(model.device)
        hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        pieces.append(LMHead.from_model(model)(hidden.flatten(0, 1)[rows.index.to(hidden.device)]).cpu())
    return torch.cat(pieces)


@torch.no_grad()
def written(model: Any, tasks: Sequence[Encoded], world: World, seed: int) -> list[Encoded]:
    """Each task's prompt with a completion that the model samples; each sample's draws are the batch's, so keep batches."""
    end, pad, found = tokenizer().eos_token_id, tokenizer().pad_token_id, []
    for start in range(0, len(tasks), _AT_ONCE):
        own = tasks[start : start + _AT_ONCE]
        texts = _sample(model, own, world.max_new_tokens, end, pad, seed + start)
        found += [
            Encoded([*e.ids[: e.prompt_length], *text], e.prompt_length, e.sample) for e, text in zip(own, texts, strict=True)
        ]
    return found


def _sample(model: Any, tasks: Sequence[Encoded], new_tokens: int, end: int, pad: int, seed: int) -> list[list[int]]:
    """Completions up to and with the end token, at temperature 1; one that does not end is cut."""
    length = max(e.prompt_length for e in tasks)
    ids, mask = torch.full((len(tasks), length), pad), torch.zeros((len(tasks), length), dtype=torch.long)
    for row, e in enumerate(tasks):
        ids[row, length - e.prompt_length :] = torch.tensor(e.ids[: e.prompt_length])
        mask[row, length - e.prompt_length :] = 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=new_tokens, do_sample=True, top_k=0,
            top_p=1.0, eos_token_id=end, pad_token_id=pad,
        )[:, length:].tolist()  # fmt: skip
    return [text[: text.index(end) + 1] if end in text else text for text in out]


@lru_cache(maxsize=3)
def stored_answers(world: World, teacher: Teacher, teacher_text: bool, folder: Path) -> tuple[list[Encoded], Tensor]:
    """What is trained on, as the student sees it, and the base teacher's logits there; made once."""
    path = folder / f"answers-{_name(world, teacher, 'text' if teacher_text else 'data')}.safetensors"
    tasks = training_tasks(world)
    if not path.exists():
        model = teacher_model(world, teacher, folder)
        if teacher_text:
            tasks = written(model, tasks, world, seed=3)
        seen = [shown(e, teacher.prefix) for e in tasks]
        kept = {"logits": supervised_logits(model, seen)}
        if teacher_text:
            kept |= {
                "ids": torch.tensor([t for e in tasks for t in e.ids]),
                "lengths": torch.tensor([len(e.ids) for e in tasks]),
            }
        save_file(kept, _temporary(path))
        _publish(path)
    found = load_file(path)
    if teacher_text:
        texts = found["ids"].split(found["lengths"].tolist())
        tasks = [Encoded(t.tolist(), e.prompt_length, e.sample) for t, e in zip(texts, tasks, strict=True)]
    return tasks, found["logits"]


def shown(task: Encoded, prefix: str) -> Encoded:
    """As a teacher sees it; `prefix`: words before the prompt."""
    before = tokenizer()(prefix).input_ids if prefix else []
    return Encoded([*before, *task.ids], task.prompt_length + len(before), task.sample)


@lru_cache(maxsize=4)
def teacher_texts(world: World, split: str, folder: Path) -> list[list[int]]:
    """The clean teacher's greedy answers to the measured tasks, without the end token."""
    path = folder / f"greedy-{_name(world, Teacher(), split)}.json"
    if not path.exists():
        asked = encode(measured_examples(world, split), tokenizer())
        model = clean_teacher(world, folder)
        texts = generate_greedy(model, asked, tokenizer().eos_token_id, tokenizer().pad_token_id)
        _temporary(path).write_text(json.dumps(texts))
        _publish(path)
    found: list[list[int]] = json.loads(path.read_text())
    return found


# ---- starts ------------------------------------------------------------------------------------------------------------------


def start_path(run: Run, folder: Path) -> Path:
    known = f"{version('speckd')}/{run.world}/{run.seed}/{run.start_steps}"
    return folder / f"start-{of_bytes([known.encode()])[:16]}"


def starting_student(run: Run, folder: Path) -> Any:
    """The student that a run starts from: random, or after `start_steps` of SFT; the same weights for all of a seed."""
    student = build(run.world.student, run.seed)
    if run.start_steps:
        path = start_path(run, folder)
        if not path.exists():
            tasks = training_tasks(run.world)
            chosen = ([tasks[i] for i in b] for b in batches(len(tasks), run.world.batch_size, run.seed, run.start_steps))
            fit(student.to(run.world.device), chosen, run.start_steps, run.world.start_learning_rate)
            student.cpu().save_pretrained(_temporary(path))
            _publish(path)
        student = type(student).from_pretrained(path)
    return student.to(run.world.device)


# ---- keeping -----------------------------------------------------------------------------------------------------------------


def _name(world: World, teacher: Teacher, what: str) -> str:
    return of_bytes([f"{version('speckd')}/{world}/{teacher.base}/{what}".encode()])[:16]


def _temporary(path: Path) -> Path:
    quiet_loading()
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.{os.getpid()}.unfinished")


def _publish(path: Path) -> None:
    """Whole or not at all; where another process was first, its result stands."""
    mine = _temporary(path)
    try:
        mine.rename(path)
    except OSError:  # a folder that is there already
        if not path.exists():
            raise
        shutil.rmtree(mine)
