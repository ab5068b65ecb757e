"""A capture that is killed, or whose disk fails, at any operation: resumed, it is byte for byte what it would have been."""

import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest

from speckd.errors import StoreError
from speckd.teachers.layout import Compression, Kind, Layout
from speckd.teachers.store import Store
from tests.teachers.faults import FailingFiles, Killed, broken, no_space, refusal
from tests.teachers.made import FAULTS, capture, contents, entries, planned, same

LAYOUT = Layout(Kind.TOP_K, 50, 8, compression=Compression.ZLIB)
PARTS = planned(entries(LAYOUT, [5, 9, 30, 4, 1, 12]), 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    capture(folder, LAYOUT, PARTS)
    return contents(folder)


def _operations(folder: Path) -> list[str]:
    files = FailingFiles()
    capture(folder, LAYOUT, PARTS, files)
    return files.done


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_anything_follows(tmp_path) -> None:
    done = [name for name in _operations(tmp_path) if name in ("create", "write", "sync", "rename", "sync_folder")]
    published = " ".join(done).split("create ")[1:]
    assert len(published) == 5  # plan, three shards, manifest
    for steps in published:
        assert steps.replace("write ", "").strip() == "sync rename sync_folder"


@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_every_operation_and_resumed(tmp_path, whole, torn) -> None:
    for at in range(len(_operations(tmp_path / "count"))):
        folder = tmp_path / str(at)
        with pytest.raises(Killed):
            capture(folder, LAYOUT, PARTS, FailingFiles(at=at, torn=torn))
        left = contents(folder) if folder.exists() else {}
        assert all(whole[name] == data for name, data in left.items() if name in whole), "a half-written file has its name"
        capture(folder, LAYOUT, PARTS)
        assert contents(folder) == whole


def test_killed_again_and_again_at_random_operations(tmp_path, whole) -> None:
    chance = random.Random(0)
    for number in range(FAULTS):
        folder = tmp_path / str(number)
        for _ in range(chance.randrange(1, 5)):
            try:
                capture(folder, LAYOUT, PARTS, FailingFiles(at=chance.randrange(60), torn=chance.random() < 0.5))
            except Killed:
                continue
        capture(folder, LAYOUT, PARTS)
        assert contents(folder) == whole


def test_sigkill_at_random_moments_and_resumed(tmp_path) -> None:
    """A process of its own each time, killed at any instant, until it gets through."""
    layout = Layout(Kind.TOP_K, 300, 32)
    parts = planned(entries(layout, [60] * 24), 6)
    capture(tmp_path / "whole", layout, parts)
    expected, chance, killed, number, longest = contents(tmp_path / "whole"), random.Random(1), 0, 0, 0.0
    while killed < FAULTS:
        folder, number = tmp_path / str(number), number + 1
        for _ in range(50):
            child = os.fork()
            if child == 0:
                try:
                    capture(folder, layout, parts)
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            started = time.perf_counter()
            time.sleep(chance.random() * (longest or 0.05))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            longest = max(longest, time.perf_counter() - started) if not os.WIFSIGNALED(status) else (longest or 0.05)
            if os.WIFSIGNALED(status):
                killed += 1
                continue
            assert os.WEXITSTATUS(status) == 0
            break
        capture(folder, layout, parts)
        assert contents(folder) == expected


@pytest.mark.parametrize("failure", [no_space, broken], ids=["disk full", "broken disk"])
@pytest.mark.parametrize("for_good", [False, True])
def test_a_failing_disk_is_named_and_what_was_published_stays(tmp_path, whole, failure, for_good) -> None:
    operations = _operations(tmp_path / "count")
    for at, operation in enumerate(operations):
        folder = tmp_path / str(at)
        files = FailingFiles(failure, at, for_good, torn=True)
        message = os.strerror(failure().errno)
        error = refusal(lambda folder=folder, files=files: capture(folder, LAYOUT, PARTS, files))
        if error is None:
            assert not for_good and operation in ("exists", "remove"), (at, operation)  # what is not cleaned up can wait
        else:
            assert message in error.what and str(folder) in error.what, (operation, error)
            assert "again" in error.fix
        left = contents(folder) if folder.exists() else {}
        assert all(whole[name] == data for name, data in left.items() if name in whole)
        if not for_good:
            assert not [name for name in left if name.endswith(".partial")] or operation == "remove"
        capture(folder, LAYOUT, PARTS)
        assert contents(folder) == whole


def test_a_real_limit_of_the_operating_system(tmp_path, whole) -> None:
    """RLIMIT_FSIZE, in a process of its own: a file may have so many bytes and no more."""
    for limit in (0, 100, 700, max(map(len, whole.values())) - 1):
        folder = tmp_path / str(limit)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            error = refusal(lambda folder=folder: capture(folder, LAYOUT, PARTS))
            os._exit(0 if error is not None and "File too large" in error.what and "Free some space" in error.fix else 1)
        assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 0
        assert all(whole[name] == data for name, data in contents(folder).items() if name in whole)
        capture(folder, LAYOUT, PARTS)
        assert contents(folder) == whole


def test_a_disk_that_takes_little_at_a_time_gets_it_all(tmp_path, whole) -> None:
    capture(tmp_path, LAYOUT, PARTS, FailingFiles(short=True))
    assert contents(tmp_path) == whole


def test_a_disk_that_takes_nothing_is_no_endless_loop(tmp_path) -> None:
    class Nothing(FailingFiles):
        def write(self, descriptor: int, data: memoryview) -> int:
            return 0

    with pytest.raises(StoreError, match=r"plan.json: nothing could be written|plan.json: Input/output error"):
        capture(tmp_path, LAYOUT, PARTS, Nothing())


def test_a_failing_read_is_named(tmp_path) -> None:
    capture(tmp_path, LAYOUT, PARTS)
    files = FailingFiles(broken)
    store = Store.open(tmp_path, files)
    for at in range(len(files.done)):
        with pytest.raises(StoreError, match=r"(manifest.json|shard-0000\d.answers): Input/output error"):
            Store.open(tmp_path, FailingFiles(broken, at))
    token_ids, answer = PARTS[2][1]
    files.at, files.for_good = len(files.done), False
    with pytest.raises(StoreError, match="shard-00002.answers: Input/output error"):
        store.answer(token_ids, answer.positions)
    read = store.answer(token_ids, answer.positions)
    assert same(read, Store.open(tmp_path).answer(token_ids))
