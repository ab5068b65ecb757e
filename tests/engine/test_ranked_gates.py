"""Every ranked gate keeps what brute force keeps, whatever the chunks, the order of rows and the number of processes."""

import math
from collections.abc import Callable
from dataclasses import replace
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from speckd import LMHead, Objective, distillation_loss
from speckd.config import GATES, MethodConfig
from speckd.errors import CapabilityError, ConfigError, NonFiniteError
from speckd.gates import Inverted, MatchedRandom, Random, TopK
from speckd.policies import Label, Mask
from speckd.ranked_gates import ExcessDivergence, StudentEntropy, Teachability, kept
from speckd.teachers import DenseTeacher, TopKTeacher
from speckd.tokens import SupervisedRows
from speckd.types import BatchGate, DenseSignal, Rows, TokenKeys
from tests.engine.ranked import ORACLES, chosen, entropy, teachability
from tests.parity.cases import Problem, problem, relative_error

TOKENS = 43  # of 11 sequences, the last one shorter


def batch(seed: int, vocabulary: int = 29) -> tuple[Problem, Tensor, list[list[list[float]]]]:
    """A batch, a reference's logits, and the probabilities of teacher, student and reference."""
    given = problem(seed=seed, tokens=TOKENS, vocabulary=vocabulary)
    reference = given.teacher.flip(0) + given.teacher
    student = given.hidden @ given.weight.T + given.bias
    return given, reference, [logits.softmax(-1).tolist() for logits in (given.teacher, student, reference)]


def acceptance(
    gate: Any,
    given: Problem,
    reference: Tensor,
    chunk: int,
    rows: SupervisedRows | None = None,
    teacher: Any = None,
    **more: Any,
) -> Tensor:
    head = LMHead(given.weight, given.bias)
    teacher, third = teacher or DenseTeacher(given.teacher), DenseTeacher(reference)
    rows = given.rows if rows is None else rows
    output = distillation_loss(Objective(gate, Mask()), given.hidden, head, teacher, rows, chunk, None, third, **more)
    return output.terms.acceptance


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("seed", range(3))
def test_the_set_is_that_of_brute_force(name: str, seed: int) -> None:
    given, reference, (p, q, r) = batch(seed)
    score, fraction, per_sequence = ORACLES[name]
    labels, samples = given.rows.labels.tolist(), given.rows.keys.sample.tolist()
    scores = score(p, q, r, labels)
    wanted = chosen(scores, samples, fraction, per_sequence)
    assert 0 < len(wanted) < TOKENS
    for chunk in (TOKENS, 16, 7, 1):
        found = acceptance(GATES[name](), given, reference, chunk)
        assert set(found.unique().tolist()) == {0.0, 1.0}
        assert set(found.nonzero()[:, 0].tolist()) == wanted, (name, chunk)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(acceptance(GATES[name](), given, reference, 7, given.rows.rows(order)), found[order])


@pytest.mark.parametrize("name", [name for name in ORACLES if name not in ("tip", "teachability")])
def test_the_other_end_and_the_other_scope(name: str) -> None:
    given, reference, (p, q, r) = batch(5)
    score, _, per_sequence = ORACLES[name]
    scores, samples = score(p, q, r, given.rows.labels.tolist()), given.rows.keys.sample.tolist()
    for lowest in (False, True):
        gate = GATES[name](fraction=0.7, lowest=lowest, per_sequence=not per_sequence)
        found = acceptance(gate, given, reference, 16).nonzero()[:, 0].tolist()
        assert set(found) == chosen(scores, samples, 0.7, not per_sequence, lowest)


def test_teachability_by_the_other_divergence_and_among_few() -> None:
    given, reference, (p, q, _) = batch(1)
    found = acceptance(Teachability(fraction=0.3, student_top_k=4, forward=True), given, reference, 16).nonzero()[:, 0].tolist()
    assert set(found) == chosen(teachability(p, q, True, 4), given.rows.keys.sample.tolist(), 0.3, False)


@pytest.mark.parametrize("name", ["entropy_weight", "entropy_gap"])
def test_soft_weights_are_the_formulas(name: str) -> None:
    """EA-KD 2311.13621: (H_p + H_p·H_q/H_max)/2, here over its largest value; TSD-KD 2603.13260: sigma(H_q - H_p)."""
    given, reference, (p, q, _) = batch(2)
    for one, found in zip(zip(p, q, strict=True), acceptance(GATES[name](), given, reference, 16).tolist(), strict=True):
        teacher, student = map(entropy, one)
        largest = math.log(29)
        weight = (teacher + teacher * student / largest) / 2 / largest
        wanted = weight if name == "entropy_weight" else 1 / (1 + math.exp(teacher - student))
        assert found == pytest.approx(wanted, rel=1e-9) and 0 <= found <= 1


