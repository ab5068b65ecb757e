"""Damage of every kind: what is read is what was written, or an error names the file. Never anything else."""

import random
from pathlib import Path

import pytest
import torch

from speckd.errors import StoreError
from speckd.teachers.layout import Compression, Kind, Layout
from speckd.teachers.store import Store, StoreWriter
from tests.teachers.faults import DamagedFiles, refusal
from tests.teachers.made import FAULTS, PROVENANCE, STRIDE, Entry, contents, entries, keys, same, stored

SHARD, FOOTER = "shard-00000.answers", 136


class Kept:
    """A store in memory, and what it answers while it is whole."""

    def __init__(self, folder: Path, layout: Layout, made: list[Entry], shards: int = 1) -> None:
        self.folder, self.made = folder, made
        store = stored(folder, layout, made, shards)
        self.answers = [store.answer(token_ids) for token_ids, _ in made]
        self.contents = contents(folder)

    def named(self, name: str, data: bytes) -> bool:
        """Whether a change of that file is found: when it is opened, or verified and by every read that it touches."""
        files, opened = DamagedFiles(self.contents | {name: data}), []
        error = refusal(lambda: opened.append(Store.open(self.folder, files)))
        if error is not None:
            assert str(self.folder) in error.what
            return True
        store = opened[0]
        error, refused = refusal(store.verify), 0
        assert error is None or name in error.what
        for (token_ids, _), answer in zip(self.made, self.answers, strict=True):
            unread = refusal(lambda token_ids=token_ids: store.answer(token_ids))
            refused += unread is not None
            assert name in unread.what if unread is not None else same(store.answer(token_ids), answer), "a silent corruption"
        assert (error is None) == (refused == 0)
        return error is not None


@pytest.fixture(scope="module", params=[Compression.NONE, Compression.ZLIB])
def small(request, tmp_path_factory) -> Kept:
    """About 4 KiB."""
    layout = Layout(Kind.TOP_K, 50, 8, compression=request.param)
    lengths = [90, 1, 2, 60, 17] if request.param is Compression.NONE else [90, 1, 2, 90, 90]
    return Kept(tmp_path_factory.mktemp("small"), layout, entries(layout, lengths))


def test_every_bit_of_a_small_shard_counts(small) -> None:
    data = small.contents[SHARD]
    for bit in range(0, 8 * len(data), STRIDE):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert small.named(SHARD, bytes(changed)), f"bit {bit}"


