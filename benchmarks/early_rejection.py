"""What certified early rejection proves and what it earns on pairs of models that have read text, gate by gate.

    python benchmarks/early_rejection.py
    python benchmarks/early_rejection.py --teacher ../shared/models/stories260K --tokenizer ../shared/models/gpt2_tokenizer \
        --data ../shared/data/tinystories

Students (and, for GPT-2's vocabulary, their teacher) are trained first, about five minutes of one thread, and kept in `--work`:
a second run starts with the measurements. Prints markdown and writes it, with every single measurement, to
`benchmarks/results/`: one table of the pairs, and below it what looking at a row costs against projecting it, by vocabulary and
the teacher's width, which is where the switch's constants come from.
"""

import argparse
import statistics
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measure import interleaved, markdown, prepare_torch, ratio, spread, write
from pairs import Pair, gpt2_vocabulary, quickstart, stories260k
from speckd import LMHead, Objective, distillation_loss
from speckd.early_rejection import EarlyRejection
from speckd.engine import LossOutput, default_chunk_size
from speckd.gates import LabelInTopK, LabelRatio, Spec, TopK, TwoSided
from speckd.policies import Mask
from speckd.quickstart.models import quiet_loading
from speckd.spans import EARLY_REJECTION, GATE, TEACHER_HEAD, timing
from speckd.teachers import HiddenTeacher
from speckd.tokens import SupervisedRows
from speckd.types import DenseSignal, MonotoneGate, TokenKeys

CPU = torch.device("cpu")
GATES: dict[str, MonotoneGate] = {
    "TopK(5)": TopK(5),
    "TopK(1)": TopK(1),
    "Spec(5)": Spec(5),
    "TwoSided(5)": TwoSided(5),
    "LabelInTopK(5)": LabelInTopK(5),
    "LabelRatio(hard)": LabelRatio(hard=True),
}
DEFAULT, FORCED = EarlyRejection(), EarlyRejection(least_rate=0.0)
SWITCHES = {"without": None, "default": DEFAULT, "forced": FORCED}
SMALL_VOCABULARY, SMALL_TIMES = 10_000, 5
COSTED_GATES = ("TopK(5)", "Spec(5)", "LabelRatio(hard)")


# ---- one step ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched(HiddenTeacher):
    """Remembers which rows were looked at, and which were projected."""

    looked_at: list[int] = field(default_factory=list)
    projected: list[int] = field(default_factory=list)

    def logits_at(self, index: Tensor, token_ids: Tensor) -> Tensor:
        self.looked_at.extend(index.tolist())
        return super().logits_at(index, token_ids)

    def write_logits(self, index: Tensor, out: Tensor) -> None:
        self.projected.extend(index.tolist())
        super().write_logits(index, out)


@dataclass(frozen=True)
class Step:
    """Loss and gradients of hidden states and head, as a training step has them; rejected rows are masked."""

    hidden: Tensor
    head: LMHead
    teacher: HiddenTeacher
    rows: SupervisedRows

    @classmethod
    def of(cls, pair: Pair) -> "Step":
        return cls(pair.student_hidden, pair.student_head, pair.teacher, pair.rows)

    def __call__(self, gate: MonotoneGate, certify: EarlyRejection | None, teacher: HiddenTeacher | None = None) -> LossOutput:
        hidden, weight = self.hidden.detach().requires_grad_(), self.head.weight.detach().requires_grad_()
        output = distillation_loss(
            Objective(gate, Mask()), hidden, replace(self.head, weight=weight), teacher or self.teacher, self.rows,
            early_rejection=certify,
        )  # fmt: skip
        (output.sum / output.count).backward()
        return output


# ---- what is proved, and what the switch makes of it ---------------------------------------------------------------------


@dataclass(frozen=True)
class Proofs:
    """Shares of the rows: accepted by the gate, certified if every row is looked at, and what the default looked at, spared."""

    accepted: float
    certified: float
    looked_at: float
    spared: float

    @property
    def certified_of_rejected(self) -> float:
        return self.certified / (1 - self.accepted) if self.accepted < 1 else 0.0

    @property
    def decision(self) -> str:
        if self.looked_at == 0:
            return "not tried"
        return "goes on" if self.looked_at == 1 else f"stops, {self.looked_at:.0%} looked at"


def proofs(step: Step, gate: MonotoneGate) -> Proofs:
    """Raises SystemExit if an accepted row is certified: a wrong engine earns nothing."""
    accepted, certified = step(gate, None).terms.acceptance, ~possible(step, gate)
    if bool((accepted[certified] != 0).any()):
        raise SystemExit(f"*** {gate} accepts rows whose rejection is certified")
    watched = Watched(step.teacher.hidden, step.teacher.head)
    step(gate, DEFAULT, watched)
    looked_at, projected = (len(rows) / len(step.rows) for rows in (watched.looked_at, watched.projected))
    return Proofs(float(accepted.mean()), float(certified.float().mean()), looked_at, 1 - projected)


