"""What a store of answers is about, written down twice: as a plan before the first answer, as a manifest after the last."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from speckd.errors import StoreError
from speckd.teachers.codes import Rounding
from speckd.teachers.files import Files, read_all
from speckd.teachers.layout import Compression, Kind, Layout
from speckd.teachers.shard import Shard, Totals, digest

FORMAT = 1
PLAN, MANIFEST = "plan.json", "manifest.json"
LIBRARIES = "libraries"
Provenance: TypeAlias = Mapping[str, Any]


def shard_name(number: int) -> str:
    return f"shard-{number:05}.answers"


def document(content: Mapping[str, Any]) -> bytes:
    """The one way to write this content, with its digest in it."""
    named = {**content, "digest": digest(_canonical(content)).hex()}
    return _canonical(named)


def _canonical(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def read_document(files: Files, path: Path) -> dict[str, Any]:
    """What `document` wrote.

    Raises:
        StoreError: where a byte of it has changed.
    """
    data = read_all(files, path)
    try:
        content = json.loads(data)
        content.pop("digest")
        intact = document(content) == data
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        intact = False
    if not intact:
        raise StoreError(
            f"{path}: damaged (it does not match its own checksum)",
            "Delete this file and run the same command again: it makes what is missing",
        )
    if content.get("format") != FORMAT:
        raise StoreError(
            f"{path}: of format {content.get('format')}, not {FORMAT}", "Capture the teacher again with this speckd"
        )
    return dict(content)


@dataclass(frozen=True)
class Plan:
    """Which sequences a capture holds, how, and of what: the same for all processes that take part, and for a resumed one.

    `libraries`: versions by name that it was begun with; they are kept beside the plan, and a resumed one may have others.
    """

    layout: Layout
    provenance: Provenance
    shards: tuple[tuple[bytes, ...], ...]
    libraries: Mapping[str, str]

    def content(self) -> dict[str, Any]:
        shards = [{"sequences": len(keys), "keys": digest(b"".join(keys)).hex()} for keys in self.shards]
        return {"format": FORMAT, "layout": asdict(self.layout), "provenance": dict(self.provenance), "shards": shards}

    def digest(self) -> bytes:
        return digest(_canonical(self.content()))


def plan(layout: Layout, provenance: Provenance, shards: Sequence[Sequence[bytes]], libraries: Mapping[str, str]) -> Plan:
    """Raises ValueError where a sequence comes twice, and TypeError where the provenance is not JSON."""
    keys = tuple(tuple(shard) for shard in shards)
    every = [key for shard in keys for key in shard]
    if len(set(every)) != len(every):
        raise ValueError("a sequence is planned twice: plan each once, with all positions that any sample needs")
    return Plan(layout, as_json(provenance), keys, libraries)


def as_json(provenance: Provenance) -> dict[str, Any]:
    """As it will be read back."""
    read: dict[str, Any] = json.loads(json.dumps(dict(provenance), allow_nan=False))
    return read


def differences(
    kept: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "", sides: tuple[str, str] = ("there", "now")
) -> Iterator[str]:
    """`field is A there and B now`, for every field that is not the same. `sides`: the words for there and now."""
    absent = object()
    for field in sorted({*kept, *wanted}):
        old, new = kept.get(field, absent), wanted.get(field, absent)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{prefix}{field}.", sides)
        elif _canonical({"": None if old is absent else old}) != _canonical({"": None if new is absent else new}) or (
            (old is absent) != (new is absent)
        ):
            there = "absent" if old is absent else json.dumps(old)
            now = "absent" if new is absent else json.dumps(new)
            yield f"{prefix}{field} is {there} {sides[0]} and {now} {sides[1]}"


@dataclass(frozen=True)
class Manifest:
    """A whole store. `shards`: name, bytes and digest of each; `plan`: the digest of the plan that they were made by;
    `libraries`: as of it."""

    layout: Layout
    provenance: Provenance
    libraries: Mapping[str, str]
    plan: str
    shards: tuple[dict[str, Any], ...]
    totals: Totals

    @classmethod
    def of(cls, made_by: Plan, shards: Sequence[Shard]) -> "Manifest":
        named = tuple({"name": s.path.name, "bytes": s.totals.size, "digest": s.digest.hex()} for s in shards)
        totals = sum((shard.totals for shard in shards), Totals())
        return cls(made_by.layout, made_by.provenance, made_by.libraries, made_by.digest().hex(), named, totals)

    def content(self) -> dict[str, Any]:
        lost, several = self.totals.rounding, max(1, self.totals.rounding.entries)
        return {
            "format": FORMAT,
            "layout": asdict(self.layout),
            "provenance": dict(self.provenance),
            LIBRARIES: dict(self.libraries),
            "plan": self.plan,
            "shards": list(self.shards),
            "totals": asdict(self.totals),
            "rounding": {
                "max_absolute_error_of_log_probs": lost.max_log_prob,
                "mean_absolute_error_of_log_probs": lost.sum_log_prob / several,
                "max_absolute_error_of_probs": lost.max_prob,
                "mean_absolute_error_of_probs": lost.sum_prob / several,
            },
        }


def read_manifest(files: Files, path: Path) -> Manifest:
    content = read_document(files, path)
    try:
        layout = dict(content["layout"])
        layout |= {"kind": Kind(layout["kind"]), "compression": Compression(layout["compression"])}
        totals = dict(content["totals"])
        totals |= {"rounding": Rounding(**totals["rounding"])}
        made_by = content["provenance"], content[LIBRARIES], content["plan"]
        return Manifest(Layout(**layout), *made_by, tuple(content["shards"]), Totals(**totals))
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: not a manifest of this speckd ({error})", "Capture the teacher again") from None