def test_every_bit_of_a_shard_counts_when_a_capture_is_resumed(small) -> None:
    """There is no manifest yet that could tell: a shard vouches for itself."""
    data, layout = small.contents[SHARD], Store.open(small.folder).layout

    def named(changed: bytes) -> bool:
        files = DamagedFiles(small.contents | {SHARD: changed})
        writer = StoreWriter.open(small.folder, layout, PROVENANCE, keys([small.made]), files)
        error = refusal(writer.missing)
        return error is not None and SHARD in error.what

    for bit in range(0, 8 * len(data), STRIDE):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert named(bytes(changed)), f"bit {bit}"
    for place in (0, 64, len(data) // 2, len(data) - FOOTER, len(data)):
        assert named(data[:place] + b"\0" + data[place:])


def test_every_length_but_its_own_is_found(small) -> None:
    data = small.contents[SHARD]
    for length in {*range(0, len(data), STRIDE), *range(200), *range(len(data) - 200, len(data))}:
        assert small.named(SHARD, data[:length]), f"cut to {length}"
    for more in (b"\0", data[-FOOTER:], data):
        assert small.named(SHARD, data + more) and small.named(SHARD, more + data)


def test_every_bit_and_length_of_the_manifest_counts(small) -> None:
    data = small.contents["manifest.json"]
    for bit in range(0, 8 * len(data), STRIDE):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert small.named("manifest.json", bytes(changed)), f"bit {bit}"
    for length in range(0, len(data), max(1, STRIDE // 8)):
        assert small.named("manifest.json", data[:length])
    for text in (b"", b"null", b"[]", b"{}", b"[" * 100_000, b'{"digest": 3}', data + b" ", data.replace(b"\n", b"\r\n")):
        assert small.named("manifest.json", text)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Kept:
    """16 MiB; small and large records, and with a whole vocabulary."""
    layout = Layout(Kind.FULL, 4096, 4096)
    return Kept(tmp_path_factory.mktemp("large"), layout, entries(layout, [*[20] * 20, 600, 900, 500], share=0.9))


def _regions(size: int, index: int) -> dict[str, tuple[int, int]]:
    return {"header": (0, 64), "records": (64, index), "index": (index, size - FOOTER), "footer": (size - FOOTER, size)}


def _damaged(data: bytes, region: tuple[int, int], chance: random.Random) -> bytes:
    """One bit or byte changed, or a block zeroed, duplicated over another, or two exchanged."""
    start, end = region
    block = min(chance.choice([16, 512, 4096]), (end - start) // 2)
    at = chance.randrange(start, end - block + 1)
    other = chance.randrange(0, len(data) - block + 1)
    changed = bytearray(data)
    match chance.randrange(5):
        case 0:
            changed[chance.randrange(start, end)] ^= 1 << chance.randrange(8)
        case 1:
            changed[chance.randrange(start, end)] = chance.randrange(256)
        case 2:
            changed[at : at + block] = bytes(block)
        case 3:
            changed[at : at + block] = data[other : other + block]
        case _:
            changed[at : at + block], changed[other : other + block] = data[other : other + block], data[at : at + block]
    return bytes(changed)


@pytest.mark.parametrize("region", ["header", "records", "index", "footer"])
def test_random_damage_of_a_large_shard_is_found(large, region) -> None:
    data = large.contents[SHARD]
    assert len(data) > 2**24
    place = _regions(len(data), Store.open(large.folder).shards[0].offsets[-1])[region]
    chance = random.Random(region)
    for _ in range(-(-FAULTS // 4)):
        changed = _damaged(data, place, chance)
        files = DamagedFiles(large.contents | {SHARD: changed})
        error = refusal(lambda files=files: Store.open(large.folder, files).verify())
        assert SHARD in error.what if error is not None else changed == data, "a silent corruption"


def test_records_moved_within_a_shard_or_between_two_are_found(tmp_path) -> None:
    """Of the same length and each intact: only the place is wrong."""
    layout = Layout(Kind.TOP_K, 50, 8)
    kept = Kept(tmp_path, layout, entries(layout, [20] * 4, share=1.0), shards=2)
    store = Store.open(tmp_path)
    first, second = store.shards[0].offsets[:2].tolist()
    size = second - first
    one, other = kept.contents[SHARD], kept.contents["shard-00001.answers"]
    exchanged = one[:first] + one[second : second + size] + one[first:second] + one[second + size :]
    assert kept.named(SHARD, exchanged)
    assert kept.named(SHARD, one[:first] + other[first:second] + one[second:])
    for number in range(2):
        assert kept.named(SHARD, one[: first + number * size] + one[first:second] * 2 + one[second + size :])


def test_a_file_that_changes_under_a_reader_is_found(tmp_path) -> None:
    layout = Layout(Kind.TOP_K, 50, 8)
    made = entries(layout, [20] * 4)
    store = stored(tmp_path, layout, made)
    path = tmp_path / SHARD
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(StoreError, match="shard-00000.answers: record 3 of 4 is damaged"):
        store.answer(made[3][0])
    with pytest.raises(StoreError, match="shard-00000.answers: the footer is damaged"):
        store.verify()
    path.unlink()
    with pytest.raises(StoreError, match="shard-00000.answers: No such file"):
        store.answer(made[3][0])
    path.write_bytes(whole)
    store.verify()
    assert torch.equal(store.answer(made[3][0]).label_log_probs, made[3][1].label_log_probs)
