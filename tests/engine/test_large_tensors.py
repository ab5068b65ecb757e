"""Memory that is used again is never used twice at once."""

import sys

import pytest
import torch

from speckd import large

SHAPE, CPU = (3, 2**20), torch.device("cpu")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch.empty gives the memory")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch) -> None:
    monkeypatch.setattr(large, "_kept", [])


def test_room_in_use_is_not_given_away_and_room_let_go_is() -> None:
    first = large.room(SHAPE, torch.float32, CPU).fill_(1)
    row = first[1]  # a view holds it, too
    place = first.data_ptr()
    second = large.room(SHAPE, torch.float32, CPU).fill_(2)
    del first
    third = large.room(SHAPE, torch.float32, CPU).fill_(3)
    assert len({place, second.data_ptr(), third.data_ptr()}) == 3
    assert bool((row == 1).all()) and bool((second == 2).all())
    del row
    assert large.room((2, 2**20), torch.float32, CPU).data_ptr() == place


def test_no_more_is_kept_than_a_few() -> None:
    held = [large.room((2**20 + i, 1), torch.float32, CPU) for i in range(20)]
    assert len({tensor.data_ptr() for tensor in held}) == 20
    assert len(large._kept) <= large._MOST_KEPT
    del held
    large.room((2**25, 1), torch.float32, CPU)
    assert len(large._kept) <= large._MOST_KEPT


def test_small_tensors_are_torchs_own() -> None:
    before = len(large._kept)
    assert large.room((5, 7), torch.bfloat16, CPU).shape == (5, 7)
    assert len(large._kept) == before
