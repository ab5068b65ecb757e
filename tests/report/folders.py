"""Folders as train, evaluate and bench write them, made up; every text in them goes through a function of the test."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[str], str]
WORDS = ("Paris", " is", " the", " capital", " of", " France", ".")


def png(shade: int = 200) -> bytes:
    """A picture of one grey point."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes([0, shade]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def as_is(text: str) -> str:
    return text


def in_a_name(text: str) -> str:
    """Without what a file's name cannot hold."""
    kept = "".join(letter for letter in text if letter not in "/\0" and not 0xD800 <= ord(letter) <= 0xDFFF)
    return kept.encode()[:180].decode("utf-8", "ignore")


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def log_of_training(change: Change = as_is, bend: float = 0.0) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.0, "eval_nll": 4.0, "eval_tar": 0.125, "epoch": 0}]
    for step in range(5, 45, 5):
        rate = step / 50 + bend
        ranges = {f"tar_by_position/{name}": rate for name in ("0_to_1", "1_to_4", "256_up", change("odd"))}
        entropies = {f"tar_by_teacher_entropy/{name}": rate for name in ("0_to_0.1", "0.1_to_0.5", "4_up")}
        outcomes = {"divergence": 2 - rate, "divergence_accepted": 1 - rate / 2, "divergence_rejected": 3 - rate}
        entries.append({"step": step, "loss": 3 - rate, "tar": rate, **outcomes, **ranges, **entropies})
    return [*entries, {"step": 40, "eval_loss": 1.5, "eval_nll": 2.0625 + bend, "eval_tar": 0.75, "epoch": 1}]


def token_lines(change: Change = as_is) -> list[dict[str, Any]]:
    found = []
    for step in (0, 40):
        tokens: list[dict[str, Any]] = [{"position": 0, "id": 1, "text": change("Ask: "), "supervised": False}]
        for place, word in enumerate(WORDS, 1):
            acceptance = (0.0, 1.0, 0.25, 0.75, None)[place % 5]
            tokens.append(
                {
                    "position": place,
                    "id": place,
                    "text": change(word),
                    "supervised": True,
                    "proposal": 9,
                    "token_text": change(word.strip()),
                    "proposal_text": change("Rome"),
                    "p_label": 0.1234567,
                    "q_label": 0.25,
                    "p_proposal": None if place == 2 else 0.03125,
                    "q_proposal": 0.515625,
                    "acceptance": acceptance,
                    "weight": acceptance,
                    "fallback_weight": 0.0,
                    "divergence": 1.71875,
                    "kl": 1.65625,
                    "entropy": 0.84375,
                    "favourites": [[1, change("Paris"), 0.625], [2, change("Lyon"), 0.0625]],
                }
            )
        facts = {"format": 1, "row": 3, "data": change("held out"), "task": change("facts"), "length": 8, "teacher_top_k": 5}
        found.append({"step": step, **facts, "gate": change("1[p > q]"), "ranked_among": None, "tokens": tokens})
    return found