def test_equal_scores_are_ordered_by_who_the_token_is() -> None:
    n = 200
    index = torch.arange(n)
    keys = TokenKeys(index // 8, index % 8, seed=3)
    found = kept(torch.zeros(n), keys, 0.25)
    assert float(found.sum()) == 50 and 5 < float(found[: n // 2].sum()) < 45  # neither the first nor the last ones
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kept(torch.zeros(n), keys.rows(order), 0.25), found[order])
    assert not torch.equal(kept(torch.zeros(n), replace(keys, epoch=1), 0.25), found)
    assert float(kept(torch.zeros(10), keys.rows(index[:10]), 0.7).sum()) == 7  # 0.7·10 in binary is above 7
    assert float(kept(torch.zeros(3), keys.rows(index[:3]), 0.05).sum()) == 1
    assert not len(kept(torch.zeros(0), keys.rows(index[:0]), 0.5))


def test_infinite_scores_rank_and_nothing_is_nan() -> None:
    given, reference, _ = batch(3)
    teacher = given.teacher.clone()
    teacher[:9, 0] = -torch.inf  # KL(q ‖ p) is infinite there: the score is 1, as where the entropy is clipped
    given = replace(given, teacher=teacher)
    assert (acceptance(GATES["tip"](fraction=11 / TOKENS), given, reference, 16)[:9] == 1).all()
    for name in ("teachability", "excess_divergence", "total_variation", "hellinger", "entropy_gap"):
        found = acceptance(GATES[name](), given, reference, 16)
        assert torch.isfinite(found).all() and found.any()
    reference[:5, 1] = -torch.inf  # so does the reference rule out what the teacher believes in: no excess there
    assert not acceptance(ExcessDivergence(0.1), given, reference, 16)[:5].any()
    reference[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the reference model's logits are NaN or infinite at 1 of \d+ tokens"):
        acceptance(ExcessDivergence(), given, reference, 16)


# ---- truncated teachers ------------------------------------------------------------------------------------------------------

ASKS_FOR_ALL = ["teacher_entropy", "total_variation", "hellinger", "tip", "teachability", "excess_divergence"]


def truncated(given: Problem, top: int) -> TopKTeacher:
    best = given.teacher.log_softmax(-1).topk(top)
    return TopKTeacher(best.indices, best.values, given.teacher.log_softmax(-1).gather(-1, given.rows.labels[:, None])[:, 0])


@pytest.mark.parametrize("name", [*ORACLES, "entropy_weight", "entropy_gap"])
def test_a_truncated_teacher_answers_exactly_or_not_at_all(name: str) -> None:
    given, reference, _ = batch(4)
    gate = GATES[name]()
    wanted = acceptance(gate, given, reference, 16)
    whole = acceptance(gate, given, reference, 16, teacher=truncated(given, 29))
    assert torch.allclose(whole, wanted, rtol=1e-9, atol=1e-12)
    if name in (*ASKS_FOR_ALL, "entropy_weight", "entropy_gap"):
        what = rf"{name} needs the whole of the teacher's distribution, but the teacher gives its top 6 only.* a gate that asks"
        with pytest.raises(CapabilityError, match=what):
            acceptance(gate, given, reference, 16, teacher=truncated(given, 6))
    else:
        assert torch.equal(acceptance(gate, given, reference, 16, teacher=truncated(given, 6)), wanted)


# ---- processes ---------------------------------------------------------------------------------------------------------------


def in_processes(counts: list[int], work: Callable[[int, slice, Any], Tensor]) -> Tensor:
    """Runs one thread a process, with a gather like accelerate's; what each found, in order."""
    world, meeting = len(counts), Barrier(len(counts), timeout=20)
    board: list[Tensor] = [torch.empty(0)] * world
    results: list[Any] = [None] * world

    def process(rank: int) -> None:
        def gather(own: Tensor) -> tuple[Tensor, slice]:
            board[rank] = own
            meeting.wait()
            every, before = list(board), sum(len(one) for one in board[:rank])
            meeting.wait()
            return torch.cat([one for one in every if len(one)]), slice(before, before + len(own))

        start = sum(counts[:rank])
        try:
            results[rank] = work(rank, slice(start, start + counts[rank]), gather)
        except BaseException as error:
            meeting.abort()
            results[rank] = error

    threads = [Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return torch.cat(results)


@pytest.mark.parametrize("name", [*ORACLES, "matched_random"])
def test_several_processes_judge_as_one(name: str) -> None:
    """Uneven counts, one process without a row; everybody calls the same collectives, or the barrier breaks."""
    given, reference, _ = batch(6)
    gate = MatchedRandom(TopK(3)) if name == "matched_random" else GATES[name]()
    wanted = acceptance(gate, given, reference, 16)

    def work(rank: int, some: slice, gather: Any) -> Tensor:
        return acceptance(gate, given, reference, (16, 5, 3, 1)[rank], given.rows.rows(some), gather=gather)

    found = in_processes([30, 0, 12, 1], work)
    assert torch.equal(found, wanted) and 0 < float(found.sum()) < TOKENS


def test_a_random_gate_matches_a_ranked_one() -> None:
    given, reference, _ = batch(7)
    for inner in (StudentEntropy(0.3, per_sequence=False), ExcessDivergence(0.3)):
        coins = acceptance(Random(math.ceil(0.3 * TOKENS) / TOKENS), given, reference, 16)
        assert torch.equal(acceptance(MatchedRandom(inner), given, reference, 16), coins)
    with pytest.raises(ConfigError, match="judges whole batches"):
        Inverted(StudentEntropy())  # type: ignore[arg-type]


# ---- the engine --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tip", "excess_divergence", "entropy_weight"])
def test_loss_and_gradients_are_those_of_the_kept_tokens(name: str) -> None:
    given, reference, _ = batch(8)
    leaves = [t.clone().requires_grad_() for t in (given.hidden, given.weight, given.bias)]
    logits = leaves[0] @ leaves[1].T + leaves[2]
    weight = acceptance(GATES[name](), given, reference, 16)
    divergence = (given.teacher.softmax(-1) * (given.teacher.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    own = -logits.log_softmax(-1).gather(-1, given.rows.labels[:, None])[:, 0]
    loss = (weight * divergence + (1 - weight) * own).sum()
    wanted = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for dtype, limit, chunk in ((torch.float64, 1e-9, 43), (torch.float64, 1e-9, 5), (torch.float32, 1e-4, 16)):
        hidden, *head = (t.to(dtype).requires_grad_() for t in (given.hidden, given.weight, given.bias))
        teachers = [DenseTeacher(logits.to(dtype)) for logits in (given.teacher, reference)]
        output = distillation_loss(
            Objective(GATES[name](), Label()), hidden, LMHead(*head), teachers[0], given.rows, chunk, reference=teachers[1]
        )
        found = [output.sum.detach(), *torch.autograd.grad(output.sum, (hidden, *head))]
        assert max(relative_error(found, wanted)) < limit


def test_a_gate_of_ones_own_may_compare_with_the_reference() -> None:
    class Nearer:
        """Accepts where the reference thinks more of the data's token than the student does."""

        needs_reference = True
        monotone = True  # so that early rejection would be tried, with nothing to compare with

        def __call__(self, rows: Rows) -> Tensor:
            better = rows.required_reference.label_log_prob(rows.labels) > rows.student_label_log_prob
            return better.to(rows.student_logits.dtype)

    given, reference, (_, q, r) = batch(9)
    wanted = [float(r[i][y] > q[i][y]) for i, y in enumerate(given.rows.labels.tolist())]
    teacher, third = DenseTeacher(given.teacher), DenseTeacher(reference)
    output = distillation_loss(
        Objective(Nearer(), Mask()), given.hidden, LMHead(given.weight, given.bias), teacher, given.rows, 7, reference=third
    )
    assert output.terms.acceptance.tolist() == wanted
    assert Objective(Inverted(Nearer())).needs_reference and not Objective(Nearer(), label_loss_weight=1.0).needs_reference


def test_a_missing_reference_is_refused() -> None:
    given, _, _ = batch(0)
    head = LMHead(given.weight, given.bias)
    with pytest.raises(ConfigError, match="compares the student with a reference model, and there is none"):
        distillation_loss(Objective(ExcessDivergence()), given.hidden, head, DenseTeacher(given.teacher), given.rows)
    rows = Rows(given.teacher, DenseSignal(given.teacher), given.rows.labels, given.rows.keys)
    with pytest.raises(CapabilityError, match="Set reference_model_name_or_path"):
        ExcessDivergence().score(rows)


@pytest.mark.parametrize(
    ("gate", "options", "said"),
    [
        ("student_entropy", {"fraction": 0.0}, "fraction is 0.0"),
        ("tip", {"clipped": 0.5}, "clipped is 0.5"),
        ("teachability", {"student_top_k": 0}, "student_top_k is 0"),
        ("tip", {"lowest": True}, "'lowest' is not an option of tip"),
    ],
)
def test_bad_options_are_named(gate: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MethodConfig(gate=gate, gate_options=options).objective()


def test_a_control_is_made_of_a_ranked_gate_by_name() -> None:
    found = MethodConfig(gate="matched_random", gate_options={"gate": "tip", "fraction": 0.2}).objective().gate
    assert isinstance(found, BatchGate) and found == MatchedRandom(GATES["tip"](fraction=0.2))
