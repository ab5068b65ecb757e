"""Properties of the gates, P17 and P18, and the facts that docs/method.md states about them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speckd import Objective
from speckd.config import MethodConfig
from speckd.divergences import forward_kl
from speckd.errors import ConfigError
from speckd.gates import ExpectedSpec, Inverted, LabelRatio, MatchedRandom, NoGate, Random, Spec, TopK, TwoSided
from speckd.policies import Label, Mask
from speckd.randomness import philox, uniforms
from speckd.teachers import DenseTeacher, ScrambledTeacher
from speckd.tokens import SupervisedRows
from speckd.types import DenseSignal, Rows, TokenKeys, TopKSignal
from tests.invariants.drawn import batches
from tests.invariants.test_losses import engine, loss_and_gradient
from tests.parity.cases import GATES, POLICIES

WORD = 0xFFFFFFFF


def seen(drawn, teacher=None) -> Rows:
    return Rows(drawn.student, teacher or DenseSignal(drawn.teacher), drawn.labels, drawn.rows.keys)


@pytest.mark.parametrize(
    ("key", "counter", "wanted"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (WORD,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(key, counter, wanted) -> None:
    """Random123's known-answer file, philox4x32-10."""
    assert tuple(int(word) for word in philox(key, tuple(torch.tensor([c]) for c in counter))) == wanted


