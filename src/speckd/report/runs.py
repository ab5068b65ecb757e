"""A folder that `speckd train` wrote, finished or not, as data."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speckd.checked_files import Fields, read_lines, read_object, read_yaml
from speckd.step_lines import BY_TASK, TOKENS, TOKENS_FORMAT

LOG, RESULTS, CONFIG = "training_log.jsonl", "results.json", "config.yaml"
#: Settings in which runs of one method may differ.
_NOT_OF_THE_METHOD = {
    *("seed", "data_seed", "gate_seed", "output_dir", "run_name", "overwrite_output_dir", "resume_from_checkpoint"),
    *("allow_changed_config", "logging_dir", "disable_tqdm", "report_to", "token_view_samples", "log_completions"),
}


@dataclass(frozen=True)
class Favourite:
    """One of the teacher's most probable tokens."""

    text: str
    probability: float | None


@dataclass(frozen=True)
class Token:
    """One token of a sample; what follows `supervised` is None where it is not supervised, or not known.

    `text`: what the token adds to the text; `alone`: it by itself, as `proposal`, the student's most probable one; p is the
    teacher's probability, q the student's; `weight` is that of the divergence; `divergence` the objective's own, `kl`
    KL(teacher ‖ student), `entropy` the teacher's, in nats.
    """

    text: str
    position: int
    supervised: bool
    alone: str | None = None
    proposal: str | None = None
    p_label: float | None = None
    q_label: float | None = None
    p_proposal: float | None = None
    q_proposal: float | None = None
    acceptance: float | None = None
    weight: float | None = None
    fallback_weight: float | None = None
    divergence: float | None = None
    kl: float | None = None
    entropy: float | None = None
    favourites: tuple[Favourite, ...] = ()


@dataclass(frozen=True)
class TokenSample:
    """A sample at one step. `row`: of the data, from 1; `gate`: its rule, None of SFT; `ranked_among`: of how many tokens a
    gate that ranks chose; `top_k`: of a teacher that gives no more."""

    step: int
    row: int
    data: str
    task: str | None
    length: int
    gate: str | None
    ranked_among: int | None
    top_k: int | None
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class TaskMeasures:
    """Held-out measures of one task at one step."""

    step: int
    task: str
    measures: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """One training.

    `name`: unique in a report; `log`: every logged line, `step` among its numbers; `start`, `end`: held-out measures before and
    after, empty where nothing was held out or the run has not finished; `notes`: what is missing or cut off, a line each.
    """

    name: str
    finished: bool
    log: tuple[Mapping[str, float], ...]
    start: Mapping[str, float]
    end: Mapping[str, float]
    steps: int
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    warnings: tuple[str, ...]
    by_task: tuple[TaskMeasures, ...]
    samples: tuple[TokenSample, ...]
    notes: tuple[str, ...]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of what was logged under this name; of a step that was logged twice, the last."""
        found = {entry["step"]: entry[key] for entry in self.log if key in entry}
        return list(found), list(found.values())

    @property
    def method(self) -> tuple[tuple[str, str], ...]:
        """All settings but those that make repetitions of one method: equal where two runs repeat one."""
        return tuple(sorted((k, repr(v)) for k, v in self.settings.items() if k not in _NOT_OF_THE_METHOD))


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (LOG, RESULTS))


def read_run(folder: Path, name: str) -> Run:
    """Raises DataError where a file is damaged; what is not there yet is noted."""
    notes: list[str] = []
    log = _lines(folder / LOG, notes)
    results = read_object(folder / RESULTS) if (folder / RESULTS).is_file() else Fields({}, str(folder / RESULTS))
    if not results.values:
        notes.insert(0, "This run has not finished: there is no results.json. What follows is as far as it came.")
    settings = results.maybe_object("settings").values
    if not settings and (folder / CONFIG).is_file():
        settings = read_yaml(folder / CONFIG).values
    samples = tuple(map(_sample, _lines(folder / TOKENS, notes)))
    if not samples:
        notes.append(
            "There is no record of single tokens (tokens.jsonl): the run had no teacher (SFT), token_view_samples was 0, or it "
            "was made by an earlier version."
        )
    entries = tuple({"step": float(entry.whole("step")), **entry.numbers()} for entry in log)
    environment = dict(results.maybe_object("versions").values)
    if "processes" in results.values:
        environment["processes"] = results.whole("processes")
    return Run(
        name=name,
        finished=bool(results.values),
        log=entries,
        start=results.maybe_object("start").numbers(),
        end=results.maybe_object("end").numbers(),
        steps=results.whole("steps") if results.values else int(max((entry["step"] for entry in entries), default=0)),
        settings=settings,
        data=results.maybe_object("data").values,
        environment=environment,
        warnings=tuple(results.texts("warnings")),
        by_task=tuple(_of_task(line) for line in _lines(folder / BY_TASK, notes)),
        samples=samples,
        notes=tuple(notes),
    )


def _lines(path: Path, notes: list[str]) -> list[Fields]:
    if not path.is_file():
        return []
    found, note = read_lines(path)
    notes += [note] if note else []
    return found


def _of_task(line: Fields) -> TaskMeasures:
    numbers = {key: value for key, value in line.numbers().items() if key != "step"}
    return TaskMeasures(line.whole("step"), line.text("task"), numbers)


def _sample(line: Fields) -> TokenSample:
    version = line.whole("format")
    if version != TOKENS_FORMAT:
        line = Fields({**line.values, "format": None}, f"{line.where}: format {version} is unknown to this version of speckd")
        line.whole("format")
    return TokenSample(
        step=line.whole("step"),
        row=line.whole("row"),
        data=line.text("data"),
        task=line.maybe_text("task"),
        length=line.whole("length"),
        gate=line.maybe_text("gate"),
        ranked_among=line.maybe_whole("ranked_among"),
        top_k=line.maybe_whole("teacher_top_k"),
        tokens=tuple(map(_token, line.objects("tokens"))),
    )


_NUMBERS = (
    *("p_label", "q_label", "p_proposal", "q_proposal", "acceptance", "weight", "fallback_weight"),
    *("divergence", "kl", "entropy"),
)


def _token(line: Fields) -> Token:
    known = (line.text("text"), line.whole("position"), line.truth("supervised"))
    if not line.truth("supervised"):
        return Token(*known)
    numbers: Any = {name: line.maybe_number(name) for name in _NUMBERS}
    alone, proposal = (line.maybe_text(f"{name}_text") for name in ("token", "proposal"))
    return replace(Token(*known, alone, proposal, favourites=_favourites(line)), **numbers)


def _favourites(line: Fields) -> tuple[Favourite, ...]:
    """Each [id, text, probability]."""
    given = line.values.get("favourites")
    if given is None:
        return ()
    shaped = {"favourites": [dict(zip(("id", "text", "p"), one, strict=False)) for one in given if isinstance(one, list)]}
    return tuple(Favourite(one.text("text"), one.maybe_number("p")) for one in Fields(shaped, line.where).objects("favourites"))


def range_label(key: str) -> str:
    """`tar_by_position/4_to_16` -> 4–15 (of whole numbers), `…/0.5_to_1` -> 0.5–1, `…/256_up` -> 256 and more."""
    ends = re.fullmatch(r"[^/]+/([\d.]+)_(?:to_([\d.]+)|up)", key)
    if ends is None:
        return key
    low, top = ends.groups()
    if top is None:
        return f"{low} and more"
    if key.startswith("tar_by_position"):
        return low if int(top) - int(low) == 1 else f"{low}–{int(top) - 1}"
    return f"{low}–{top}"
