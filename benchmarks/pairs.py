"""Teachers and students whose distributions are those of real text, trained here where they do not exist; small, one seed."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_text import fresh_student
from speckd import LMHead, Objective, distillation_loss, supervised_rows
from speckd.quickstart.compare import LEVEL, START_LEARNING_RATE, STUDENT, TRAIN_EXAMPLES
from speckd.quickstart.data import Encoded, collate, encode
from speckd.quickstart.models import llama, load_teacher
from speckd.tasks import distinct, stream
from speckd.teachers import HiddenTeacher
from speckd.tokens import SupervisedRows, TokenBatch

SEED = 0
SFT = Objective(label_loss_weight=1.0)
GPT2_TEACHER, GPT2_STUDENT = (
    {"hidden": 256, "layers": 4, "heads": 8},
    {"hidden": 128, "layers": 2, "heads": 4},
)
#: Of a large vocabulary most steps see what the text uses, 4 times faster; one step in so many, and the last, see all of it.
WHOLE = 8

Optimizers = Sequence[torch.optim.Optimizer]
Batches = Iterator[tuple[TokenBatch, Tensor]]  # with the attention mask


@dataclass(frozen=True)
class Pair:
    """What both models say of one batch of held-out text, with everything that a loss step needs.

    `student_hidden`: [B·L, Hs]; `about`: how the two were made; `nll`: nats a token, the student's and the teacher's.
    """

    name: str
    about: str
    rows: SupervisedRows
    student_hidden: Tensor
    student_head: LMHead
    teacher: HiddenTeacher
    nll: tuple[float, float]

    @property
    def vocabulary_size(self) -> int:
        return self.teacher.vocabulary_size


# ---- training ------------------------------------------------------------------------------------------------------------


def trained(folder: Path, fresh: Callable[[], Any], train: Callable[[Any], None]) -> Any:
    """The model in a folder, which is made where it is absent."""
    if not folder.exists():
        model = fresh()
        train(model)
        unfinished = folder.with_name(folder.name + ".unfinished")
        model.save_pretrained(unfinished)
        unfinished.rename(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def fit(model: Any, batches: Batches, steps: int, optimizers: Optimizers, used: Tensor | None) -> None:
    """SFT, with linear warm-up over a tenth of the steps and linear decay over the second half.

    `used`: the text's tokens, ascending, to which most steps are confined; None: no step is.
    """
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1, (step + 1) / (0.1 * steps), 2 * (1 - step / steps)))
        for o in optimizers
    ]
    for step, (batch, mask) in enumerate(islice(batches, steps)):
        rows, head = supervised_rows(batch), LMHead.from_model(model)
        if used is not None and step % WHOLE and step < 0.95 * steps:
            rows = replace(rows, labels=torch.searchsorted(used, rows.labels))
            head = head.restricted(used)
        output = distillation_loss(SFT, _hidden(model, batch, mask), head, None, rows)
        loss = output.sum / output.count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for member in [*optimizers, *schedules]:
            member.step()
        model.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"  step {step} of {steps}: {float(loss.detach()):.3f} nats", flush=True)


def adamw(model: Any, rate: float) -> Optimizers:
    return [torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)]


def muon(model: Any) -> Optimizers:
    """For few steps: at a given time, half a nat better than AdamW alone."""
    inner = [p for p in model.get_decoder().layers.parameters() if p.ndim == 2]
    outer = [p for p in model.parameters() if all(p is not own for own in inner)]
    return [
        torch.optim.AdamW(outer, lr=5e-3, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
        torch.optim.Muon(inner, lr=0.05, weight_decay=0.0),
    ]


def shuffled(encoded: Sequence[Encoded], size: int, pad: int) -> Batches:
    generator, order = torch.Generator().manual_seed(SEED), []
    while True:
        if len(order) < size:
            order += torch.randperm(len(encoded), generator=generator).tolist()
        yield collate([encoded[i] for i in order[:size]], pad)
        order = order[size:]


def stories(file: Path, tokenizer: Any, length: int) -> list[Encoded]:
    """One stream of stories, each behind the token that begins a text, in windows of equal length."""
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    ids = [
        i for own in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids for i in (tokenizer.bos_token_id, *own)
    ]
    return [Encoded(ids[at : at + length], 0, at // length) for at in range(0, len(ids) - length + 1, length)]


# ---- what they say -------------------------------------------------------------------------------------------------------


def _hidden(model: Any, batch: TokenBatch, mask: Tensor) -> Tensor:
    found = model.get_decoder()(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)
    return found.last_hidden_state.flatten(0, 1)


@torch.no_grad()
def pair(name: str, about: str, student: Any, teacher: Any, batch: TokenBatch, mask: Tensor) -> Pair:
    rows, states, heads = supervised_rows(batch), [], []
    for model in (student, teacher):
        states.append(_hidden(model, batch, mask))
        heads.append(LMHead.from_model(model).detached())
    outputs = [distillation_loss(SFT, hidden, head, None, rows) for hidden, head in zip(states, heads, strict=True)]
    nll = tuple(float(output.sum / output.count) for output in outputs)
    return Pair(name, about, rows, states[0], heads[0], HiddenTeacher(states[1], heads[1]), nll)


# ---- the pairs -----------------------------------------------------------------------------------------------------------


def stories260k(teacher_folder: Path, data: Path, work: Path, steps: int, sequences: int) -> Iterator[Pair]:
    """stories260K and the student of `real_text.py`, a quarter of its size."""
    tokenizer, length = AutoTokenizer.from_pretrained(teacher_folder), 256
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval().requires_grad_(False)
    texts = stories(data / "train.jsonl", tokenizer, length)

    def fresh() -> Any:
        fresh_student(teacher_folder, work / "stories260K-fresh", SEED)
        return AutoModelForCausalLM.from_pretrained(work / "stories260K-fresh", dtype=torch.float32)

    def train(model: Any) -> None:
        fit(model, shuffled(texts, 16, tokenizer.pad_token_id), steps, adamw(model, 3e-3), None)

    student = trained(work / f"stories260K-student-{steps}-steps", fresh, train)
    held_out = collate(stories(data / "dev.jsonl", tokenizer, length)[:sequences], tokenizer.pad_token_id)
    about = f"student of a quarter of the size, {steps} steps of 16 windows of {length} tokens of TinyStories"
    yield pair("stories260K", about, student, teacher, *held_out)


def quickstart(work: Path, steps: int, sequences: int) -> Iterator[Pair]:
    """The shipped teacher, and a student on its way to the start of the quickstart's methods."""
    teacher, tokenizer = load_teacher()
    examples = encode(list(islice(stream("train", LEVEL), TRAIN_EXAMPLES)), tokenizer)

    def train(model: Any) -> None:
        fit(model, shuffled(examples, 24, tokenizer.pad_token_id), steps, adamw(model, START_LEARNING_RATE), None)

    fresh = llama(len(tokenizer), seed=SEED, **STUDENT)
    student = trained(work / f"quickstart-student-{steps}-steps", lambda: fresh, train)
    held_out = collate(encode(distinct("test", sequences, LEVEL), tokenizer), tokenizer.pad_token_id)
    yield pair("quickstart", f"start student after {steps} steps of 24 tasks", student, teacher, *held_out)