@torch.no_grad()
def possible(step: Step, gate: MonotoneGate) -> Tensor:
    """[N] bool, False where the rejection can be proved. (The engine projects every sixteenth row all the same.)"""
    found, rows = [], step.rows
    for some in torch.arange(len(rows)).split(default_chunk_size(step.head.weight.shape[0])):
        index, student = rows.index[some], DenseSignal(step.head(step.hidden[rows.index[some]]))
        found.append(FORCED.possible(gate, student, step.teacher, index, rows.labels[some], rows.keys.rows(some)))
    return torch.cat(found)


def pays_from(share: float) -> str:
    """The smallest vocabulary at which the default switch goes on where this share of all rows is certified."""
    largest = 2**24
    found = bisect_left(range(1, largest), True, key=lambda size: share >= DEFAULT.worth_it(size, "cpu")) + 1
    return f"{found:,}" if found < largest else "never"


def measure(pair: Pair, repeats: int) -> list[dict[str, Any]]:
    """One entry a gate. Steps of a small vocabulary take milliseconds: five times as many rounds."""
    repeats *= 1 if pair.vocabulary_size > SMALL_VOCABULARY else SMALL_TIMES
    print(f"{pair.name}: {len(pair.rows)} rows, V {pair.vocabulary_size}", flush=True)
    step = Step.of(pair)
    steps = {f"{gate}, {way}": partial(step, GATES[gate], certify) for gate in GATES for way, certify in SWITCHES.items()}
    proved = {name: proofs(step, gate) for name, gate in GATES.items()}
    taken = interleaved(steps, repeats, CPU)

    def seconds(gate: str) -> dict[str, list[float]]:
        return {way: taken[f"{gate}, {way}"]["cpu"] for way in SWITCHES}

    return [{"pair": pair.name, "gate": gate, **asdict(proved[gate]), "seconds": seconds(gate)} for gate in GATES]


HEAD = [
    "pair", "gate", "accepted", "rejected", "certified, of the rejected", "certified, of all", "threshold", "the switch",
    "pays from V ≥ (model)", "without, ms", "±", "default, ms", "forced, ms", "net profit, default", "net profit, forced",
]  # fmt: skip


def cells(entry: dict[str, Any], vocabulary_size: int) -> list[str]:
    found = Proofs(*(entry[name] for name in Proofs.__dataclass_fields__))
    seconds = entry["seconds"]
    milliseconds = {way: f"{1000 * statistics.median(taken):.1f}" for way, taken in seconds.items()}
    profit = [f"{1 - ratio(seconds[way], seconds['without']):+.1%}" for way in ("default", "forced")]
    shares = (found.accepted, 1 - found.accepted, found.certified_of_rejected, found.certified)
    least = DEFAULT.worth_it(vocabulary_size, "cpu")
    return [
        entry["pair"], entry["gate"], *(f"{share:.1%}" for share in shares), f"{least:.1%}",
        found.decision, pays_from(found.certified), milliseconds["without"], f"{spread(seconds['without']):.0%}",
        milliseconds["default"], milliseconds["forced"], *profit,
    ]  # fmt: skip


# ---- what looking costs --------------------------------------------------------------------------------------------------


