"""The kernels against float64 oracles: run by `test_kernels.py`, in Triton's interpreter, and on a GPU where there is one."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from speckd import LMHead, Objective
from speckd.divergences import AdaptiveKL, AlphaBeta, Entrywise, SkewedForwardKL, exp, forward_kl, log, where
from speckd.gates import NoGate
from speckd.kernels import available, kernel_pass, row_pass, signal, statistics, swap_rows, usable
from speckd.kernels.kernel_pass import KernelPass, move_rows
from speckd.kernels.statistics import MeasuredSignal, Statistics
from speckd.objective import token_terms
from speckd.policies import DownWeight, Label, Mask, Residual
from speckd.row_pass import JudgedRows, RowPass, RowResults, wants_support
from speckd.sequence_kl import SequenceReverseKL
from speckd.types import BatchGate, DenseSignal, PolicyGradient, Rows, TeacherSignal, TokenKeys, TopKSignal
from tests.parity.cases import DIVERGENCES, ENTRYWISE, GATES

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
#: Neither a multiple of a tile nor of a block; more than one block of either kind of kernel.
WIDTH = 9001 if GPU else 200
K = 6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    if not GPU:
        monkeypatch.setattr(kernel_pass, "BLOCK", 128)
        monkeypatch.setattr(statistics, "BLOCK", 128)


def drawn(count: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(count, width, generator=generator)).to(dtype).to(DEVICE)


def keys(count: int) -> TokenKeys:
    index = torch.arange(count, device=DEVICE)
    return TokenKeys(index // 3, index % 3, seed=5, epoch=1)


# ---- statistics and ranks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "width"),
    [*((torch.float32, width) for width in (1, 127, 128, 129, 300, 4500)), (torch.bfloat16, 300), (torch.float16, 4500)],
)
def test_statistics(dtype: torch.dtype, width: int) -> None:
    logits = drawn(5, width, width, dtype)
    logits[1, width // 3 :: 7] = 50  # ties, in many tiles
    logits[2, : width - 1] = -torch.inf
    logits[3, width // 2] = 40
    found, exact = Statistics.of(logits, 2.5), logits.double()
    shifted = exact - exact.amax(-1, keepdim=True)
    assert torch.equal(found.maximum.double(), exact.amax(-1))
    assert found.argmax.tolist() == [row.index(max(row)) for row in exact.tolist()]
    torch.testing.assert_close(found.log_mass.double(), shifted.logsumexp(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.log_mass_at.double(), (shifted / 2.5).logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(found.tile_maxima, DenseSignal(logits.float()).tile_maxima)
    assert torch.equal(Statistics.of(logits).log_mass_at, found.log_mass)


@pytest.mark.parametrize(("bad", "seen"), [(math.nan, math.nan), (math.inf, math.inf), (-math.inf, -math.inf)])
@pytest.mark.parametrize("place", [0, 150, WIDTH - 1])
def test_what_is_not_finite_comes_through(bad: float, seen: float, place: int) -> None:
    logits = drawn(3, WIDTH)
    logits[1, place] = bad
    if bad == -math.inf:
        logits[1] = bad
    maximum = Statistics.of(logits).maximum
    assert torch.isfinite(maximum).tolist() == [True, False, True]
    torch.testing.assert_close(maximum[1].item(), seen, equal_nan=True)


def test_statistics_of_no_rows() -> None:
    assert [len(part) for part in vars(Statistics.of(drawn(0, WIDTH))).values()] == [0] * 5


@pytest.mark.parametrize(("dtype", "k"), [*((torch.float32, k) for k in (1, 2, 5, 40, WIDTH, WIDTH + 1)), (torch.bfloat16, 5)])
def test_ranks(dtype: torch.dtype, k: int) -> None:
    """Also with ties at the edge of the top-k, for what is ruled out, and where one tile holds all that is above."""
    logits = drawn(6, WIDTH, 3, dtype)
    logits[1, ::2] = 4
    logits[2, 100:] = -torch.inf
    logits[3, 7:90] = 50
    logits[4] = 1
    signal = MeasuredSignal.of(logits)
    ordered = logits.float().argsort(-1, descending=True)
    just_in, just_out = (ordered[:, min(place, WIDTH - 1)].tolist() for place in (k - 1, k))
    for ids in ([0] * 6, [WIDTH - 1] * 6, [8] * 6, signal.argmax().tolist(), just_in, just_out):
        own = torch.stack([row[token] for row, token in zip(logits.double(), ids, strict=True)])
        expected = ((logits.double() > own[:, None]).sum(-1) < k) & (own > -torch.inf)
        assert torch.equal(signal.in_top_k(torch.tensor(ids, device=DEVICE), k), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropies(dtype: torch.dtype) -> None:
    logits = drawn(5, WIDTH, 4, dtype)
    logits[1] = 2
    logits[2, 1:] = -torch.inf
    logits[3] = -3e4
    logits[3, 7] = 0
    expected = torch.special.entr(logits.double().softmax(-1)).sum(-1)
    signal, index = MeasuredSignal.of(logits), torch.tensor([4, 1, 0], device=DEVICE)
    torch.testing.assert_close(signal.entropy().double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(signal.entropies(index), signal.entropy()[index])
    assert len(signal.entropies(index[:0])) == 0


def test_statistics_follow_rows_that_were_moved() -> None:
    logits, order = drawn(4, WIDTH), torch.tensor([3, 1, 2, 0], device=DEVICE)
    signal = MeasuredSignal.of(logits, 2.0)
    logits.copy_(logits[order])
    for moved, again in zip(
        vars(signal.reordered(order).statistics).values(), vars(Statistics.of(logits, 2.0)).values(), strict=True
    ):
        assert torch.equal(moved, again)


@pytest.mark.parametrize("gate", sorted(GATES))
def test_gates_get_the_same_answers(gate: str) -> None:
    student, teacher, labels = drawn(9, WIDTH, 1), drawn(9, WIDTH, 2), torch.arange(9, device=DEVICE) * 21
    teacher[::2] += student[::2]
    judge = GATES[gate].score if isinstance(GATES[gate], BatchGate) else GATES[gate]
    expected = judge(Rows.of(DenseSignal(student), DenseSignal(teacher), labels, keys(9)))
    measured = MeasuredSignal.of(student), MeasuredSignal.of(teacher)
    torch.testing.assert_close(judge(Rows.of(*measured, labels, keys(9))), expected)
    some = torch.tensor([7, 2], device=DEVICE)
    part = judge(Rows.of(measured[0].rows(some), measured[1].rows(some), labels[some], keys(9).rows(some)))
    torch.testing.assert_close(part, expected[some])


# ---- the row pass ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """`before_cap`: [n, V] float64, the scaled products; what the engine would hand to the pass is made from it in float32.

    `known`: how many rows, from the first, the pass is told the teacher's answer for; None: all.
    """

    objective: Objective
    head: LMHead
    before_cap: Tensor
    teacher: Tensor
    acceptance: Tensor
    top: int | None = None
    known: int | None = None
    following: PolicyGradient | None = None

    @property
    def labels(self) -> Tensor:
        return (torch.arange(len(self.acceptance), device=DEVICE) * 37 + 290) % self.before_cap.shape[1]

    def logits(self, before_cap: Tensor) -> Tensor:
        cap = self.head.softcap
        return before_cap if cap is None else cap * torch.tanh(before_cap / cap)

    def signal(self, dtype: torch.dtype) -> TeacherSignal:
        if self.top is None:
            return DenseSignal(self.teacher.to(dtype))
        log_probs, own = self.teacher.log_softmax(-1), torch.arange(len(self.labels))
        best = log_probs.topk(self.top)
        return TopKSignal(best.indices, best.values.to(dtype), log_probs[own, self.labels].to(dtype))

    def expected(self) -> tuple[Any, Tensor]:
        """The loss's terms and its gradient for `before_cap`, by autograd."""
        leaf = self.before_cap.clone().requires_grad_()
        rows = Rows(self.logits(leaf), self.signal(torch.float64), self.labels, keys(len(self.labels)))
        terms = token_terms(self.objective, rows, self.acceptance.double(), self.following)
        if not terms.loss.requires_grad:
            return terms, torch.zeros_like(leaf)
        terms.loss.sum().backward()
        return terms, leaf.grad

    def judged(self, measured: bool = True) -> JudgedRows:
        logits, signal = self.logits(self.before_cap).float(), self.signal(torch.float32)
        if self.known is not None:
            signal = signal.rows(slice(self.known))
        student = MeasuredSignal.of(logits, self.objective.divergence_temperature) if measured else DenseSignal(logits)
        return JudgedRows(student, signal, self.labels, keys(len(self.labels)), self.acceptance, self.following)

    @property
    def kernels(self) -> KernelPass:
        return KernelPass(self.objective, self.head, 2, False)

    def run(self, measured: bool = True) -> tuple[RowResults, Tensor, Tensor]:
        rows = self.judged(measured)
        found, live = self.kernels(rows, rows.student.logits)
        return found, live, rows.student.logits[: len(live)]

    def check(self, measured: bool = True) -> None:
        """To what float32 can do: slopes are of the size T²·q, gradients their differences."""
        terms, gradient = self.expected()
        found, live, packed = self.run(measured)
        atol = 1e-6 * max(1.0, self.objective.divergence_temperature**2)
        torch.testing.assert_close(found.terms(self.objective).loss.double(), terms.loss, rtol=1e-5, atol=atol)
        at_all = torch.zeros_like(gradient).index_add(0, live, packed.double())
        torch.testing.assert_close(at_all, gradient, rtol=1e-5, atol=atol)
        assert len(set(live.tolist())) == len(live)


