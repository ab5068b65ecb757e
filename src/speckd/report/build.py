"""From folders to a report: told apart, read, drawn, and put in place at once or not at all."""

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from speckd.errors import ConfigError, DataError
from speckd.evaluation.finished import Evaluation, is_evaluation, read_evaluation
from speckd.report.benches import Bench, is_bench, read_bench
from speckd.report.charts import Chart
from speckd.report.page import GENERATOR, Sources, figures_of, render, template
from speckd.report.runs import CONFIG, Run, is_run, read_run
from speckd.report.shown import Shown, secrets_of, secrets_of_environment

logger = logging.getLogger(__name__)

PAGE = "report.html"


def report(folders: Sequence[Path], output: Path) -> Path:
    """Writes the report of some folders; returns the page.

    Raises:
        DataError: a folder is none of ours, or a file in it is damaged.
        ConfigError: the output folder holds something else than a report.
    """
    _require_free(output, folders)
    sources = read(folders)
    everything: list[Run | Evaluation | Bench] = [*sources.runs, *sources.evaluations, *sources.benches]
    for one in everything:
        if not one.finished:
            logger.info("%s: %s", one.name, one.notes[0])
    shown = Shown(_secrets(sources))
    figures = figures_of(sources, shown)
    page = render(template(shown), sources, figures)
    _put(output, page, figures)
    return output / PAGE


def read(folders: Sequence[Path]) -> Sources:
    """Each by what lies in it."""
    found: list[Run | Evaluation | Bench] = []
    for folder, name in zip(folders, _names(folders), strict=True):
        if not folder.is_dir():
            raise DataError(f"{folder}: there is no such folder", "Give folders that train, evaluate or bench wrote")
        if is_evaluation(folder):
            found.append(read_evaluation(folder, name))
        elif is_run(folder):
            found.append(read_run(folder, name))
        elif is_bench(folder):
            found.append(read_bench(folder, name))
        else:
            what = "no training_log.jsonl, evaluation.json or results.jsonl in it"
            begun = " yet: nothing was logged" if (folder / CONFIG).is_file() else ""
            raise DataError(f"{folder}: {what}{begun}", "Give folders that train, evaluate or bench wrote")
    return Sources(
        tuple(one for one in found if isinstance(one, Run)),
        tuple(one for one in found if isinstance(one, Evaluation)),
        tuple(one for one in found if isinstance(one, Bench)),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of their paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("a folder is given twice", "Give each once")


def _secrets(sources: Sources) -> set[str]:
    """What is to be hidden wherever it stands."""
    found = secrets_of_environment()
    for run in sources.runs:
        found |= secrets_of(run.settings) | secrets_of(run.data) | secrets_of(run.environment)
    for one in sources.evaluations:
        found |= secrets_of(one.settings) | secrets_of(one.environment) | secrets_of(one.model) | secrets_of(one.teacher)
    return found


def _require_free(output: Path, folders: Sequence[Path]) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir: {output} is a file", "Choose a folder")
    blocking = next((p for p in output.parents if p.exists() and not p.is_dir()), None)
    if blocking is not None:
        raise ConfigError(f"output_dir: {blocking} is a file, so there can be no {output}", "Choose another folder")
    if output.exists() and any(output.iterdir()) and not _is_ours(output):
        raise ConfigError(f"output_dir: {output} exists and is no report", "Choose a new or empty folder")


def _is_ours(output: Path) -> bool:
    """A page of ours and pictures, and nothing that somebody would miss."""
    page = output / PAGE
    if not page.is_file() or any(path.name != PAGE and path.suffix != ".png" for path in output.iterdir()):
        return False
    with page.open(encoding="utf-8", errors="replace") as file:
        return f'<meta name="generator" content="{GENERATOR}' in file.read(4096)


def _put(output: Path, page: str, figures: Sequence[Chart]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        for picture in (picture for chart in figures for picture in chart.pictures):
            (unfinished / picture.file).write_bytes(picture.light)
        (unfinished / PAGE).write_text(page, encoding="utf-8")
        os.chmod(unfinished, 0o755)
        old = unfinished.with_name(f"{unfinished.name}-old")
        if output.exists():
            output.rename(old)
        unfinished.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
