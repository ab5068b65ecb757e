"""What is claimed for the gate, checked on students small enough to be exact (docs/theory.md).

    python -m benchmarks.theory --out runs/theory

About three minutes of one core, no GPU, the same numbers at every run. Writes results.json, tables.md and five pictures.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.theory import bounds, convergence, monotone, smoothness, variance
from benchmarks.theory.pictures import PICTURES
from benchmarks.theory.tables import TABLES
from rich.progress import Progress

PARTS: dict[str, Callable[[], Any]] = {
    "flow": monotone.flow,
    "counterexamples": monotone.counterexamples,
    "steps": monotone.steps,
    "gap": monotone.gap,
    "shared_example": monotone.shared_example,
    "linear_example": monotone.linear_example,
    "theorem_rate": monotone.theorem_rate,
    "bounds": bounds.check,
    "scatter": bounds.scatter,
    "certificate": bounds.certificate,
    "boundary_example": bounds.example,
    "starvation": convergence.starvation,
    "down_weight": convergence.down_weight,
    "label_fallback": convergence.label_fallback,
    "escape": convergence.escape,
    "fixed_points": convergence.fixed_points,
    "local_rates": convergence.local_rates,
    "self_keeping": convergence.self_keeping,
    "variance": variance.study,
    "variance_example": variance.example,
    "sharpness": smoothness.sharpness,
    "masked_curvature": smoothness.masked_curvature,
    "jumps": smoothness.jumps,
    "kinks": smoothness.kinks,
    "line": smoothness.line,
}


def write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks the claims of docs/theory.md")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, tables.md and the pictures")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    start = time.perf_counter()
    with Progress(transient=True) as progress:
        for name in progress.track(PARTS, description="theory"):
            results[name] = PARTS[name]()
    write(out / "results.json", json.dumps(results, indent=1))
    pages = [f"## {name}\n\n{make(results)}\n" for name, make in TABLES.items()]
    write(out / "tables.md", "\n".join(pages))
    for name, draw in PICTURES.items():
        draw(results, out / f"theory-{name}.png")
    print("\n".join(pages))
    print(f"{time.perf_counter() - start:.0f} s; {out}/results.json, tables.md, {len(PICTURES)} pictures")


if __name__ == "__main__":
    main()