def test_uniforms_are_uniform_and_streams_are_apart() -> None:
    n = 200_000
    sample, position = torch.arange(n), torch.zeros(n, dtype=torch.long)
    a, b = (uniforms(1, 0, sample, position, 2, stream=stream) for stream in (0, 1))
    for draw in (a[..., 0].flatten(), a[..., 1].flatten(), b[..., 0].flatten()):
        assert float(draw.min()) >= 0 and float(draw.max()) < 1
        assert abs(float(draw.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / len(draw))
        assert abs(float(torch.histc(draw.float(), 16, 0, 1).sub(len(draw) / 16).abs().max())) < 5 * math.sqrt(len(draw) / 16)
    correlations = torch.corrcoef(torch.stack([a[:, 0, 0], a[:, 0, 1], a[:, 1, 0], b[:, 0, 0]]))
    assert float((correlations - torch.eye(4)).abs().max()) < 5 / math.sqrt(n)


@given(drawn=batches())
def test_p17_everything_accepted_is_plain_distillation(counted, drawn) -> None:
    counted()
    plain = forward_kl(drawn.student.log_softmax(-1), drawn.teacher.log_softmax(-1))
    for gate in (NoGate(), Random(1.0), TopK(10**6)):
        for policy in POLICIES.values():
            output = engine(drawn.student, drawn.teacher, drawn.rows, Objective(gate, policy))
            assert torch.allclose(output.terms.loss, plain, rtol=1e-9, atol=1e-14)


@given(drawn=batches(), gate=st.sampled_from(["top_k", "spec", "random"]))
def test_p17_everything_rejected_with_label_is_cross_entropy(counted, drawn, gate) -> None:
    counted()
    output = engine(drawn.student, drawn.teacher, drawn.rows, Objective(Random(0.0), Label()))
    entropy = torch.nn.functional.cross_entropy(drawn.student, drawn.labels, reduction="none")
    assert torch.allclose(output.terms.loss, entropy, rtol=1e-12, atol=1e-12)


@given(drawn=batches(sizes=(7, 64)), k=st.integers(1, 6))
def test_p17_a_larger_k_accepts_more(counted, drawn, k) -> None:
    counted()
    rows = seen(drawn)
    for gate in (TopK, TwoSided, ExpectedSpec, Spec):
        assert (gate(k)(rows) <= gate(k + 1)(rows) + 1e-12).all()
    assert (TwoSided(k)(rows) >= TopK(k)(rows)).all()
    assert (Inverted(TopK(k))(rows) + TopK(k)(rows) == 1).all()
    assert (LabelRatio(hard=True)(rows) == (LabelRatio()(rows) >= 1)).all()


@given(drawn=batches(), gate=st.sampled_from(sorted(set(GATES) - {"matched_random"})))
def test_p17_p18_a_verdict_depends_on_its_own_token_only(counted, drawn, gate) -> None:
    counted()
    whole, order = GATES[gate](seen(drawn)), torch.randperm(len(drawn.rows))
    keys = drawn.rows.keys.rows(order)
    shuffled = Rows(drawn.student[order], DenseSignal(drawn.teacher[order]), drawn.labels[order], keys)
    assert torch.equal(GATES[gate](shuffled), whole[order])
    alone = [
        GATES[gate](Rows(drawn.student[i], DenseSignal(drawn.teacher[i]), drawn.labels[i], drawn.rows.keys.rows(i)))
        for i in torch.arange(len(drawn.rows)).split(1)
    ]
    assert torch.equal(torch.cat(alone), whole)


@given(drawn=batches(), gate=st.sampled_from(sorted(GATES)))
def test_p17_no_gradient_flows_through_a_gate(counted, drawn, gate) -> None:
    """The gradient is that of the loss with the verdicts held fixed."""
    counted()
    output, slope = loss_and_gradient(drawn, Objective(GATES[gate], Mask()))
    student = drawn.student.clone().requires_grad_()
    fixed = output.terms.acceptance
    per_token = forward_kl(student.log_softmax(-1), drawn.teacher.log_softmax(-1))
    (wanted,) = torch.autograd.grad((fixed * per_token).sum(), student)
    assert torch.allclose(slope, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("k", "top"), [(1, None), (2, None), (5, None), (3, 4)])
def test_p17_spec_accepts_with_probability_one_minus_tv_to_the_k(k, top) -> None:
    """Over 250,000 draws, within 4 standard errors; with a truncated teacher it is the lower bound that ExpectedSpec gives."""
    generator = torch.Generator().manual_seed(k)
    student, teacher = (torch.randn(1, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    n = 250_000
    keys = TokenKeys(torch.arange(n), torch.zeros(n, dtype=torch.long), seed=5)
    signal: DenseSignal | TopKSignal = DenseSignal(teacher)
    if top:
        best = teacher.log_softmax(-1).topk(top)
        signal = TopKSignal(best.indices, best.values)
    one = Rows(student, signal, torch.zeros(1, dtype=torch.long), keys.rows(torch.tensor([0])))
    expected = float(ExpectedSpec(k, allow_lower_bound=True)(one))
    if top is None:
        variation = float((student.softmax(-1) - teacher.softmax(-1)).abs().sum() / 2)
        assert expected == pytest.approx(1 - variation**k, rel=1e-12)
    else:
        assert expected <= float(
            ExpectedSpec(k, allow_lower_bound=True)(Rows(student, DenseSignal(teacher), one.labels, one.keys))
        )
    many = Rows(student.expand(n, -1), signal.rows(torch.zeros(n, dtype=torch.long)), torch.zeros(n, dtype=torch.long), keys)
    rate = float(Spec(k, allow_lower_bound=True)(many).mean())
    assert abs(rate - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize(("overlap", "wanted"), [(0.5, 0.97), (0.3, 0.83), (0.16, 0.58), (0.03, 0.14)])
def test_spec_5_is_as_permissive_as_the_method_page_says(overlap, wanted) -> None:
    student = torch.tensor([[overlap, 1 - overlap, 0.0]], dtype=torch.float64).log()
    teacher = torch.tensor([[overlap, 0.0, 1 - overlap]], dtype=torch.float64).log()
    rows = Rows(student, DenseSignal(teacher), torch.zeros(1, dtype=torch.long), TokenKeys(*[torch.zeros(1).long()] * 2))
    assert float(ExpectedSpec(5)(rows)) == pytest.approx(wanted, abs=0.006)


def test_ties_are_accepted_in_any_order_and_impossible_tokens_never() -> None:
    teacher = torch.tensor([[1.0, 1.0, 1.0, -math.inf]])
    keys = TokenKeys(*[torch.zeros(1).long()] * 2)
    for token, wanted in ((0, 1), (1, 1), (2, 1), (3, 0)):
        student = 5.0 * torch.nn.functional.one_hot(torch.tensor([token]), 4).float()
        rows = Rows(student, DenseSignal(teacher), torch.tensor([0]), keys)
        assert float(TopK(1)(rows)) == wanted
        assert float(TopK(4)(rows)) == wanted


@given(drawn=batches(max_tokens=40))
def test_p18_the_same_token_gets_the_same_draw_wherever_it_stands(counted, drawn) -> None:
    counted()
    keys = drawn.rows.keys
    whole = uniforms(keys.seed, keys.epoch, keys.sample, keys.position, 5)
    more = uniforms(keys.seed, keys.epoch, keys.sample, keys.position, 7)
    assert torch.equal(whole, more[:, :5])  # more candidates do not change the first ones
    parts = [
        uniforms(keys.seed, keys.epoch, keys.sample[i], keys.position[i], 5) for i in torch.arange(len(drawn.rows)).split(3)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(uniforms(keys.seed, keys.epoch + 1, keys.sample, keys.position, 5), whole)
    state = torch.get_rng_state()
    Spec(5)(seen(drawn))
    assert torch.equal(torch.get_rng_state(), state)  # no global stream is touched


def test_matched_random_has_the_rate_of_the_gate_it_matches() -> None:
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n, 9, generator=generator) for _ in range(2))
    rows = SupervisedRows(torch.arange(n), torch.zeros(n, dtype=torch.long), TokenKeys(torch.arange(n), torch.zeros(n).long()))
    gated, matched = (engine(student, teacher, rows, Objective(g, Mask()), 4096) for g in (TopK(3), MatchedRandom(TopK(3))))
    rate = float(gated.terms.acceptance.mean())
    assert abs(float(matched.terms.acceptance.mean()) - rate) < 4 * math.sqrt(rate * (1 - rate) / n)
    assert abs(float(torch.corrcoef(torch.stack([gated.terms.acceptance, matched.terms.acceptance]))[0, 1])) < 0.05


def test_a_scrambled_teacher_is_wrong_at_the_same_positions_for_any_batching() -> None:
    n, width = 20_000, 6
    logits = torch.randn(n, width)
    sample, position = torch.arange(n) // 50, torch.arange(n) % 50
    teacher = ScrambledTeacher(DenseTeacher(logits), 0.25, sample, position, seed=3)
    index = torch.arange(n)
    where = teacher.scrambled(index)
    assert abs(float(where.double().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)
    spoiled = teacher.signal(index).logits
    assert torch.equal(spoiled[~where], logits[~where]) and (spoiled[where] != logits[where]).any(-1).all()
    assert torch.equal(spoiled.sort(-1).values, logits.sort(-1).values)  # the same distribution over other tokens
    part = torch.tensor([19_999, 4, 777])
    assert torch.equal(teacher.signal(part).logits, spoiled[part])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gate": "topk"}, ["gate", "topk", "Did you mean 'top_k'"]),
        ({"gate": "top_k", "gate_options": {"k": 3}}, ["gate_options", "'k'", "top_k"]),
        ({"gate": "top_k", "gate_options": {"verify_topk": 3}}, ["Did you mean 'verify_top_k'"]),
        ({"gate": "top_k", "gate_options": {"verify_top_k": 0}}, ["verify_top_k is 0"]),
        ({"gate": "top_k", "gate_options": {"verify_top_k": 2.5}}, ["verify_top_k is 2.5", "a whole number"]),
        ({"gate": "top_k", "gate_options": {"verify_top_k": True}}, ["verify_top_k is True", "a whole number"]),
        ({"gate": "random", "gate_options": {"rate": "half"}}, ["rate is 'half'", "a number"]),
        ({"gate": "label_ratio", "gate_options": {"hard": 1}}, ["hard is 1", "true or false"]),
        ({"gate": "inverted", "gate_options": {"gate": 3}}, ["gate is 3", "another gate's name"]),
        ({"gate": "none", "gate_options": {"rate": 1}}, ["rate", "no options"]),
        ({"gate": "inverted"}, ["inverted", "another gate"]),
        ({"divergence": "foward_kl"}, ["Did you mean 'forward_kl'"]),
        ({"divergence": "generalized_jsd", "divergence_options": {"beta": 2}}, ["beta is 2"]),
        ({"rejected": "masked"}, ["Did you mean 'mask'"]),
        ({"rejected": "down_weight", "rejected_options": "{rejected"}, ["rejected_options", "JSON"]),
        ({"normalizer": "tokens"}, ["normalizer", "'valid'"]),
        ({"label_loss_weight": 1.5}, ["label_loss_weight is 1.5"]),
        ({"divergence_temperature": 0}, ["divergence_temperature is 0"]),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest_right_one(settings, words) -> None:
    with pytest.raises(ConfigError) as caught:
        MethodConfig(**settings).objective()
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_settings_build_what_they_name() -> None:
    found = MethodConfig(gate="inverted", gate_options={"gate": "top_k", "verify_top_k": 3}, rejected="mask").objective()
    assert found.gate == Inverted(TopK(3)) and found.rejected == Mask()
    found = MethodConfig(gate="spec", gate_options='{"candidates": 2}', divergence="generalized_jsd").objective()
    assert found.gate == Spec(2)
