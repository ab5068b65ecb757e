"""Questions answered by tiles have the answers of the whole row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speckd import tiles
from speckd.types import DenseSignal

WIDTHS = st.sampled_from([1, 2, 127, 128, 129, 255, 256, 300, 1009])


def drawn(width: int, seed: int, levels: int) -> torch.Tensor:
    """Rows with many ties, some of them −inf in part."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (5, width), generator=generator).double()
    logits[1, torch.rand(width, generator=generator) < 0.5] = -torch.inf
    logits[1, int(torch.randint(width, (1,), generator=generator))] = 0.0
    return logits


@given(width=WIDTHS, seed=st.integers(0, 10**6), levels=st.integers(1, 40), k=st.integers(1, 300))
def test_argmax_and_rank_are_those_of_the_row(width, seed, levels, k) -> None:
    logits = drawn(width, seed, levels)
    signal = DenseSignal(logits)
    assert torch.equal(signal.argmax(), logits.argmax(-1))  # the first of several
    assert torch.equal(signal.maximum[:, 0], logits.amax(-1))
    ids = torch.randint(width, (5,), generator=torch.Generator().manual_seed(seed))
    own = logits.gather(-1, ids[:, None])
    wanted = ((logits > own).sum(-1) < k) & (own[:, 0] > -torch.inf)
    assert torch.equal(signal.in_top_k(ids, k), wanted)


@given(width=WIDTHS, seed=st.integers(0, 10**6), levels=st.integers(1, 9))
def test_sampling_is_the_inverse_of_the_cumulative_distribution(width, seed, levels) -> None:
    logits = drawn(width, seed, levels)
    draws = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = DenseSignal(logits).sample(draws)
    cumulative = logits.softmax(-1).cumsum(-1)
    upper = cumulative.gather(-1, found)
    lower = upper - logits.softmax(-1).gather(-1, found)
    target = draws * cumulative[:, -1:]
    assert (lower <= target + 1e-12).all() and (target <= upper + 1e-12).all()
    assert (logits.gather(-1, found) > -torch.inf).all()


def test_probabilities_of_a_few_tokens_are_those_of_the_softmax() -> None:
    logits = drawn(300, 3, 9) * 3
    signal, ids = DenseSignal(logits), torch.tensor([[0, 7], [1, 299], [5, 5], [128, 127], [2, 3]])
    wanted = logits.log_softmax(-1)
    assert torch.allclose(signal.log_probs, wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(signal.log_prob(ids), wanted.gather(-1, ids), rtol=1e-12, atol=1e-12)
    assert torch.allclose(signal.entropy(), torch.special.entr(wanted.exp()).sum(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
def test_what_is_not_finite_comes_through(spoiled) -> None:
    logits = torch.zeros(2, 300)
    logits[1, 299] = spoiled
    assert not torch.isfinite(tiles.tile_maxima(logits).amax(-1))[1]
