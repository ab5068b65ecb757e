"""A task's answers on disk as they come: killed in the middle, the same command ends with the same bytes."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speckd.errors import StoreError
from speckd.evaluation.items import Item, Record
from speckd.teachers.files import Files, named, publish

Line = Mapping[str, Any]


def encoded(line: Line) -> bytes:
    return (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What stands there; a last line without an end is what a killed process left, and nothing.

    Raises:
        StoreError: another line is damaged.
    """
    if not path.exists():
        return []
    with named(path):
        whole = path.read_bytes().split(b"\n")[:-1]
    found = []
    for number, line in enumerate(whole, 1):
        try:
            found.append(json.loads(line))
            found[-1]["index"], found[-1]["turn"], found[-1]["key"], found[-1]["scores"]
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"{path}:{number}: damaged", "Remove the file: the same command makes it anew") from None
    return found


def batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Items of about equal length together, the longest first; the same at any resume."""
    order = sorted(items, key=lambda item: (-len(item.ids), item.row.number, item.turn))
    return [order[start : start + size] for start in range(0, len(order), size)]


def answered(
    path: Path, cut: Sequence[Sequence[Item]], answer: Callable[[Sequence[Item]], list[Record]], done: Callable[[int], None]
) -> list[dict[str, Any]]:
    """All lines, by row and turn, those that are missing made now.

    A batch is written in one piece; one of which a line is missing is made again as a whole, so that what a model says in a
    batch does not depend on when a run was killed.

    Args:
        done: told how many items each batch has, when it is there.
    """
    kept = {(line["index"], line["turn"]): line for line in read_lines(path)}
    in_order = list(kept) == sorted(kept)
    missing = [batch for batch in cut if any(_name(item) not in kept for item in batch)]
    for batch in missing:
        for item in batch:
            kept.pop(_name(item), None)
    if missing:
        _publish(path, [kept[name] for name in sorted(kept)])
    done(sum(map(len, cut)) - sum(map(len, missing)))
    for batch in missing:
        lines = [record.line() for record in answer(batch)]
        _append(path, b"".join(map(encoded, lines)))
        kept |= {(line["index"], line["turn"]): line for line in lines}
        done(len(batch))
    ordered = [json.loads(encoded(kept[name])) for name in sorted(kept)]
    if missing or not in_order:
        _publish(path, ordered)
    return ordered


def _name(item: Item) -> tuple[int, int]:
    return item.row.number, item.turn


def _append(path: Path, data: bytes) -> None:
    with named(path), path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _publish(path: Path, lines: Sequence[Line]) -> None:
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, (encoded(line) for line in lines))


def replace(path: Path, content: Iterator[bytes]) -> None:
    """A file that is there wholly or not at all, in the place of what was there."""
    files = Files()
    files.remove(path.with_name(f"{path.name}.partial"))
    publish(files, path, content)
