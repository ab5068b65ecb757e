"""Files that speckd wrote, read again: whole, of the expected types, or refused in one line that names the place."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from speckd.errors import DataError

#: Larger ones are no file of ours.
_MOST_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Fields:
    """An object of a file, with `where` it stands, for messages. What is asked for and missing is an error; `None` is allowed
    where the method says so."""

    values: Mapping[str, Any]
    where: str

    def text(self, key: str) -> str:
        return str(self._of(key, str))

    def maybe_text(self, key: str) -> str | None:
        return None if self.values.get(key) is None else self.text(key)

    def whole(self, key: str) -> int:
        return int(self._of(key, int))

    def maybe_whole(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.whole(key)

    def maybe_number(self, key: str) -> float | None:
        """None also where it is not finite."""
        if self.values.get(key) is None:
            return None
        value = float(self._of(key, (int, float)))
        return value if math.isfinite(value) else None

    def truth(self, key: str) -> bool:
        if not isinstance(self.values.get(key), bool):
            raise self._wrong(key, "true or false")
        return bool(self.values[key])

    def object(self, key: str) -> "Fields":
        return Fields(self._of(key, dict), f"{self.where}: {key}")

    def maybe_object(self, key: str) -> "Fields":
        """Empty where there is none."""
        return Fields({}, f"{self.where}: {key}") if self.values.get(key) is None else self.object(key)

    def objects(self, key: str) -> list["Fields"]:
        return [as_fields(one, f"{self.where}: {key}[{place}]") for place, one in enumerate(self._of(key, list))]

    def texts(self, key: str) -> list[str]:
        """Of a list that may be missing."""
        return [str(one) for one in self._of(key, list)] if self.values.get(key) is not None else []

    def numbers(self) -> dict[str, float]:
        """All of its values that are finite numbers."""
        known = {key: value for key, value in self.values.items() if isinstance(value, (int, float))}
        return {str(key): float(value) for key, value in known.items() if not isinstance(value, bool) and math.isfinite(value)}

    def _of(self, key: str, kind: Any) -> Any:
        value = self.values.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            names = {str: "a text", int: "a whole number", dict: "an object", list: "a list"}
            raise self._wrong(key, names.get(kind, "a number"))
        return value

    def _wrong(self, key: str, wanted: str) -> DataError:
        found = "missing" if key not in self.values else f"{self.values[key]!r:.60}"
        return DataError(f"{self.where}: {key} is {found}", f"It must be {wanted}: was the file changed?")


def as_fields(value: Any, where: str) -> Fields:
    if not isinstance(value, dict):
        raise DataError(f"{where}: not a JSON object", "Was the file changed?")
    return Fields(value, where)


def read_object(path: Path) -> Fields:
    """A file that is one JSON object, and is written at once."""
    try:
        return as_fields(json.loads(_text(path)), str(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})", "The file is damaged: make it again, or remove it") from None


def read_lines(path: Path) -> tuple[list[Fields], str | None]:
    """The objects of a file of JSON lines, and what is to be said of its end: a kill may have cut the last one in two."""
    lines = _text(path).split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(as_fields(json.loads(line), f"{path}:{number}"))
        except ValueError as error:
            if number == len(lines):  # without its line end
                return found, f"{path.name}: the last line is cut in two and left out"
            raise DataError(
                f"{path}:{number}: not JSON ({error})", "The file is damaged: make it again, or remove it"
            ) from None
    return found, None


def read_yaml(path: Path) -> Fields:
    try:
        values = yaml.safe_load(_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f"{path}:{line + 1}" if line is not None else str(path)
        raise DataError(f"{where}: not readable as YAML", "Correct it, or remove the file") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: not a list of 'key: value' lines", "Correct it, or remove the file")
    return Fields({str(key): value for key, value in values.items()}, str(path))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path}: larger than {_MOST_BYTES >> 20} MiB", "Give a folder that speckd wrote")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})", "The file is damaged: make it again, or remove it") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", "Check the file and its permissions") from None
    except RecursionError:
        raise DataError(f"{path}: nested too deep", "The file is damaged: make it again, or remove it") from None