HEAD = LMHead(torch.zeros(WIDTH, 1, device=DEVICE))
CAPPED = LMHead(torch.zeros(WIDTH, 1, device=DEVICE), softcap=5.0)
CLOSED = sorted(ENTRYWISE)
POLICIES = [Mask(), DownWeight(0.1), Label()]
VERDICTS = (1.0, 0.0, 0.3, 0.0, 1.0)


def batch(
    objective: Objective, head: LMHead = HEAD, top: int | None = None, verdicts: tuple[float, ...] = VERDICTS, **more: Any
) -> Batch:
    count = len(verdicts)
    student, teacher = drawn(count, WIDTH, 11).double(), drawn(count, WIDTH, 12).double()
    teacher = (teacher + student.roll(1, 0)) / 2
    return Batch(objective, head, student, teacher, torch.tensor(verdicts, device=DEVICE), top, **more)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("name", CLOSED)
def test_gradients_of_a_whole_teacher(name: str, policy: Any) -> None:
    for place, (temperature, share, head) in enumerate(product((1.0, 2.5), (0.0, 0.3), (HEAD, CAPPED))):
        if (place.bit_count() + POLICIES.index(policy)) % 2:
            continue  # half of them, in which every pair of choices meets
        objective = Objective(NoGate(), policy, ENTRYWISE[name], label_loss_weight=share, divergence_temperature=temperature)
        batch(objective, head, verdicts=(0.3, 0.0)).check()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("name", CLOSED)
