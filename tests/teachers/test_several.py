"""Several teachers, mixed or by sample: what each says, where it belongs, and no more asked than is needed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from speckd import LMHead, Objective, distillation_loss
from speckd.compatibility import SharedVocabulary, common_axis
from speckd.divergences import forward_kl, reverse_kl
from speckd.errors import CapabilityError, VocabularyError
from speckd.gates import NoGate, TopK
from speckd.policies import Label, Mask
from speckd.teachers import DenseTeacher, HiddenTeacher
from speckd.teachers import several as module
from speckd.teachers.several import MixedSource, MixedTeacher, RoutedSource
from speckd.teachers.source import Question
from speckd.tokens import TokenBatch, supervised_rows
from speckd.types import Capabilities, DenseTeacherRows
from tests.parity.cases import problem

V, H = 300, 12
WHOLE, DENSE = SharedVocabulary(V), Capabilities()


@dataclass
class Told:
    """A teacher whose logits are a function of token and position alone; notes what it was asked about."""

    seed: int
    asked: list[Question] = field(default_factory=list)
    vocabulary: SharedVocabulary = WHOLE
    capabilities: Capabilities = DENSE

    def says(self, tokens: TokenBatch) -> DenseTeacher:
        table = torch.randn(50, V, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed))
        shifts = tokens.position_ids.flatten()[:, None] * 0.1 * torch.arange(V).cos()
        return DenseTeacher(3 * table[tokens.input_ids.flatten()] + shifts)

    def expect(self, question: Question) -> None: ...

    def launch(self, question: Question) -> "Told":
        self.asked.append(question)
        return self

    def rows(self) -> DenseTeacher:
        return self.says(self.asked[-1].tokens)

    def close(self) -> None: ...


def padded() -> tuple[TokenBatch, Tensor]:
    """Five samples, padded on the right, of three teachers; the fourth has nothing supervised."""
    generator, lengths = torch.Generator().manual_seed(1), [7, 4, 9, 5, 3]
    ids = torch.randint(1, 50, (5, 9), generator=generator)
    inside = torch.arange(9) < torch.tensor(lengths)[:, None]
    samples = torch.arange(5)[:, None].expand(5, 9).where(inside, -1)
    labels = ids.where(inside & (torch.arange(9) > 1), -100)
    labels[3] = -100
    route = torch.tensor([2, 0, 2, 1, 0])[:, None].expand(5, 9).where(inside, -1)
    return TokenBatch(ids, labels, samples, torch.arange(9).expand(5, 9)), route


def packed() -> tuple[TokenBatch, Tensor]:
    """The same samples one behind the other, in one row with padding at its end."""
    batch, route = padded()
    inside = batch.sample_ids >= 0

    def flat(tensor: Tensor, fill: int) -> Tensor:
        return torch.cat([tensor[inside], torch.full((4,), fill)])[None]

    own = TokenBatch(
        flat(batch.input_ids, 0), flat(batch.labels, -100), flat(batch.sample_ids, -1), flat(batch.position_ids, 0)
    )
    return own, flat(route, -1)


def question(batch: TokenBatch, route: Tensor | None) -> Question:
    inputs = {"input_ids": batch.input_ids}
    inputs |= {"position_ids": batch.position_ids} if len(batch.input_ids) == 1 else {"attention_mask": batch.sample_ids + 1}
    return Question(inputs, batch, supervised_rows(batch), route)


@pytest.mark.parametrize("make", [padded, packed])
def test_every_row_is_answered_by_its_own_teacher(make: Any) -> None:
    batch, route = make()
    teachers = [Told(seed) for seed in (1, 2, 3)]
    asked = question(batch, route)
    found = RoutedSource(teachers).launch(asked).rows()
    assert isinstance(found, DenseTeacherRows) and found.dtype == torch.float64 and found.vocabulary_size == V
    index = asked.rows.index[torch.randperm(len(asked.rows), generator=torch.Generator().manual_seed(2))]
    logits = found.signal(index).logits
    some = torch.randint(0, V, (len(index), 5))
    for row, place in enumerate(index.tolist()):
        wanted = teachers[int(route.flatten()[place])].says(batch).logits[place]
        assert torch.equal(logits[row], wanted)
    assert torch.equal(found.logits_at(index, some), logits.gather(-1, some))
    # Each computed its own alone, and a teacher without a supervised token nothing.
    assert [len(teacher.asked) for teacher in teachers] == [1, 0, 1]
    computed = [teacher.asked[0].inputs["input_ids"].numel() for teacher in (teachers[0], teachers[2])]
    assert computed == ([18, 18] if make is padded else [7, 16])


def test_a_teacher_sees_whole_samples_and_its_own_rows_only() -> None:
    batch, route = packed()
    teachers = [Told(seed) for seed in (1, 2, 3)]
    RoutedSource(teachers).launch(question(batch, route))
    own = teachers[2].asked[0]
    kept = route[0] == 2
    assert torch.equal(own.inputs["position_ids"], torch.cat([torch.arange(7), torch.arange(9)])[None])
    assert torch.equal(own.tokens.sample_ids[0], batch.sample_ids[0, kept])
    again = supervised_rows(own.tokens)
    assert torch.equal(own.rows.index, again.index) and torch.equal(own.rows.labels, again.labels)
    assert torch.equal(own.rows.keys.sample, again.keys.sample) and torch.equal(own.rows.keys.position, again.keys.position)


@pytest.mark.parametrize("make", [padded, packed])
@pytest.mark.parametrize("rejected", [Mask(), Label()], ids=["mask", "label"])
def test_the_routed_loss_is_the_sum_of_each_teachers_own(make: Any, rejected: Any) -> None:
    """Row by row by hand, in float64: forward KL of each accepted row to its own teacher's distribution."""
    batch, route = make()
    asked, objective = question(batch, route), Objective(TopK(200), rejected, forward_kl)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(route.numel(), H, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.float64, generator=generator, requires_grad=True)
    teachers = [Told(seed) for seed in (1, 2, 3)]
    output = distillation_loss(objective, hidden, LMHead(weight), RoutedSource(teachers).launch(asked).rows(), asked.rows, 4)
    wanted = hidden.new_zeros(())
    for place, label in zip(asked.rows.index.tolist(), asked.rows.labels.tolist(), strict=True):
        log_q = (hidden[place] @ weight.T).log_softmax(-1)
        log_p = teachers[int(route.flatten()[place])].says(batch).logits[place].log_softmax(-1)
        rank = int((log_p > log_p[log_q.argmax()]).sum())
        if rank < 200:
            wanted = wanted + (log_p.exp() * (log_p - log_q)).sum()
        elif isinstance(rejected, Label):
            wanted = wanted - log_q[label]
    assert torch.allclose(output.sum, wanted, rtol=1e-12)
    for a, b in zip(
        torch.autograd.grad(output.sum, (hidden, weight)), torch.autograd.grad(wanted, (hidden, weight)), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


# ---- mixed -----------------------------------------------------------------------------------------------------------------


def dense(count: int, rows: int = 40, dtype: torch.dtype = torch.float64) -> list[DenseTeacher]:
    generator = torch.Generator().manual_seed(3)
    return [DenseTeacher((4 * torch.randn(rows, V, generator=generator)).to(dtype)) for _ in range(count)]


def log_mixture(teachers: Sequence[DenseTeacher], weights: Sequence[float]) -> Tensor:
    """The oracle: log Σ wᵢ softmaxᵢ, over everything at once."""
    parts = [w * teacher.logits.double().softmax(-1) for teacher, w in zip(teachers, weights, strict=True)]
    return torch.stack(parts).sum(0).log()


@pytest.mark.parametrize("weights", [(1.0,), (0.25, 0.75), (0.5, 0.3, 0.2)])
@pytest.mark.parametrize("room", [1, 2**25], ids=["in pieces", "at once"])
def test_a_mixture_is_the_weighted_sum_of_probabilities(weights: tuple[float, ...], room: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "_ROOM_BYTES", room)
    teachers, index = dense(len(weights)), torch.randperm(40)
    mixed = MixedTeacher(tuple(teachers), weights)
    wanted = log_mixture(teachers, weights)[index]
    assert torch.allclose(mixed.signal(index).logits, wanted, rtol=1e-12, atol=1e-12)
    some = torch.randint(0, V, (40, 3))
    assert torch.allclose(mixed.logits_at(index, some), wanted.gather(-1, some), rtol=1e-12, atol=1e-12)


def test_true_zeros_of_one_teacher_stay_the_others_share() -> None:
    a, b = dense(2)
    a.logits[:, :100] = b.logits[:, 50:120] = -torch.inf  # from 50 to 99 nobody says anything
    found = MixedTeacher((a, b), (0.5, 0.5)).signal(torch.arange(40)).logits
    assert torch.allclose(found.exp(), log_mixture((a, b), (0.5, 0.5)).exp(), rtol=1e-12, atol=1e-300)
    assert bool((found[:, 50:100] == -torch.inf).all()) and not bool(found.isnan().any())


@pytest.mark.parametrize("shift", [80.0, -80.0])
def test_a_mixture_does_not_depend_on_how_a_teachers_logits_are_shifted(shift: float) -> None:
    a, b = dense(2, dtype=torch.float32)
    found = MixedTeacher((DenseTeacher(a.logits + shift), b), (0.3, 0.7)).signal(torch.arange(40)).logits
    assert torch.allclose(found.double(), log_mixture((a, b), (0.3, 0.7)), atol=3e-5)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_a_teacher_mixed_with_itself_is_itself(divergence: Any) -> None:
    given = problem(seed=2, tokens=30, vocabulary=60)
    teacher, head = DenseTeacher(given.teacher.float()), LMHead(given.weight.float(), given.bias.float())
    hidden = given.hidden.float().requires_grad_()
    found = []
    for one in (teacher, MixedTeacher((teacher, teacher), (0.3, 0.7))):
        for gate in (NoGate(), TopK(3)):
            output = distillation_loss(Objective(gate, Mask(), divergence), hidden, head, one, given.rows, 7)
            found.append((output.sum.item(), *torch.autograd.grad(output.sum, hidden)))
    for (alone, slope), (mixed, other) in zip(found[:2], found[2:], strict=True):
        assert mixed == pytest.approx(alone, rel=1e-6)
        assert torch.allclose(slope, other, rtol=1e-4, atol=1e-6)


def test_hidden_teachers_are_mixed_without_their_whole_logits(monkeypatch) -> None:
    """No more rows than the room holds are asked for at once."""
    monkeypatch.setattr(module, "_ROOM_BYTES", 4 * V * 16)
    most, write = [0], LMHead.write

    def counting(self: LMHead, hidden: Tensor, out: Tensor) -> None:
        most[0] = max(most[0], len(hidden))
        write(self, hidden, out)

    monkeypatch.setattr(LMHead, "write", counting)
    teachers = tuple(HiddenTeacher(torch.randn(200, H), LMHead(torch.randn(V, H))) for _ in range(2))
    MixedTeacher(teachers, (0.5, 0.5)).signal(torch.arange(200))
    assert most == [16]


def test_weights_are_ratios() -> None:
    batch, _ = padded()
    sources = [Told(1), Told(2)]
    answers = [MixedSource(sources, weights).launch(question(batch, None)).rows().weights for weights in ((1, 3), (25, 75))]
    assert answers[0] == answers[1] == (0.25, 0.75) and math.isclose(sum(answers[0]), 1)


# ---- what cannot stand together --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [RoutedSource, lambda sources: MixedSource(sources, (1, 1))], ids=["routed", "mixed"])
def test_teachers_that_cannot_stand_together_are_refused(build: Any) -> None:
    with pytest.raises(CapabilityError, match="one of them gives its top-K only"):
        build([Told(1), Told(2, capabilities=Capabilities(4))])
    with pytest.raises(VocabularyError, match="do not share the same tokens"):
        build([Told(1), Told(2, vocabulary=SharedVocabulary(V - 1))])


def test_a_question_without_routes_is_refused() -> None:
    batch, _ = padded()
    with pytest.raises(CapabilityError, match="teacher_route_column"):
        RoutedSource([Told(1)]).launch(question(batch, None))


def test_the_common_axis_is_the_intersection() -> None:
    axes = [SharedVocabulary(6), SharedVocabulary(5, torch.tensor([0, 1, 2, 4, 7])), SharedVocabulary(4, None, (9,))]
    found = common_axis(axes)
    assert [axis.size for axis in found] == [3] * 3 and all(axis.ids is None for axis in found)
    assert [axis.teacher_only for axis in found] == [(3, 4, 5), (4, 7), (3, 9)]
    gaps = common_axis([SharedVocabulary(3, torch.tensor([0, 2, 5])), SharedVocabulary(6)])
    assert all(torch.equal(axis.ids, torch.tensor([0, 2, 5])) for axis in gaps)  # type: ignore[arg-type]
    assert gaps[0].same_axis(gaps[1]) and not gaps[0].same_axis(SharedVocabulary(3))
    with pytest.raises(VocabularyError, match="no token is known"):
        common_axis([SharedVocabulary(2), SharedVocabulary(1, torch.tensor([4]))])


def test_the_borders_of_a_packed_line_are_those_that_the_collator_would_give() -> None:
    """For a teacher's own samples, as if they had been packed alone."""
    from speckd.collation import SampleCollator

    collate = SampleCollator(pad_token_id=0, padding_free=True)
    samples = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    examples = [{"input_ids": ids, "labels": ids, "sample_ids": [i] * len(ids)} for i, ids in enumerate(samples)]
    for example, number in zip(examples, (1, 0, 1), strict=True):
        example["teacher_numbers"] = [number] * len(example["input_ids"])
    whole, alone = collate(examples), collate([examples[0], examples[2]])
    tokens = TokenBatch(*(whole[name] for name in ("input_ids", "labels", "sample_ids", "position_ids")))
    inputs = {name: whole[name] for name in alone if name in ("input_ids", "position_ids", *module._BORDERS)}
    teachers = [Told(1), Told(2)]
    RoutedSource(teachers).launch(Question(inputs, tokens, supervised_rows(tokens), whole["teacher_numbers"]))
    found = teachers[1].asked[0].inputs
    assert found.keys() == inputs.keys() == {"input_ids", "position_ids", *module._BORDERS}
    for name, value in found.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(alone[name])), name