class SpanSeconds:
    """CPU seconds of the engine's spans, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] += time.process_time() - start


def like_minded(vocabulary_size: int, teacher_weight: Tensor) -> Step:
    """A teacher of some width that says what the student says, so that no row is certified and none moved.

    The student is narrow: its products are not what is measured.
    """
    generator, narrow = torch.Generator().manual_seed(0), 32
    count, index = default_chunk_size(vocabulary_size), torch.arange(default_chunk_size(vocabulary_size))
    hidden = 4 * torch.randn(count, narrow, generator=generator) / narrow**0.5
    wide = torch.cat([hidden, hidden.new_zeros(count, teacher_weight.shape[1] - narrow)], -1)
    labels = torch.randint(vocabulary_size, (count,), generator=generator)
    rows = SupervisedRows(index, labels, TokenKeys(index // 16, index))
    weight = teacher_weight[:vocabulary_size]
    return Step(hidden, LMHead(weight[:, :narrow].contiguous()), HiddenTeacher(wide, LMHead(weight)), rows)


def costs(vocabularies: list[int], widths: list[int], repeats: int) -> list[dict[str, Any]]:
    """Seconds a row: of looking at it, and of projecting and judging it."""
    found = []
    for width in widths:
        weight = torch.randn(max(vocabularies), width)
        for size in vocabularies:
            step = like_minded(size, weight)
            for name in COSTED_GATES:
                print(f"  V {size}, Ht {width}, {name}", flush=True)
                spans = [_span_seconds(step, GATES[name]) for _ in range(repeats + 1)][1:]
                looking = [own[EARLY_REJECTION] / len(step.rows) for own in spans]
                projecting = [(own[TEACHER_HEAD] + own[GATE]) / len(step.rows) for own in spans]
                found.append({"gate": name, "V": size, "Ht": width, "looking": looking, "projecting": projecting})
        del weight  # gigabytes
    return found


def _span_seconds(step: Step, gate: MonotoneGate) -> dict[str, float]:
    clock = SpanSeconds()
    with timing(clock):
        step(gate, FORCED)
    return clock.seconds


def cost_table(found: list[dict[str, Any]]) -> str:
    head = ["gate", "Ht", "V", "looking, µs a row", "projecting, µs a row", "break-even", "break-even, model"]
    rows = []
    for entry in found:
        looking, projecting = (1e6 * statistics.median(entry[name]) for name in ("looking", "projecting"))
        share = ratio(entry["looking"], entry["projecting"])
        shares = [f"{share:.1%}", f"{DEFAULT.worth_it(entry['V']) / 2:.1%}"]
        rows.append([entry["gate"], str(entry["Ht"]), f"{entry['V']:,}", f"{looking:.0f}", f"{projecting:.0f}", *shares])
    return markdown(head, rows)


# ---- the command line ----------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    shared = Path(__file__).parents[2] / "shared"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=shared / "models" / "stories260K")
    parser.add_argument("--tokenizer", type=Path, default=shared / "models" / "gpt2_tokenizer")
    parser.add_argument("--data", type=Path, default=shared / "data" / "tinystories", help="folder with train.jsonl, dev.jsonl")
    parser.add_argument("--work", type=Path, default=Path("runs") / "early-rejection", help="where trained models are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--student_steps", type=int, default=400, help="of stories260K's student")
    parser.add_argument("--quickstart_steps", type=int, default=300, help="of the quickstart's start student")
    parser.add_argument("--gpt2_teacher_steps", type=int, default=180)
    parser.add_argument("--gpt2_student_steps", type=int, nargs="+", default=[60, 400], help="one student each")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8_000, 32_000, 50_257, 152_064])
    parser.add_argument("--teacher_widths", type=int, nargs="+", default=[1024, 3584])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def line_of(pair: Pair) -> str:
    widths = f"Hs {pair.student_hidden.shape[-1]}, Ht {pair.teacher.hidden.shape[-1]}"
    nll = f"student {pair.nll[0]:.2f}, teacher {pair.nll[1]:.2f} nats a token"
    return f"- **{pair.name}**: V {pair.vocabulary_size:,}, {widths}, {len(pair.rows)} held-out tokens; {pair.about}; {nll}"


def all_pairs(args: argparse.Namespace) -> Iterator[Pair]:
    args.work.mkdir(parents=True, exist_ok=True)
    yield from stories260k(args.teacher, args.data, args.work, args.student_steps, sequences=8)
    yield from quickstart(args.work, args.quickstart_steps, sequences=96)
    steps = (args.gpt2_teacher_steps, args.gpt2_student_steps)
    yield from gpt2_vocabulary(args.tokenizer, args.data, args.work, *steps, sequences=8)


def main() -> None:
    args = parse()
    for folder in (args.teacher, args.tokenizer, args.data):
        if not folder.is_dir():
            raise SystemExit(f"*** {folder} is not there: name it with --teacher, --tokenizer, --data")
    prepare_torch(args.threads)
    quiet_loading()
    pairs = list(all_pairs(args))
    entries = [entry for pair in pairs for entry in measure(pair, args.repeats)]
    sizes = {pair.name: pair.vocabulary_size for pair in pairs}
    costed = costs(args.vocabularies, args.teacher_widths, 3)
    text = "\n\n".join([
        "\n".join(line_of(pair) for pair in pairs),
        f"CPU seconds of one loss step (forward KL, rejected rows masked, gradients of hidden states and head), {args.threads} "
        f"thread(s), float32, interleaved, median of {args.repeats} rounds, at small vocabularies of "
        f"{SMALL_TIMES * args.repeats}; ±: half the range. Net profit: time saved, median over the rounds. Certified: proved "
        "if every row is looked at. Threshold: the share of all rows from which the default goes on; pays from: the vocabulary "
        f"at which the certified share reaches it, which is {pays_from(1.0)} at the least.",
        markdown(HEAD, [cells(entry, sizes[entry["pair"]]) for entry in entries]),
        "What looking at a row costs, beside projecting and judging it; break-even: the share of all rows that must be "
        "certified for looking to cost what it spares; by the model, half the default's threshold. The teacher says what the "
        "student says, so that no row is certified and none moved.",
        cost_table(costed),
    ])  # fmt: skip
    about = {pair.name: {"V": pair.vocabulary_size, "about": pair.about, "nll": pair.nll} for pair in pairs}
    result = {"clock": "cpu", "threads": args.threads, "pairs": about, "gates": entries, "costs": costed}
    path = write(args.out, "early-rejection", CPU, result | {"markdown": text.splitlines()})
    print(f"\n{text}\n\nWritten: {path.name}")


if __name__ == "__main__":
    main()
