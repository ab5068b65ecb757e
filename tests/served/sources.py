"""One teacher, by whatever way it answers: verdicts, loss and gradients beside those of the teacher in this process.

    python -m tests.served.sources                              in process and cached
    SPECKD_VLLM=FOLDER/bin/python python -m tests.served.sources     and served by a real vLLM (`vllm_cpu.py`)

For stories260K (from shared/) and the quickstart's teacher; the student is a copy of the teacher, disturbed, so that the gate
accepts some tokens and not others. Prints a table.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from speckd.compatibility import SharedVocabulary
from speckd.engine import distillation_loss
from speckd.gates import TopK
from speckd.head import LMHead
from speckd.objective import Objective
from speckd.policies import Mask
from speckd.teachers import TopKTeacher
from speckd.teachers.answers import Answer
from speckd.teachers.cached import CachedSource
from speckd.teachers.client import Load, ServerPool
from speckd.teachers.layout import Kind, Layout
from speckd.teachers.model import ModelSource
from speckd.teachers.record import sequence_key
from speckd.teachers.served import ServedSource
from speckd.teachers.source import Question, TeacherSource
from speckd.teachers.store import Store, StoreWriter
from speckd.teachers.vllm import VLLM
from speckd.tokens import TokenBatch, sequences, supervised_rows, token_batch
from speckd.types import DenseSignal, TeacherRows
from tests.served.test_real_vllm import PYTHON, QUICKSTART, STORIES, TIMES, Local, free_port
from tests.served.vllm_cpu import RealServer
from tests.served.widened import widen

OBJECTIVE = Objective(TopK(5), Mask())
TOP_K = 32


@dataclass(frozen=True)
class Case:
    """One batch, the teacher, and a student's hidden states and head."""

    local: Local
    question: Question
    student_hidden: Tensor
    student_head: LMHead
    vocabulary: SharedVocabulary

    @classmethod
    @torch.no_grad()
    def of(cls, folder: Path) -> "Case":
        local = Local(folder)
        rows = local.sequences(24, 48)
        ids = pad_sequence(rows, batch_first=True)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        labels = torch.where((mask == 1) & (torch.arange(ids.shape[1]) >= 4), ids, -100)
        batch: TokenBatch = token_batch(ids, labels, mask)
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in student.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator))
        hidden = student.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        head = LMHead.from_model(student).detached()
        question = Question({"input_ids": ids, "attention_mask": mask}, batch, supervised_rows(batch))
        return cls(local, question, hidden.flatten(0, 1), head, SharedVocabulary(local.vocabulary))


@dataclass(frozen=True)
class Found:
    """[N] verdicts, the loss and its gradients for hidden states and head."""

    verdicts: Tensor
    loss: float
    hidden: Tensor
    weight: Tensor


def learnt(case: Case, teacher: TeacherRows) -> Found:
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_head.weight.clone().requires_grad_()
    output = distillation_loss(OBJECTIVE, hidden, LMHead(weight), teacher, case.question.rows)
    (output.sum / output.count).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Found(output.terms.acceptance, float(output.sum.detach() / output.count), hidden.grad, weight.grad)


def truncated(case: Case, whole: TeacherRows) -> TeacherRows:
    """The teacher in process, cut to its top-K in float32: what a source that gives K tokens has to say."""
    rows = case.question.rows
    signal = whole.signal(rows.index)
    assert isinstance(signal, DenseSignal)
    best = signal.log_probs.topk(TOP_K)
    place = torch.zeros(case.question.tokens.input_ids.numel(), dtype=torch.int64)
    place[rows.index] = torch.arange(len(rows))
    return TopKTeacher(best.indices, best.values, signal.label_log_prob(rows.labels), place)


def cached(case: Case, whole: TeacherRows, layout: Layout, folder: Path) -> CachedSource:
    """Written and read again."""
    signal = whole.signal(case.question.rows.index)
    assert isinstance(signal, DenseSignal)
    labels = signal.label_log_prob(case.question.rows.labels)
    asked = list(sequences(case.question.tokens, case.question.rows))
    answers = []
    for one in asked:
        own = signal.log_probs[one.rows]
        best = own.topk(layout.width)
        ids, values = (None, own) if layout.kind is Kind.FULL else (best.indices, best.values)
        answers.append((one.token_ids, Answer(one.positions, ids, values, labels[one.rows])))
    writer = StoreWriter.open(folder, layout, {}, [[sequence_key(one.token_ids) for one in asked]])
    writer.write(0, answers)
    writer.publish()
    return CachedSource(Store.open(folder), case.vocabulary)