def gpt2_vocabulary(
    tokenizer_folder: Path, data: Path, work: Path, teacher_steps: int, student_steps: Sequence[int], sequences: int
) -> Iterator[Pair]:
    """Small Llamas over GPT-2's 50,257 tokens; the student at several stages."""
    tokenizer, length = AutoTokenizer.from_pretrained(tokenizer_folder), 128
    texts = stories(data / "train.jsonl", tokenizer, length)
    used = torch.tensor([e.ids for e in texts]).unique()

    def model_of(role: str, shape: dict[str, int], steps: int, size: int) -> Any:
        def train(model: Any) -> None:
            fit(model, shuffled(texts, size, tokenizer.eos_token_id), steps, muon(model), used)

        folder = work / f"gpt2-vocabulary-{role}-{steps}-steps"
        return trained(folder, lambda: llama(len(tokenizer), seed=SEED, **shape), train)

    teacher = model_of("teacher", GPT2_TEACHER, teacher_steps, 8)
    held_out = collate(stories(data / "dev.jsonl", tokenizer, length)[:sequences], tokenizer.eos_token_id)
    for steps in student_steps:
        student = model_of("student", GPT2_STUDENT, steps, 4)
        about = (
            f"teacher {GPT2_TEACHER['hidden']} × {GPT2_TEACHER['layers']} after {teacher_steps} steps of 8 windows of {length} "
            f"tokens of TinyStories, student {GPT2_STUDENT['hidden']} × {GPT2_STUDENT['layers']} after {steps} steps of 4"
        )
        yield pair(f"GPT-2 vocabulary, {steps} steps", about, student, teacher, *held_out)
