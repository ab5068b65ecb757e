"""`speckd bench PLAN --output_dir OUT`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from speckd.bench import pictures, tables
from speckd.bench.plan import Plan
from speckd.bench.reading import read_plan
from speckd.bench.runner import Found, Outcome, run_all
from speckd.errors import ConfigError, SpeckdError


def bench(path: Path, output_dir: Path, workers: int) -> None:
    """Runs a plan, or goes on with it, and writes what it found: `results.jsonl`, `tables.md`, pictures.

    Raises:
        ConfigError: the plan, or its folder, is wrong.
        SpeckdError: some runs failed; what was written is of the others, and says so.
    """
    plan = read_plan(path)
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"{output_dir} is a file", "Name a folder with --output_dir")
    console = Console()
    outcome = run_all(plan, output_dir, workers, console)
    write(plan, outcome, output_dir)
    console.print(f"Tables: {output_dir / 'tables.md'}; every run: {output_dir / 'results.jsonl'}; pictures beside them.")
    if outcome.failed:
        raise SpeckdError(
            f"{len(outcome.failed)} runs failed and are missing there, first {outcome.failed[0]}",
            "The same command tries them again",
        )


def write(plan: Plan, outcome: Outcome, output_dir: Path) -> None:
    lines = [json.dumps(_line(one)) for one in outcome.found]
    _replace(output_dir / "results.jsonl", "".join(f"{line}\n" for line in lines))
    _replace(output_dir / "tables.md", tables.markdown(plan, outcome))
    pictures.draw_all(plan, outcome.found, output_dir)


def _line(one: Found) -> dict[str, Any]:
    known = asdict(one)
    return known | known.pop("outcome")


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text)
    unfinished.rename(path)
