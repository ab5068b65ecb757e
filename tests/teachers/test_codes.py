"""Ids as wide as they need be, and log-probabilities at 16 bits whose order is exact."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speckd.errors import StoreError
from speckd.teachers.codes import (
    NEVER,
    crowd,
    decoded,
    full_codes,
    pack_ids,
    packed_size,
    ranked_codes,
    ranked_log_probs,
    spread,
    unpack_ids,
)
from speckd.types import DenseSignal
from tests.teachers.made import teacher_log_probs

BOUNDARIES = [0, 1, 255, 256, 65535, 65536, 131071, 131072, 151935]


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 256, 257, 512, 32_000, 65_536, 65_537, 131_072, 131_073, 151_936, 2**31])
def test_ids_read_back_and_take_no_more_bits_than_the_vocabulary_needs(vocabulary) -> None:
    bits = (vocabulary - 1).bit_length()
    some = [i for i in BOUNDARIES if i < vocabulary] + [vocabulary - 1]
    for count in range(20):
        ids = np.array((some * 20)[:count], dtype=np.int64)
        packed = pack_ids(ids, bits)
        assert len(packed) == packed_size(count, bits) <= bits * ((count + 7) // 8)
        assert (unpack_ids(np.frombuffer(packed, dtype=np.uint8), count, bits) == ids).all()


def through(top: torch.Tensor, tail: bool) -> torch.Tensor:
    codes, falls = ranked_codes(top.numpy(), tail)
    return ranked_log_probs(codes, crowd(codes), falls)


@st.composite
def rows(draw) -> tuple[np.ndarray, int]:
    """Log-probabilities of a whole vocabulary, from flat to peaked, with ties and zeros, and a K."""
    vocabulary = draw(st.sampled_from([1, 2, 3, 17, 300, 5000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0, 10.0, 300.0]))
    made = teacher_log_probs(draw(st.integers(0, 9)), vocabulary, generator, scale, draw(st.booleans()), draw(st.booleans()))
    return made.numpy(), draw(st.integers(1, min(vocabulary, 200)))


@given(drawn=rows())
def test_codes_keep_every_order_and_tie_and_a_tail(counted, drawn) -> None:
    counted()
    log_probs, k = drawn
    top = torch.from_numpy(log_probs).topk(k).values
    tail = k < log_probs.shape[-1]
    read = through(top, tail)
    assert torch.equal(top.diff().sign(), read.diff().sign())
    assert torch.equal(top == -torch.inf, read == -torch.inf)
    left, true_left = 1 - read.double().exp().sum(-1), 1 - top.double().exp().sum(-1)
    assert (left > 0).all()  # nothing has more than everything
    assert (left >= 0.5 * true_left - 1e-12).all()


@given(drawn=rows())
def test_no_code_is_more_than_two_beside_the_nearest_float16(counted, drawn) -> None:
    """So no finite log-probability is off by more than 2.5 · 2^-10 of itself, or 2^-22."""
    counted()
    log_probs, k = drawn
    top = torch.from_numpy(log_probs).topk(k).values
    nearest = (top.half().numpy().view("<u2") & 0x7FFF).astype(int)
    for tail in (False, True):
        codes = ranked_codes(top.numpy(), tail)[0].astype(int)
        assert (abs(codes - nearest) <= 2).all()
        finite, read = top > -torch.inf, through(top, tail)
        assert ((read - top).abs() <= 2.5 * 2.0**-10 * top.abs() + 2.0**-22)[finite].all()


def test_a_crowd_of_a_thousand_in_one_float16_keeps_its_order() -> None:
    near = torch.full((1000,), -9.0) - torch.arange(1000) * 2e-6
    near[500:510] = near[500]  # a tie
    read = through(near[None], tail=True)
    assert torch.equal(read.diff().sign(), near[None].diff().sign())
    assert len(np.unique(ranked_codes(near[None].numpy(), tail=True)[0])) < 4
    assert float((read - near).abs().max()) < 0.02


def test_a_crowd_moves_nothing_beside_it() -> None:
    given = torch.tensor([[-1.0, -9.0, -9.000002, -9.000004, -10.0, -torch.inf, -torch.inf]])
    read = through(given, tail=False)
    assert torch.equal(read[:, [0, 1, 4, 5, 6]], given[:, [0, 1, 4, 5, 6]])
    assert torch.equal(read.diff().sign().nan_to_num(), given.diff().sign().nan_to_num())


@pytest.mark.parametrize("tail", [False, True])
def test_ties_stay_ties_where_a_row_must_lose_mass(tail) -> None:
    share = torch.linspace(0.001, 0.24, 2000, dtype=torch.float64)[:, None]
    given = torch.cat([1 - 3 * share, share, share, share], -1).log().float()
    read = through(given, tail)
    assert torch.equal(read.diff().sign(), given.diff().sign())
    assert (read.double().exp().sum(-1) < 1).all()


def test_more_than_float32_can_tell_apart_are_refused() -> None:
    codes, apart = np.full((1, 9000), 100, dtype="<u2"), np.ones(8999, dtype=bool)
    with pytest.raises(StoreError, match="more than 8192 log-probabilities share 16 bits.*32 bits"):
        ranked_log_probs(codes, crowd(codes), apart)


@given(drawn=rows(), ordered=st.sampled_from([1, 5, 128]))
def test_a_whole_vocabulary_keeps_the_verdicts_up_to_so_many(counted, drawn, ordered) -> None:
    counted()
    log_probs, _ = drawn
    given_signal = DenseSignal(torch.from_numpy(log_probs))
    codes = full_codes(log_probs, ordered)
    read = DenseSignal(decoded(codes))
    for k in {1, ordered // 2 + 1, ordered}:
        for token in np.unique(np.linspace(0, log_probs.shape[-1] - 1, 9, dtype=int)).tolist():
            ids = torch.full((len(log_probs),), token)
            assert torch.equal(read.in_top_k(ids, k), given_signal.in_top_k(ids, k))
    falling = np.argsort(-log_probs, axis=-1, kind="stable")
    assert (np.diff(np.take_along_axis(codes.astype(int), falling, -1)) >= 0).all()


def test_spread_moves_a_crowd_to_both_sides_and_leaves_the_rest() -> None:
    codes = np.array([[100, 200, 200, 200, 200, 300]], dtype=np.int32)
    rising = np.array([[False, True, True, True, True, True]])
    assert spread(codes, rising).tolist() == [[100, 198, 199, 200, 201, 300]]
    tie = np.array([[False, True, False, False, True, True]])
    assert spread(codes, tie).tolist() == [[100, 199, 199, 199, 200, 300]]


def test_what_16_bits_cannot_hold_is_refused_by_name() -> None:
    assert ranked_codes(np.array([[0.0, -60_000.0, -np.inf]], dtype=np.float32), tail=True)[0][0, 2] == NEVER
    for tail in (False, True):
        with pytest.raises(StoreError, match="below what 16 bits hold.*32 bits"):
            ranked_codes(np.array([[0.0, -70_000.0]], dtype=np.float32), tail)
        with pytest.raises(StoreError, match="below what 16 bits hold"):
            ranked_codes(np.array([[0.0, -65_519.0, -65_521.0]], dtype=np.float32), tail)
    with pytest.raises(StoreError, match="below what 16 bits hold"):
        full_codes(np.array([[0.0, -1e6]], dtype=np.float32), 1)