def test_gradients_of_a_top_k_with_a_tail(name: str, policy: Any) -> None:
    for share, head in product((0.0, 0.3), (HEAD, CAPPED)):
        batch(Objective(NoGate(), policy, ENTRYWISE[name], label_loss_weight=share), head, K, (0.3, 0.0)).check()


@pytest.mark.parametrize("name", ["adaptive_kl", "reverse_kl"])
def test_a_top_k_needs_no_closed_form(name: str) -> None:
    batch(Objective(NoGate(), Label(), DIVERGENCES[name]), top=K).check()


@pytest.mark.parametrize("head", [HEAD, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("top", [None, K])
def test_a_divergence_of_whole_texts(head: LMHead, top: int | None) -> None:
    weight = torch.tensor([1.2, 0.9, 0.4, 1.0, 1.1], device=DEVICE)
    advantage = torch.tensor([0.7, -3.0, -0.5, 0.0, 2.0], device=DEVICE)
    for policy, share in ((Mask(), 0.0), (DownWeight(0.1), 0.0), (Label(), 0.3)):
        objective = Objective(NoGate(), policy, SequenceReverseKL(), label_loss_weight=share)
        batch(objective, head, top, following=PolicyGradient(weight, advantage)).check()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_top_k_that_is_the_whole_vocabulary(temperature: float) -> None:
    batch(Objective(NoGate(), Label(), forward_kl, divergence_temperature=temperature), top=WIDTH).check()


def test_a_row_is_measured_where_the_engine_has_not_or_at_another_temperature() -> None:
    given = batch(Objective(NoGate(), Label(), DIVERGENCES["generalized_jsd"], divergence_temperature=2.5))
    given.check(measured=False)
    rows, (found, live, packed) = given.judged(False), given.run()
    student = MeasuredSignal.of(rows.student.logits, 1.0)
    teacher = MeasuredSignal.of(rows.teacher.logits, 1.0)
    rows = JudgedRows(student, teacher, rows.labels, rows.keys, rows.acceptance)
    again, order = given.kernels(rows, student.logits)
    assert torch.equal(order, live) and torch.equal(student.logits[: len(live)], packed)
    assert torch.equal(again.divergence.nan_to_num(), found.divergence.nan_to_num())


@pytest.mark.parametrize("top", [None, K])
@pytest.mark.parametrize(
    "verdicts",
    [(), (0.0,), (1.0,), (0.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 1.0, 1.0), (0.0, 1.0, 1.0, 0.0, 0.0, 1.0), (1.0, 1.0)],
    ids=str,
)
def test_live_rows_are_packed_by_filling_holes(verdicts: tuple[float, ...], top: int | None) -> None:
    given = batch(Objective(NoGate(), Mask(), forward_kl), top=top, verdicts=verdicts)
    given.check()
    _, live, _ = given.run()
    wanted = [place for place, verdict in enumerate(verdicts) if verdict]
    assert sorted(live.tolist()) == wanted
    assert all(row == place for place, row in enumerate(live.tolist()) if place in wanted), "what lies well is not moved"


@pytest.mark.parametrize("top", [None, K])
@pytest.mark.parametrize("policy", [Mask(), Label()], ids=["mask", "label"])
def test_the_teacher_need_not_know_rejected_rows(policy: Any, top: int | None) -> None:
    batch(Objective(NoGate(), policy, forward_kl), HEAD, top, (0.0, 1.0, 0.4, 0.0, 0.0), known=3).check()


@pytest.mark.parametrize(("swap", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.float64)])
def test_rows_are_moved_whole(swap: bool, dtype: torch.dtype) -> None:
    data = drawn(6, WIDTH, dtype=dtype)
    expected, index = data.clone(), torch.tensor([5, 0, 4], device=DEVICE)
    expected[[1, 2, 3]] = data[index]
    if swap:
        expected[index] = data[[1, 2, 3]]
    if swap:
        expected[index] = data[[1, 2, 3]]
        swap_rows(data, index, torch.tensor([1, 2, 3], device=DEVICE))
    else:
        move_rows(data, index, torch.tensor([1, 2, 3], device=DEVICE))
    assert torch.equal(data, expected)


def test_labels_alone_need_no_teacher() -> None:
    given = batch(Objective(NoGate(), Mask(), forward_kl, label_loss_weight=1.0), CAPPED)
    terms, gradient = given.expected()
    rows = given.judged()
    rows = JudgedRows(rows.student, None, rows.labels, rows.keys, torch.full_like(rows.acceptance, torch.nan))
    found, live = given.kernels(rows, rows.student.logits)
    assert live.tolist() == list(range(len(VERDICTS)))
    torch.testing.assert_close(rows.student.logits.double(), gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(-found.label_log_prob.double(), terms.loss)


@pytest.mark.parametrize("top", [None, K])
def test_without_a_wish_for_gradients_the_results_are_the_same(top: int | None) -> None:
    given = batch(Objective(NoGate(), Label(), forward_kl), CAPPED, top)
    found, live, _ = given.run()
    again, order = given.kernels(given.judged(), None)
    assert sorted(order.tolist()) == sorted(live.tolist())
    for one, other in zip(vars(again).values(), vars(found).values(), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", CLOSED)
def test_probabilities_of_zero(name: str, temperature: float) -> None:
    """Where both, the teacher or the student rule a token out: the PyTorch code's values, infinite ones too, and gradients."""
    objective = Objective(NoGate(), Label(), ENTRYWISE[name], divergence_temperature=temperature)
    given = batch(objective, verdicts=(1.0, 1.0, 1.0, 1.0, 0.0, 0.6))
    student, teacher = given.before_cap, given.teacher
    student[0, 5], teacher[0, 5] = -torch.inf, -torch.inf
    teacher[1, WIDTH - 10 :] = -torch.inf
    student[2, 17] = -torch.inf
    student[4, 3] = -torch.inf
    found, live, packed = given.run()
    rows = given.judged(measured=False)
    room = rows.student.logits
    expected, order = RowPass(objective, HEAD, 1, False)(rows, room)
    torch.testing.assert_close(found.divergence, expected.divergence, equal_nan=True, rtol=2e-5, atol=1e-6)
    _, exact = given.expected()
    for place, row in enumerate(live.tolist()):
        if math.isfinite(expected.divergence[row]) or row == 4:
            torch.testing.assert_close(packed[place], room[order.tolist().index(row)], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(packed[place].double(), exact[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "generalized_jsd"])
def test_a_teacher_in_16_bits(name: str) -> None:
    given = batch(Objective(NoGate(), Label(), DIVERGENCES[name], label_loss_weight=0.2))
    rounded = given.teacher.bfloat16()
    given.teacher.copy_(rounded.double())
    rows, (found, live, packed) = given.judged(), given.run()
    teacher = MeasuredSignal.of(rounded)
    rows = JudgedRows(rows.student, teacher, rows.labels, rows.keys, rows.acceptance)
    again, order = given.kernels(rows, rows.student.logits)
    assert torch.equal(order, live)
    torch.testing.assert_close(again.divergence, found.divergence, equal_nan=True)
    torch.testing.assert_close(rows.student.logits[: len(live)], packed)


# ---- what is left to PyTorch ---------------------------------------------------------------------------------------------


def _own_entry(log_q: Any, log_p: Any, q: Any, p: Any, a: float, b: float) -> tuple[Any, Any]:
    gap = exp(b * log_p) - exp(b * log_q)
    return where(gap > 0, a * gap * gap, gap * gap), -2 * b * exp(b * log_q) * where(gap > 0, a * gap, gap)


class Own:
    """A user's divergence, in another module."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        gap = (0.5 * teacher).exp() - (0.5 * student).exp()
        return torch.where(gap > 0, 3 * gap * gap, gap * gap).sum(-1)

    @property
    def entrywise(self) -> Entrywise:
        return Entrywise(_own_entry, 3.0, 0.5)


def test_a_divergence_of_ones_own() -> None:
    given = batch(Objective(NoGate(), Label(), Own()))
    assert usable(given.objective, given.before_cap.float(), False)
    given.check()


def _beyond(log_q: Any, log_p: Any, q: Any, p: Any, a: float, b: float) -> tuple[Any, Any]:
    return torch.sqrt(p * q), -q


class Beyond(Own):
    @property
    def entrywise(self) -> Entrywise:
        return Entrywise(_beyond)


class Short(Own):
    @property
    def entrywise(self) -> Entrywise:
        return Entrywise(lambda log_q, log_p, q, p, a, b: (log(q), -q))


@pytest.mark.parametrize("divergence", [Beyond(), Short(), AdaptiveKL(), lambda q, p: (q - p).sum(-1)])
def test_what_does_not_translate_is_left_to_pytorch(divergence: Any) -> None:
    assert not usable(Objective(NoGate(), Label(), divergence), drawn(2, WIDTH), False)


def test_where_the_kernels_are_used() -> None:
    objective, logits = Objective(NoGate(), Label(), SkewedForwardKL()), drawn(2, WIDTH)
    assert usable(objective, logits, False)
    assert available(logits.bfloat16()) and not usable(objective, logits.bfloat16(), False), "gradients need 32 bits"
    assert not available(logits.double()), "float64 is meant to be exact"
    assert not usable(
        Objective(NoGate(), Residual(), AlphaBeta()), logits, wants_support(Objective(NoGate(), Residual(), AlphaBeta()))
    ), "not the label alone"
    assert isinstance(row_pass(objective, HEAD, 1, False, logits), KernelPass)
    assert type(row_pass(objective, HEAD, 1, False, logits.double())) is RowPass
    assert isinstance(signal(logits), MeasuredSignal) and type(signal(logits.double())) is DenseSignal
