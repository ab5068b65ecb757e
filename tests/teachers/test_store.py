"""The folder: what is captured is found by its tokens, and nothing else is."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from speckd.errors import StoreError
from speckd.teachers.files import FileLock, Files, partial
from speckd.teachers.layout import Kind, Layout
from speckd.teachers.record import HEADER, decode, encode, sequence_key
from speckd.teachers.store import Store, StoreWriter
from tests.teachers.faults import refusal
from tests.teachers.made import PROVENANCE, capture, contents, entries, keys, layouts, planned, same, stored

LAYOUT = Layout(Kind.TOP_K, 50, 8)


@pytest.mark.parametrize("layout", list(layouts()), ids=str)
def test_every_sequence_is_found_and_no_other(tmp_path, layout) -> None:
    made = entries(layout, [2, 3, 40, 7, 1, 9])
    store = stored(tmp_path / "a", layout, made, shards=3)
    store.verify()
    assert len(store) == 6 and store.layout == layout
    assert store.totals.answers == sum(len(answer.positions) for _, answer in made)
    assert store.totals.size == sum(p.stat().st_size for p in (tmp_path / "a").glob("shard-*"))
    for token_ids, answer in made[::-1]:
        assert token_ids in store
        wanted = decode(encode(token_ids, answer, layout).data, token_ids, layout)
        assert same(store.answer(token_ids, answer.positions), wanted) and same(store.answer(token_ids), wanted)
        some = answer.positions[::2].contiguous()
        assert not len(some) or same(store.answer(token_ids, some), wanted.at(some))
    token_ids, answer = made[2]
    for wrong in (token_ids[:-1], token_ids.flip(0), torch.cat([token_ids, token_ids[-1:]]), token_ids[:0]):
        assert wrong not in store
        with pytest.raises(StoreError, match=f"a sequence of {len(wrong)} tokens that is trained on is not in the cache.*Run"):
            store.answer(wrong, answer.positions)
    missing = torch.tensor([p for p in range(39) if p not in answer.positions.tolist()][:1])
    with pytest.raises(StoreError, match="shard-00001.*not at all the positions that are trained on"):
        store.answer(token_ids, missing)


def test_keys_that_begin_alike_are_told_apart(tmp_path) -> None:
    """As if the first eight bytes of all were the same: sooner or later two are."""
    made = entries(LAYOUT, [5, 9, 30])
    store = stored(tmp_path, LAYOUT, made, shards=2)
    for token_ids, answer in made:
        alike = replace(store, prefixes=np.repeat(np.frombuffer(sequence_key(token_ids)[:8], dtype="<u8"), 3))
        assert torch.equal(alike.answer(token_ids).label_log_probs, answer.label_log_probs)
        assert sum(other in alike for other, _ in made) == 1


def test_an_empty_capture_is_a_store(tmp_path) -> None:
    for shards in (0, 2):
        store = stored(tmp_path / str(shards), LAYOUT, [], shards)
        store.verify()
        assert len(store) == 0 and store.bytes_per_token() == 0
        with pytest.raises(StoreError, match="not in the cache"):
            store.answer(torch.tensor([1, 2]))


def test_captures_of_the_same_are_the_same_bytes_whatever_the_order_of_shards(tmp_path) -> None:
    parts = planned(entries(LAYOUT, [5, 9, 30, 4]), 4)
    capture(tmp_path / "a", LAYOUT, parts)
    writers = [StoreWriter.open(tmp_path / "b", LAYOUT, PROVENANCE, keys(parts)) for _ in range(2)]
    for number, writer in ((2, 0), (0, 1), (3, 1), (1, 0)):
        writers[writer].write(number, parts[number])
    assert writers[0].publish() == writers[1].publish()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert list(contents(tmp_path / "a")) == ["manifest.json", "plan.json", *(f"shard-0000{i}.answers" for i in range(4))]


def test_a_finished_capture_has_nothing_to_do_and_a_deleted_shard_is_made_again(tmp_path) -> None:
    parts = planned(entries(LAYOUT, [5, 9, 30, 4]), 2)
    capture(tmp_path, LAYOUT, parts)
    before = contents(tmp_path)
    writer = StoreWriter.open(tmp_path, LAYOUT, PROVENANCE, keys(parts))
    assert writer.missing() == ()
    writer.write(0, iter(()))  # there already: the entries are not asked for
    writer.publish()
    (tmp_path / "shard-00001.answers").unlink()
    with pytest.raises(StoreError, match="shard-00001.answers: there is no such file.*speckd cache"):
        Store.open(tmp_path)
    assert writer.missing() == (1,) and writer.missing(among=[0]) == ()
    with pytest.raises(StoreError, match="shard-00001.answers: not captured yet"):
        writer.publish()
    writer.write(1, parts[1])
    writer.publish()
    assert contents(tmp_path) == before


def test_a_capture_with_anything_changed_is_refused_by_the_field(tmp_path) -> None:
    parts = planned(entries(LAYOUT, [5, 9, 30, 4]), 2)
    StoreWriter.open(tmp_path, LAYOUT, PROVENANCE, keys(parts)).write(0, parts[0])
    before = contents(tmp_path)
    without = {field: value for field, value in PROVENANCE.items() if field != "revision"}
    for message, layout, provenance, wanted in (
        ("layout.width is 8 there and 9 now", replace(LAYOUT, width=9), PROVENANCE, parts),
        ("layout.precision is 16 there and 32 now", replace(LAYOUT, precision=32), PROVENANCE, parts),
        ('provenance.weights is "0f" there and "1f" now', LAYOUT, PROVENANCE | {"weights": "1f"}, parts),
        ("provenance.revision is null there and absent now", LAYOUT, without, parts),
        ("provenance.temperature is 1.0 there and 1 now", LAYOUT, PROVENANCE | {"temperature": 1}, parts),
        ("shards is", LAYOUT, PROVENANCE, parts[::-1]),
        ("shards is", LAYOUT, PROVENANCE, parts[:1]),
    ):
        with pytest.raises(StoreError, match=f"another capture: {message}.*another folder, or delete this one"):
            StoreWriter.open(tmp_path, layout, provenance, keys(wanted))
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="planned twice"):
        StoreWriter.open(tmp_path / "b", LAYOUT, PROVENANCE, keys([parts[0], parts[0]]))
    with pytest.raises(TypeError):
        StoreWriter.open(tmp_path / "c", LAYOUT, {"teacher": Path("x")}, keys(parts))


def test_what_is_captured_must_be_what_was_planned(tmp_path) -> None:
    parts = planned(entries(LAYOUT, [5, 9, 30, 4]), 2)
    writer = StoreWriter.open(tmp_path, LAYOUT, PROVENANCE, keys(parts))
    for wrong, message in (
        (parts[0][::-1], "sequence 0 that was captured is not the one that was planned"),
        ([*parts[0], parts[1][0]], "sequence 2 that was captured is not"),
        (parts[0][:1], "1 of 2 sequences were captured"),
    ):
        with pytest.raises(StoreError, match=message):
            writer.write(0, wrong)
    assert list(contents(tmp_path)) == ["plan.json", "shard-00000.answers.lock"] and writer.missing() == (0, 1)


def test_a_teacher_that_fails_leaves_nothing_and_its_own_error(tmp_path) -> None:
    parts = planned(entries(LAYOUT, [5, 9]), 1)
    writer = StoreWriter.open(tmp_path, LAYOUT, PROVENANCE, keys(parts))

    def failing():
        yield parts[0][0]
        raise OSError("the teacher's own")

    with pytest.raises(OSError, match="the teacher's own"):
        writer.write(0, failing())
    assert not partial(tmp_path / "shard-00000.answers").exists()


def test_a_shard_is_written_by_one_process_at_a_time(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("speckd.teachers.store._SHARD_PATIENCE", 0)
    parts = planned(entries(LAYOUT, [5, 9, 30, 4]), 2)
    first, second = (StoreWriter.open(tmp_path, LAYOUT, PROVENANCE, keys(parts)) for _ in range(2))

    def slow():
        yield parts[0][0]
        with pytest.raises(StoreError, match="shard-00000.answers: another process is writing it"):
            second.write(0, parts[0])
        second.write(1, parts[1])  # another shard meanwhile
        StoreWriter.open(tmp_path, LAYOUT, PROVENANCE, keys(parts))  # cleans up, but not what is being written
        yield parts[0][1]

    first.write(0, slow())
    second.publish()
    mixed = contents(tmp_path)
    capture(tmp_path / "alone", LAYOUT, parts)
    assert mixed == contents(tmp_path / "alone")


def test_processes_capture_and_read_side_by_side(tmp_path) -> None:
    """Four writers, each its shards, and a reader that sees nothing or the whole."""
    parts = planned(entries(LAYOUT, [20] * 24), 12)
    capture(tmp_path / "alone", LAYOUT, parts)
    answers = [Store.open(tmp_path / "alone").answer(token_ids) for part in parts for token_ids, _ in part]
    children = []
    for rank in range(4):
        child = os.fork()
        if child == 0:
            writer = StoreWriter.open(tmp_path / "cache", LAYOUT, PROVENANCE, keys(parts))
            own = range(rank, 12, 4)
            os._exit(1 if any(refusal(lambda n=n: writer.write(n, parts[n])) for n in writer.missing(own)) else 0)
        children.append(child)
    read: list[Store] = []
    while children or not read:
        error = refusal(lambda: read.append(Store.open(tmp_path / "cache")))
        assert error is None or "no cached teacher" in error.what or "not finished" in error.what
        if children:
            assert os.waitpid(children.pop(), 0)[1] == 0
        else:
            StoreWriter.open(tmp_path / "cache", LAYOUT, PROVENANCE, keys(parts)).publish()
    found = [read[0].answer(token_ids) for part in parts for token_ids, _ in part]
    assert all(same(a, b) for a, b in zip(found, answers, strict=True))
    assert contents(tmp_path / "cache") == contents(tmp_path / "alone")


def test_what_a_killed_writer_left_is_cleaned_up_and_what_a_live_one_has_is_not(tmp_path) -> None:
    parts = planned(entries(LAYOUT, [5, 9, 30, 4]), 2)
    StoreWriter.open(tmp_path, LAYOUT, PROVENANCE, keys(parts))
    dead, alive = (partial(tmp_path / f"shard-0000{number}.answers") for number in range(2))
    foreign = tmp_path / "notes.partial"
    for path in (dead, alive, foreign):
        path.write_bytes(b"half")
    with FileLock(tmp_path / "shard-00001.answers.lock"):
        StoreWriter.open(tmp_path, LAYOUT, PROVENANCE, keys(parts))
        assert not dead.exists() and alive.exists() and foreign.exists()


def test_another_run_is_refused_by_the_field(tmp_path) -> None:
    store = stored(tmp_path, LAYOUT, entries(LAYOUT, [5, 9]))
    store.require({})
    store.require(PROVENANCE | {"teacher_cache_kind": "top_k", "teacher_cache_bits": 16, "teacher_top_k": 8})
    for message, fields in (
        ('teacher is "a teacher" there and "another" now', {"teacher": "another"}),
        ("template is absent there and null now", {"template": None}),
        ("revision is null there and 0 now", {"revision": 0}),
        ("teacher_top_k is 8 there and 9 now", {"teacher_top_k": 9}),
        ('teacher_cache_kind is "top_k" there and "full" now', {"teacher_cache_kind": "full"}),
    ):
        with pytest.raises(StoreError, match=f"the cached teacher is not this run's: {message}.*speckd cache"):
            store.require(fields)


def test_libraries_are_kept_and_no_reason_to_refuse(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    parts = planned(entries(LAYOUT, [5, 9]), 2)
    begun = StoreWriter.open(tmp_path, LAYOUT, PROVENANCE, keys(parts), libraries={"torch": "1"})
    begun.write(0, parts[0])
    writer = StoreWriter.open(tmp_path, LAYOUT, PROVENANCE, keys(parts), libraries={"torch": "2"})
    assert 'begun with other libraries: torch is "1" there and "2" now' in caplog.text
    assert writer.missing() == (1,)
    writer.write(1, parts[1])
    writer.publish()
    assert Store.open(tmp_path).manifest.libraries == {"torch": "1"}
    whole = contents(tmp_path)
    StoreWriter.open(tmp_path, LAYOUT, PROVENANCE, keys(parts), libraries={"torch": "3"}).publish()
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("layout", list(layouts()), ids=str)
def test_positions_are_read_without_the_answers(layout: Layout, tmp_path) -> None:
    made = [*entries(layout, [0, 1, 2, 9, 60]), *entries(layout, [20_001], seed=1)]
    reads: list[int] = []

    class Counting(Files):
        def read(self, path: Path, offset: int, length: int) -> bytes:
            reads.append(length)
            return super().read(path, offset, length)

    capture(tmp_path, layout, planned(made, 2))
    store = Store.open(tmp_path, Counting())
    for ids, answer in made:
        reads.clear()
        found = store.positions(ids)
        assert found is not None and torch.equal(found, answer.positions) and len(reads) == 1
        assert reads[0] <= 2 * len(ids) / 8 + 1200
    assert store.positions(torch.tensor([1, 2, 3])) is None


def test_positions_of_a_record_that_is_none_are_refused(tmp_path) -> None:
    made = entries(LAYOUT, [40])
    capture(tmp_path, LAYOUT, planned(made, 1))
    store, shard = Store.open(tmp_path), tmp_path / "shard-00000.answers"
    intact, start = shard.read_bytes(), int(store.shards[0].offsets[0])
    for byte in (start, start + 16, start + 20, start + HEADER.size):  # key, tokens, answered positions, the first of them
        shard.write_bytes(intact[:byte] + bytes([intact[byte] ^ 1]) + intact[byte + 1 :])
        with pytest.raises(StoreError, match="shard-00000.answers: record 0: a record is damaged"):
            store.positions(made[0][0])


def test_shards_of_others_are_refused(tmp_path) -> None:
    made = entries(LAYOUT, [5, 9, 30, 4])
    parts = planned(made, 2)
    capture(tmp_path / "a", LAYOUT, parts)
    folder = tmp_path / "a"
    first, second = (folder / f"shard-0000{number}.answers" for number in range(2))
    one, two = first.read_bytes(), second.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(StoreError, match=message):
            Store.open(folder)
        with pytest.raises(StoreError, match=message):
            StoreWriter.open(folder, LAYOUT, PROVENANCE, keys(parts)).missing()

    first.write_bytes(two), second.write_bytes(one)
    refused("shard-00000.answers: intact, but it is shard 1 under another's name")
    second.write_bytes(two)
    refused("shard-00000.answers: intact, but it is shard 1 under another's name")
    for changed in (PROVENANCE | {"weights": "1f"}, PROVENANCE | {"temperature": 2.0}):
        writer = StoreWriter.open(tmp_path / str(changed["temperature"]), LAYOUT, changed, keys(parts))
        writer.write(0, parts[0])
        first.write_bytes((writer.folder / first.name).read_bytes())
        refused("shard-00000.answers: intact, but of another capture")
    # The same plan, but a teacher that answered otherwise: no field tells, the manifest's digest does.
    other = [(ids, replace(answer, label_log_probs=answer.label_log_probs - 1e-6)) for ids, answer in parts[0]]
    writer = StoreWriter.open(tmp_path / "c", LAYOUT, PROVENANCE, keys(parts))
    writer.write(0, other)
    first.write_bytes((writer.folder / first.name).read_bytes())
    with pytest.raises(StoreError, match="shard-00000.answers: intact, but not the one that the manifest names"):
        Store.open(folder)
    first.write_bytes(one)
    Store.open(folder).verify()


def test_an_unfinished_or_absent_capture_is_no_store(tmp_path) -> None:
    with pytest.raises(StoreError, match="no cached teacher.*Run `speckd cache` with this configuration"):
        Store.open(tmp_path / "nothing")
    StoreWriter.open(tmp_path, LAYOUT, PROVENANCE, [[]])
    with pytest.raises(StoreError, match="a capture that is not finished.*again"):
        Store.open(tmp_path)


def test_the_manifest_says_what_is_there_and_how_far_it_was_rounded(tmp_path) -> None:
    made = entries(LAYOUT, [50, 90])
    store = stored(tmp_path, LAYOUT, made)
    read = [(answer.log_probs, store.answer(ids).log_probs) for ids, answer in made]
    off = torch.cat([(a - b).double().abs().flatten() for a, b in read])
    in_probs = torch.cat([(a.double().exp() - b.double().exp()).abs().flatten() for a, b in read])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["provenance"] == PROVENANCE and manifest["layout"]["kind"] == "top_k"
    assert manifest["totals"]["sequences"] == 2 and manifest["totals"]["answers"] == store.totals.answers
    for name, values in (("log_probs", off), ("probs", in_probs)):
        assert manifest["rounding"][f"max_absolute_error_of_{name}"] == pytest.approx(float(values.max()), rel=1e-4)
        assert manifest["rounding"][f"mean_absolute_error_of_{name}"] == pytest.approx(float(values.mean()), rel=1e-4)
    assert 0 < float(off.max()) < 2.5 * 2.0**-10 * float(torch.cat([a.flatten() for a, _ in read]).abs().max())