def served(case: Case, url: str, top_k: int | None) -> ServedSource:
    pool = ServerPool(
        [url], VLLM(), vocabulary=case.vocabulary.size, top_k=top_k, timeouts=TIMES, load=Load(concurrency=4, tokens=1024)
    )
    pool.probe(case.question.tokens.input_ids.shape[1], case.local.texts())
    return ServedSource(pool, case.vocabulary, top_k)


def ways(case: Case, whole: TeacherRows, place: Path, url: str | None) -> Iterator[tuple[str, bool, TeacherSource]]:
    """(name, is it cut to the top K, source)."""
    size = case.vocabulary.size
    yield "cached, all, 32 bits", False, cached(case, whole, Layout(Kind.FULL, size, size, 32), place / "a")
    yield "cached, K = V, 16 bits", False, cached(case, whole, Layout(Kind.TOP_K, size, size, 16), place / "b")
    yield f"cached, K = {TOP_K}, 32 bits", True, cached(case, whole, Layout(Kind.TOP_K, size, TOP_K, 32), place / "c")
    yield f"cached, K = {TOP_K}, 16 bits", True, cached(case, whole, Layout(Kind.TOP_K, size, TOP_K, 16), place / "d")
    if url is not None:
        yield "vLLM, K = V", False, served(case, url, None)
        yield f"vLLM, K = {TOP_K}", True, served(case, url, TOP_K)


@dataclass(frozen=True)
class Gap:
    """Of a way to ask from the teacher in this process, whole or cut alike. `verdicts`: how many differ from the whole
    teacher's; `loss`, and of the `gradients` the larger one, are relative; `of_whole`: the loss over the whole teacher's."""

    verdicts: int
    tokens: int
    accepted: int
    loss: float
    gradients: float
    of_whole: float


def gaps(folder: Path, place: Path, url: str | None) -> Iterator[tuple[str, Gap]]:
    case = Case.of(folder)
    whole = ModelSource(case.local.model, case.vocabulary, torch.device("cpu")).launch(case.question).rows()
    exact, cut = learnt(case, whole), learnt(case, truncated(case, whole))
    for name, is_cut, source in ways(case, whole, place, url):
        found = learnt(case, source.launch(case.question).rows())
        source.close()
        wanted = cut if is_cut else exact
        gradients = max(
            float((a.double() - b.double()).norm() / b.double().norm())
            for a, b in ((found.hidden, wanted.hidden), (found.weight, wanted.weight))
        )
        yield (
            name,
            Gap(
                int((found.verdicts != exact.verdicts).sum()),
                len(exact.verdicts),
                int(exact.verdicts.sum()),
                abs(found.loss - wanted.loss) / wanted.loss,
                gradients,
                found.loss / exact.loss,
            ),
        )


def main() -> int:
    models: dict[str, Path] = {"stories260K": STORIES, "quickstart's teacher": QUICKSTART}
    print("| teacher | way | tokens (accepted) | verdicts that differ | loss, relative | gradients, relative | loss ÷ whole |")
    print("|---|---|---|---|---|---|---|")
    for title, folder in models.items():
        if not folder.is_dir():
            print(f"*** NOT THERE: {title}", file=sys.stderr)
            continue
        with ExitStack() as stack:
            place = Path(stack.enter_context(TemporaryDirectory()))
            url = None
            if PYTHON:
                model = widen(folder, place / "teacher")
                url = stack.enter_context(RealServer(PYTHON, model, free_port(), place / "log", "--max-logprobs", "-1")).url
            for name, gap in gaps(folder, place, url):
                cells = [f"{gap.tokens} ({gap.accepted})", str(gap.verdicts), f"{gap.loss:.1e}", f"{gap.gradients:.1e}"]
                print("|", " | ".join([title, name, *cells, f"{gap.of_whole:.4f}"]), "|", flush=True)
    if not PYTHON:
        print("*** NO REAL SERVER: SPECKD_VLLM is not set", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
