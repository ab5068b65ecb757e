"""A folder of a teacher's answers: shards of records, a plan written before them and a manifest after.

A store is written by any number of processes, each its own shards, and may be resumed after a kill; what is there once the
manifest is, is the same byte for byte. It is read by the sequence's tokens, so order, epochs and batch size do not matter.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from speckd.errors import StoreError
from speckd.teachers.answers import Answer
from speckd.teachers.files import PARTIAL, Files, alone, exists, named, publish
from speckd.teachers.layout import Layout
from speckd.teachers.manifest import (
    LIBRARIES,
    MANIFEST,
    PLAN,
    Manifest,
    Plan,
    Provenance,
    as_json,
    differences,
    document,
    plan,
    read_document,
    read_manifest,
    shard_name,
)
from speckd.teachers.record import beginning_size, decode, positions_in, sequence_key
from speckd.teachers.shard import Entry, Shard, Totals, open_shard, write_shard

logger = logging.getLogger(__name__)

_RESUME = "Run `speckd cache` again: it makes what is missing"
_FIX = "Delete this file and run `speckd cache` again: it makes what is missing"
_PATIENCE = 60.0  # seconds for what takes others a moment
_SHARD_PATIENCE = 2.0


@dataclass(frozen=True)
class StoreWriter:
    """Captures into a folder, in this process or in several with the same plan."""

    folder: Path
    plan: Plan
    files: Files

    @classmethod
    def open(
        cls,
        folder: Path,
        layout: Layout,
        provenance: Provenance,
        shards: Sequence[Sequence[bytes]],
        files: Files | None = None,
        libraries: Mapping[str, str] | None = None,
    ) -> "StoreWriter":
        """Begins a capture or resumes it.

        Args:
            provenance: what the answers depend on, JSON values by name: teacher, tokenizer, template, temperature.
            shards: which sequences go where, by `sequence_key`, in the order in which they will be written.
            libraries: versions by name, to be kept; of a capture that was begun with others, those stay, and it is said.

        Raises:
            StoreError: the folder holds another capture (the fields are named), or cannot be written.
        """
        writer = cls(Path(folder), plan(layout, provenance, shards, libraries or {}), files or Files())
        with named(writer.folder):
            writer.files.make_folder(writer.folder)
        writer = replace(writer, plan=replace(writer.plan, libraries=writer._agree_on_plan()))
        writer._clean()
        return writer

    def missing(self, among: Iterable[int] | None = None) -> tuple[int, ...]:
        """Numbers of the shards that are not published, `among` these or all; the published ones are read and verified.

        Raises:
            StoreError: a published shard is damaged or of another capture.
        """
        numbers = range(len(self.plan.shards)) if among is None else among
        return tuple(number for number in numbers if not self._published(number, thorough=True))

    def write(self, number: int, entries: Iterable[Entry]) -> None:
        """Writes and publishes a shard: exactly its planned sequences, in their order; nothing where it is there already.

        Raises:
            StoreError: another process writes this shard; an answer that cannot be one to its sequence; a full disk.
        """
        path = self._path(number)
        with alone(self.files, path, _SHARD_PATIENCE):
            if not self._published(number, thorough=False):
                write_shard(self.files, path, self.plan.layout, self.plan.digest(), number, self.plan.shards[number], entries)

    def publish(self) -> Manifest:
        """Writes the manifest over all shards, or finds that it is there. Only then is the folder a store.

        Raises:
            StoreError: a shard is missing.
        """
        shards = []
        for number in range(len(self.plan.shards)):
            if not self._published(number, thorough=False):
                raise StoreError(
                    f"{self._path(number)}: not captured yet", "Run `speckd cache` again: it makes what is missing"
                )
            shards.append(open_shard(self.files, self._path(number)))
        manifest = Manifest.of(self.plan, shards)
        data, path = document(manifest.content()), self.folder / MANIFEST
        with alone(self.files, path, _PATIENCE):
            if not self._holds(path, data):
                publish(self.files, path, [data])
        self._clean()
        return manifest

    def _agree_on_plan(self) -> dict[str, str]:
        """The libraries that the capture was begun with."""
        path, wanted = self.folder / PLAN, self.plan.content()
        if not exists(self.files, path):
            with alone(self.files, path, _PATIENCE):
                if not exists(self.files, path):
                    publish(self.files, path, [document({**wanted, LIBRARIES: dict(self.plan.libraries)})])
        kept = read_document(self.files, path)
        begun_with: dict[str, str] = kept.pop(LIBRARIES, {})
        changed = list(differences(kept, as_json(wanted)))
        if changed:
            raise StoreError(
                f"{self.folder}: it holds another capture: {'; '.join(changed[:3])}",
                "Give another folder, or delete this one to capture anew",
            )
        others = list(differences(begun_with, self.plan.libraries))
        if others:
            logger.warning("%s: it was begun with other libraries: %s.", self.folder, "; ".join(others))
        return begun_with

    def _published(self, number: int, thorough: bool) -> bool:
        path = self._path(number)
        if not exists(self.files, path):
            return False
        shard = open_shard(self.files, path)
        _require_place(shard, number, self.plan.digest(), self.plan.layout)
        if thorough:
            shard.verify(self.files)
        return True

    def _clean(self) -> None:
        """Removes what killed writers left, and nothing of those alive."""
        with named(self.folder):
            names = self.files.names(self.folder)
        ours = {PLAN, MANIFEST, *(shard_name(number) for number in range(len(self.plan.shards)))}
        left = {name.removesuffix(suffix) for suffix in (PARTIAL, ".lock") for name in names if name.endswith(suffix)}
        for name in sorted(left & ours):
            try:
                with alone(self.files, self.folder / name, patience=0):
                    pass
            except StoreError:
                continue  # somebody is at it

    def _holds(self, path: Path, data: bytes) -> bool:
        with named(path):
            return (
                self.files.exists(path) and self.files.size(path) == len(data) and self.files.read(path, 0, len(data)) == data
            )

    def _path(self, number: int) -> Path:
        return self.folder / shard_name(number)


@dataclass(frozen=True)
class Store:
    """A published folder, opened for reading: by any number of processes.

    `prefixes`: [sequences] the first eight bytes of the keys, sorted; `places`: [sequences, 2] shard and record of each.
    """

    folder: Path
    manifest: Manifest
    shards: tuple[Shard, ...]
    prefixes: npt.NDArray[np.uint64]
    places: npt.NDArray[np.int64]
    files: Files

    @classmethod
    def open(cls, folder: Path, files: Files | None = None) -> "Store":
        """Checks the manifest, and of each shard its size, header, index and footer; records are checked when they are read.

        Raises:
            StoreError: no finished capture, or a damaged one: the file is named.
        """
        folder, files = Path(folder), files or Files()
        path = folder / MANIFEST
        if not exists(files, path):
            begun = exists(files, folder / PLAN)
            raise StoreError(
                f"{folder}: {'a capture that is not finished' if begun else 'no cached teacher'} (there is no {MANIFEST})",
                "Run `speckd cache` with this configuration" + (" again: it makes what is missing" if begun else ""),
            )
        manifest = read_manifest(files, path)
        shards = tuple(_opened(files, folder, manifest, number) for number in range(len(manifest.shards)))
        if sum((shard.totals for shard in shards), Totals()) != manifest.totals:
            raise StoreError(f"{path}: its totals are not those of its shards", _FIX)
        keys = np.concatenate([np.empty(0, "V16"), *(shard.index["key"] for shard in shards)])
        prefixes = np.frombuffer(keys.tobytes(), dtype="<u8")[::2]
        order = np.argsort(prefixes, kind="stable")
        lengths = [len(shard.index) for shard in shards]
        records = np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(length) for length in lengths)])
        places = np.stack([np.repeat(np.arange(len(shards)), lengths), records], -1)
        return cls(folder, manifest, shards, prefixes[order], places[order], files)

    @property
    def layout(self) -> Layout:
        return self.manifest.layout

    @property
    def totals(self) -> Totals:
        return self.manifest.totals

    def __len__(self) -> int:
        return self.totals.sequences

    def bytes_per_token(self) -> float:
        """Of all shards, by answered position; 0 where there is none."""
        return self.totals.size / self.totals.answers if self.totals.answers else 0.0

    def require(self, fields: Provenance) -> None:
        """Refuses a cache of something else than the run needs. Only what is given is compared.

        Args:
            fields: what must be as it was at the capture: of its provenance, and of its layout by the names of the settings.

        Raises:
            StoreError: naming the field, both values and the fix.
        """
        kept = {**self.manifest.provenance, **self.layout.settings}
        wrong = list(differences({field: kept[field] for field in fields if field in kept}, as_json(fields)))
        if wrong:
            raise StoreError(
                f"{self.folder}: the cached teacher is not this run's: {'; '.join(wrong)}",
                "Set the run as the cache was made, or run `speckd cache` with this configuration into another folder",
            )

    def __contains__(self, token_ids: Tensor) -> bool:
        return self._find(sequence_key(token_ids)) is not None

    def positions(self, token_ids: Tensor) -> Tensor | None:
        """[n] int64, ascending: where this very sequence, [T], is answered; None where it is not there.

        Reads no answer, and so notices no damage to one.

        Raises:
            StoreError: a record that is none.
        """
        place = self._find(sequence_key(token_ids))
        if place is None:
            return None
        with self._named(place):
            size = beginning_size(len(token_ids), self.layout)
            beginning = self.shards[place[0]].beginning(self.files, place[1], size)
            return positions_in(beginning, token_ids, self.layout)

    def answer(self, token_ids: Tensor, positions: Tensor | None = None) -> Answer:
        """The teacher's answers to this very sequence, [T], at these positions (all that there are by default).

        Raises:
            StoreError: a sequence or a position that was not captured, or a damaged record.
        """
        place = self._find(sequence_key(token_ids))
        if place is None:
            raise StoreError(
                f"{self.folder}: a sequence of {len(token_ids)} tokens that is trained on is not in the cache",
                "Run `speckd cache` with this configuration: data, template or truncation have changed",
            )
        record = self.shards[place[0]].record(self.files, place[1])
        with self._named(place):
            return decode(record, token_ids, self.layout, positions)

    def verify(self) -> None:
        """Reads every byte.

        Raises:
            StoreError: naming the file that is damaged.
        """
        if read_manifest(self.files, self.folder / MANIFEST) != self.manifest:
            raise StoreError(f"{self.folder / MANIFEST}: it was replaced while it was open", "Open the cache again")
        for shard in self.shards:
            shard.verify(self.files)

    @contextmanager
    def _named(self, place: tuple[int, int]) -> Iterator[None]:
        """What is wrong with a record is said with its shard."""
        try:
            yield
        except StoreError as error:
            path = self.shards[place[0]].path
            raise StoreError(f"{path}: record {place[1]}: {error.what}", error.fix) from None

    def _find(self, key: bytes) -> tuple[int, int] | None:
        wanted = np.frombuffer(key, dtype="<u8")[0]
        at = int(np.searchsorted(self.prefixes, wanted))
        while at < len(self.prefixes) and self.prefixes[at] == wanted:
            shard, record = (int(number) for number in self.places[at])
            if self.shards[shard].index["key"][record].tobytes() == key:
                return shard, record
            at += 1
        return None


def _opened(files: Files, folder: Path, manifest: Manifest, number: int) -> Shard:
    expected = manifest.shards[number]
    path = folder / shard_name(number)
    if expected["name"] != path.name:
        raise StoreError(f"{folder / MANIFEST}: shard {number} is called {expected['name']}", _FIX)
    if not exists(files, path):
        raise StoreError(f"{path}: there is no such file", _RESUME)
    shard = open_shard(files, path)
    _require_place(shard, number, bytes.fromhex(manifest.plan), manifest.layout)
    if shard.totals.size != expected["bytes"] or shard.digest.hex() != expected["digest"]:
        raise StoreError(
            f"{path}: intact, but not the one that the manifest names",
            f"Delete {folder / MANIFEST} and run `speckd cache` again: it writes a new one over the shards that are there",
        )
    return shard


def _require_place(shard: Shard, number: int, made_by: bytes, layout: Layout) -> None:
    if shard.plan != made_by or shard.layout != layout:
        raise StoreError(f"{shard.path}: intact, but of another capture", _FIX)
    if shard.number != number:
        raise StoreError(f"{shard.path}: intact, but it is shard {shard.number} under another's name", _FIX)
