"""Files of JSON lines that hold what was found at some steps of a run: what is written again replaces what stood there."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Of a run: some samples token by token (`token_record`), and held-out measures of each task (`by_task`).
TOKENS, BY_TASK = "tokens.jsonl", "by_task.jsonl"
#: Of TOKENS.
TOKENS_FORMAT = 1


def write_of_step(path: Path, step: int, lines: Iterable[Mapping[str, Any]]) -> None:
    """Adds a step's lines, which all get its number as `step`; whole or not at all."""
    kept = [line for line in _whole_lines(path) if line["step"] != step]
    text = "".join(json.dumps({**line}, allow_nan=False) + "\n" for line in [*kept, *({"step": step, **one} for one in lines)])
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """What is no such line is left out, so that a damaged file ends no training."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            one = json.loads(line)
        except ValueError:
            continue
        if isinstance(one, dict) and "step" in one:
            found.append(one)
    return found
