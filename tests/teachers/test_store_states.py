"""Any course of events: captures, kills, full disks, damage, deletions, several writers; and readers at any time."""

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from speckd.errors import StoreError
from speckd.teachers.layout import Compression, Kind, Layout
from speckd.teachers.store import Store, StoreWriter
from tests.teachers.faults import FailingFiles, Killed, no_space, refusal
from tests.teachers.made import PROVENANCE, capture, contents, entries, keys, planned, same

LAYOUT = Layout(Kind.TOP_K, 20, 3, compression=Compression.ZLIB)
MADE = entries(LAYOUT, [5, 9, 1, 4, 2])
PARTS = planned(MADE, 3)
NAMES = ["plan.json", "manifest.json", *(f"shard-0000{number}.answers" for number in range(3))]


class Captures(RuleBasedStateMachine):
    """The model: the files as an undisturbed capture writes them, and which of them we damaged ourselves."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp()) / "cache"
        capture(self.folder.parent / "whole", LAYOUT, PARTS)
        self.whole = contents(self.folder.parent / "whole")
        self.answers = [Store.open(self.folder.parent / "whole").answer(token_ids) for token_ids, _ in MADE]
        self.damaged: set[str] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.folder.parent)

    @rule(number=st.integers(0, 2), at=st.integers(0, 30), torn=st.booleans(), full=st.booleans())
    def write_and_fail(self, number: int, at: int, torn: bool, full: bool) -> None:
        files = FailingFiles(no_space if full else Killed, at, torn=torn)
        with suppress(Killed, StoreError):
            StoreWriter.open(self.folder, LAYOUT, PROVENANCE, keys(PARTS), files).write(number, PARTS[number])

    @rule(number=st.integers(0, 2))
    def write(self, number: int) -> None:
        error = refusal(lambda: StoreWriter.open(self.folder, LAYOUT, PROVENANCE, keys(PARTS)).write(number, PARTS[number]))
        assert error is None or self.damaged

    @rule(at=st.integers(0, 40))
    def finish_and_fail(self, at: int) -> None:
        with suppress(Killed, StoreError):
            capture(self.folder, LAYOUT, PARTS, FailingFiles(at=at))

    @rule()
    def finish(self) -> None:
        """A damaged manifest is written anew; a damaged shard or plan is refused by name."""
        error = refusal(lambda: capture(self.folder, LAYOUT, PARTS))
        blocking = self.damaged - {"manifest.json"}
        assert any(name in error.what for name in blocking) if error else not blocking
        if error is None:
            self.damaged = set()
            assert contents(self.folder) == self.whole

    @rule(name=st.sampled_from(NAMES), place=st.integers(0, 10**6), cut=st.booleans())
    def damage(self, name: str, place: int, cut: bool) -> None:
        path = self.folder / name
        if path.exists() and name not in self.damaged:
            data = bytearray(path.read_bytes())
            data[place % len(data)] ^= 1 << place % 8
            path.write_bytes(data[: place % len(data)] if cut else data)
            self.damaged.add(name)

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)
        self.damaged.discard(name)

    @invariant()
    def a_reader_is_right_or_refused(self) -> None:
        if not hasattr(self, "folder"):
            return
        opened: list[Store] = []
        if refusal(lambda: opened.append(Store.open(self.folder))) is not None:
            return
        refused = 0
        for (token_ids, _), answer in zip(MADE, self.answers, strict=True):
            read = []
            error = refusal(lambda token_ids=token_ids, read=read: read.append(opened[0].answer(token_ids)))
            refused += error is not None
            assert error is not None or same(read[0], answer)
        assert not refused or self.damaged
        there = contents(self.folder)
        assert {name: data for name, data in there.items() if name in NAMES and name not in self.damaged}.items() <= (
            self.whole.items()
        )


TestCaptures = pytest.mark.filterwarnings("error")(Captures.TestCase)
TestCaptures.settings = settings(max_examples=max(5, settings().max_examples // 4), stateful_step_count=20)
