"""A file of JSON lines that several processes make in parts, and that a killed run goes on with: to the same bytes.

Each part is published whole or not at all, beside the file; when all are there the file and its manifest are, and the parts
are removed.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speckd import fingerprints
from speckd.errors import ConfigError, StoreError
from speckd.teachers.files import Files, alone, exists, publish, read_all
from speckd.teachers.manifest import as_json, differences, document, read_document

logger = logging.getLogger(__name__)

FORMAT = 1
_PATIENCE = 60.0  # seconds for what takes others a moment
_PART_PATIENCE = 2.0


def manifest_of(output: Path) -> Path:
    """What says how a file was made."""
    return output.with_name(f"{output.name}.manifest.json")


@dataclass(frozen=True)
class Parts:
    """`provenance`: everything that the lines depend on; `libraries`: versions by name, which a resumed run may have others of;
    `count`: of the parts."""

    output: Path
    provenance: Mapping[str, Any]
    libraries: Mapping[str, str]
    count: int
    files: Files

    @classmethod
    def open(
        cls,
        output: Path,
        provenance: Mapping[str, Any],
        libraries: Mapping[str, str],
        count: int,
        files: Files | None = None,
    ) -> "Parts":
        """Begins, or goes on with what was begun.

        Raises:
            ConfigError: what is there was made otherwise, naming the field, or by somebody else.
            StoreError: it is damaged, or cannot be written: the file is named.
        """
        parts = cls(output, as_json(provenance), dict(libraries), count, files or Files())
        if parts.finished:
            return parts
        if exists(parts.files, output) and not exists(parts.files, parts._plan):
            raise ConfigError(f"{output} is there, and was not begun by speckd write", "Choose another --output, or remove it")
        parts.files.make_folder(parts._folder)
        with alone(parts.files, parts._plan, _PATIENCE):
            if not exists(parts.files, parts._plan) or not parts._begun:
                publish(parts.files, parts._plan, [document(parts._content())])
        parts._require_same(read_document(parts.files, parts._plan), parts._plan)
        return parts

    @property
    def finished(self) -> bool:
        """Is the whole file there, as it was made?

        Raises:
            ConfigError, StoreError: one is there, but of something else, or changed since.
        """
        path = manifest_of(self.output)
        if not exists(self.files, path):
            return False
        made = read_document(self.files, path)
        self._require_same(made, path)
        if not exists(self.files, self.output) or fingerprints.of_bytes([read_all(self.files, self.output)]) != made["file"]:
            raise StoreError(f"{self.output}: not the file that its manifest is about", f"Remove {path.name} to write it anew")
        return True

    def missing(self, share: Iterable[int]) -> list[int]:
        """Of some parts, those still to be made."""
        return [number for number in share if not exists(self.files, self._part(number))]

    def write(self, number: int, records: Sequence[Mapping[str, Any]]) -> None:
        path = self._part(number)
        with alone(self.files, path, _PART_PATIENCE):
            if not exists(self.files, path):
                publish(self.files, path, [document({"format": FORMAT, "part": number, "records": list(records)})])

    def records(self) -> Iterator[dict[str, Any]]:
        """Of all parts, in their order."""
        for number in range(self.count):
            yield from read_document(self.files, self._part(number))["records"]

    def publish(self, rows: Iterable[Mapping[str, Any]], counts: Mapping[str, int]) -> None:
        """The file, its manifest, and then no parts any more."""
        lines = [(json.dumps(row, allow_nan=False) + "\n").encode() for row in rows]
        made = {**self._content(), "counts": dict(counts), "file": fingerprints.of_bytes([b"".join(lines)])}
        for path, content in ((self.output, lines), (manifest_of(self.output), [document(made)])):
            with alone(self.files, path, _PATIENCE):
                publish(self.files, path, content)
        self.discard()

    def discard(self) -> None:
        """Removes the parts."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _require_same(self, there: Mapping[str, Any], path: Path) -> None:
        wrong = list(differences(there["provenance"], self.provenance))
        if wrong:
            raise ConfigError(
                f"{path}: the text there was written otherwise: {'; '.join(wrong)}",
                f"Set it as it was, choose another --output, or remove {self._folder if path == self._plan else path}",
            )
        others = [f"{name} {there['libraries'].get(name)} (now {now})" for name, now in self.libraries.items()
                  if there["libraries"].get(name) != now]  # fmt: skip
        if others:
            logger.warning("%s: it was begun with other libraries: %s.", self.output, "; ".join(others))

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT, "provenance": self.provenance, "libraries": self.libraries, "parts": self.count}

    @property
    def _begun(self) -> bool:
        """Is there any part? A plan without one binds nobody."""
        return any(self._folder.glob("part-*.json"))

    @property
    def _folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.parts")

    @property
    def _plan(self) -> Path:
        return self._folder / "plan.json"

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:06}.json"