def write_run(folder: Path, change: Change = as_is, seed: int = 0, bend: float = 0.0, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    _lines(folder / "training_log.jsonl", log_of_training(change, bend))
    _lines(folder / "tokens.jsonl", token_lines(change))
    measures = {"nll": 2.0, "kl": 1.0, "tar": 0.5, "tar_micro": 0.5, "sequences": 4, "tokens": 28.0}
    of_task = [{"step": step, "task": change(name), **measures} for step in (0, 40) for name in ("facts", "sums")]
    _lines(folder / "by_task.jsonl", of_task)
    given = {
        "gate": change("top_k"),
        "learning_rate": 0.001,
        "model_name_or_path": change("student"),
        change("odd_setting"): change("odd"),
        "gate_options": {change("verify"): [change("deep"), 5]},
        "seed": seed,
        "output_dir": str(folder.name),
    }
    results = {
        "start": {"nll": 4.0, "kl": 3.0, "tar": 0.125},
        "end": {"nll": 2.0625 + bend, "kl": 1.3125 + bend, "tar": 0.75, "tokens": 916.0},
        "steps": 40,
        "processes": 1,
        "data": {"train": change("train.jsonl"), "rows": 1200, change("odd fact"): change("odd")},
        "settings": {**given, **settings},
        "warnings": [change("STARVATION")],
        "versions": {"torch": change("2.13"), change("odd"): change("1")},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def _metrics(change: Change, right: int) -> dict[str, Any]:
    """With all that is known of how each comes about; `accuracy` of ten examples, two answers each."""

    def made(value: float, of: str, columns: list[str], statistic: str = "ratio", **more: Any) -> dict[str, Any]:
        ends = {"low": max(0.0, value - 0.3), "high": value + 0.3}
        return {"value": value, **ends, "of": change(of), "n": 10, "statistic": statistic, "columns": columns, **more}

    return {
        change("accuracy"): made(right / 10, "completions", [change("right"), "completions"]),
        change("pass@1"): made(right / 10, "problems", [change("right"), "completions"], k=1),
        change("ece"): made(0.5, "tokens", ["tokens", "bins.0", "bins.1"], "calibration_error"),
        change("seconds"): made(right + 1.0, "prompts", ["seconds"], "median"),
    }


def _examples(change: Change, right: int) -> list[dict[str, Any]]:
    """Ten rows, the first a conversation, each answered twice; the first `right` rows are right both times."""
    return [
        {
            "index": row,
            "turn": turn,
            "key": change(f"k{row}"),
            "prompt": [{"role": "user", "content": change("Where?")}] if row == 0 else change("What is its capital?"),
            "completion": change("It is Paris." if row < right else "It is Rome."),
            "reference": change("Paris"),
            "scores": {change("right"): row < right, "tokens": 4, "bins": [1.0, row / 8], "seconds": right + 1.0, "none": None},
            "truncated": row == 9,
            "tokens": 4,
        }
        for row in range(10)
        for turn in (0, 1)
    ]


def write_evaluation(folder: Path, change: Change = as_is, right: int = 4) -> Path:
    """One task, `right` of its ten rows right."""
    (folder / "examples").mkdir(parents=True)
    (folder / "plan.json").write_text("{}")
    task = in_a_name(change("facts"))[:100]
    _lines(folder / "examples" / f"{task}.jsonl", _examples(change, right))
    parameters = {"weights": change("ab12"), "parameters": 1000, "dtype": change("float32")}
    whole = {
        "speckd": "0.1.0",
        "model": {"path": change("models/student"), **parameters},
        "teacher": {"path": change("models/teacher"), **parameters},
        "settings": {change("temperature"): change("0")},
        "environment": {change("torch"): change("2.13")},
        "tasks": {
            task: {
                "kind": change("answers"),
                "data": {"file": change("facts.jsonl"), "sha256": change("cd34"), "rows": 10},
                "options": {"kind": change("answers"), change("stop"): [change("end")], "samples": 2},
                "n": 10,
                "metrics": _metrics(change, right),
                "counts": {"completions": 20, "truncated": 2},
            }
        },
    }
    (folder / "evaluation.json").write_text(json.dumps(whole))
    return folder


def write_bench(folder: Path, change: Change = as_is) -> Path:
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / f"{'ab' * 10}.json").write_text("{}")
    cell = {"block": change("dose"), "start": "warm", "teacher": "clean", "data": "data", "method": change("speckd")}
    _lines(folder / "results.jsonl", [{"cell": cell, "seed": s, "seconds": 90.0, "measures": {"nll": 2.0}} for s in (0, 1)])
    name = change("method").replace("\n", " ").replace("\r", " ").replace("|", "\\|")
    table = f"| {name} | NLL | KL |\n|---|---|---|\n| {name} | 2.000 ±0.125 | **-0.250** [-0.500, -0.125]* |\n"
    parts = (f"NLL of {name};\n**bold**: clear.\n", "## dose", name, table, f"### warm, {name}", f"{table}\nWorse: {name}.\n")
    (folder / "tables.md").write_text("\n\n".join(parts), encoding="utf-8", errors="replace")
    for picture in ("front-dose", in_a_name(change("curve"))[:120]):
        (folder / f"{picture}.png").write_bytes(png())
    return folder


def write_all(place: Path, change: Change = as_is) -> list[Path]:
    """Three runs of two methods, two evaluations and a benchmark."""

    def named(name: str) -> Path:
        return place / f"{name}{in_a_name(change('-folder'))}"

    return [
        write_run(named("a0"), change, seed=0),
        write_run(named("a1"), change, seed=1, bend=0.0625),
        write_run(named("b0"), change, seed=0, bend=0.1875, learning_rate=0.002),
        write_evaluation(named("e0"), change, right=4),
        write_evaluation(named("e1"), change, right=7),
        write_bench(named("bench"), change),
    ]
