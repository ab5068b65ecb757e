"""The distillation loss at the head, hidden states in, loss and gradients out: this package, its peers and the bare products.

    python benchmarks/head_loss.py time                                              N 512, V 32,000
    python benchmarks/head_loss.py time --positions 256 --vocabulary 152064
    python benchmarks/head_loss.py time --supervised 1 --acceptance 1
    python benchmarks/head_loss.py memory --positions 2048
    python benchmarks/head_loss.py memory --positions 1024 --vocabulary 152064
    python benchmarks/head_loss.py growth

Each prints markdown and writes it, with every single measurement, to `benchmarks/results/`. `pip install -e '.[bench]'` brings
Liger, `pip install --no-deps axolotl addict` axolotl; a peer that is absent is named and left out. `--device cuda` measures
bfloat16 on a GPU.

Every candidate is first run at a small size and compared with the same loss on full float64 logits. One that differs by more
than the tolerance (relative, in loss or either gradient) is not measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from candidates import (
    FAMILIES,
    FORWARD_KL,
    NAIVE,
    REST,
    Candidate,
    Floor,
    all_ours,
    floor_of,
    our_chunk,
    plain,
)
from measure import interleaved, markdown, peak_over_start, prepare_torch, ratio, require_memory_clock, spread, write
from peers import all_peers
from problem import Problem, Shape, build

MIB = 2**20
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
SMALL = Shape(positions=96, vocabulary=1009, student_width=32, teacher_width=48)
SMALL_CHUNK = 16


@dataclass(frozen=True)
class Setting:
    shape: Shape
    device: torch.device
    threads: int
    chunk: int | None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def clock(self) -> str:
        """CPU seconds where one thread does all the work: they leave out what other programs did meanwhile."""
        return "cpu" if self.device.type == "cpu" and self.threads == 1 else "wall"

    @property
    def words(self) -> str:
        s, far = self.shape, " (far rejections)" if self.shape.far else ""
        return (
            f"N {s.positions}, V {s.vocabulary}, Hs {s.student_width}, Ht {s.teacher_width}, {s.supervised:.0%} supervised, "
            f"{s.acceptance:.0%} of them to be accepted{far}, {self.dtype}, {self.device}, {self.threads} thread(s), "
            f"seed {s.seed}"
        )

    @property
    def slug(self) -> str:
        s = self.shape
        far = "-far" if s.far else ""
        return f"N{s.positions}-V{s.vocabulary}-supervised{s.supervised:g}-accepted{s.acceptance:g}{far}"

    def chunk_of(self, problem: Problem) -> int:
        return self.chunk or our_chunk(len(problem.rows), self.shape.vocabulary, self.device.type)

    def build(self) -> Problem:
        return build(self.shape, self.device, self.dtype)


# ---- who takes part ------------------------------------------------------------------------------------------------------


def error_of(candidate: Candidate, setting: Setting) -> float:
    """The largest relative difference, in loss or gradients, from the same loss on full float64 logits, at the small size."""
    problem = build(SMALL, setting.device, torch.float32 if candidate.gate_rounds else setting.dtype)
    exact = problem.to(torch.float64)
    exact.start(candidate.frozen)
    wanted = plain(candidate.loss, exact)
    wanted.backward()
    found = candidate.step(problem, SMALL_CHUNK)
    pairs = [(found, wanted.detach()), (problem.hidden.grad, exact.hidden.grad)]
    if not candidate.frozen:
        pairs.append((problem.head.grad, exact.head.grad))
    elif candidate.ours:
        assert problem.head.grad is None, "a frozen head has a gradient"
    return float(torch.stack([(a.double() - b).norm() / b.norm() for a, b in pairs]).max())  # NaN stays NaN


def everyone(device: torch.device) -> Iterator[Candidate]:
    return chain(all_ours(), all_peers(device))


def participants(setting: Setting, wanted: Callable[[Candidate], bool]) -> dict[str, tuple[Candidate, float]]:
    """{key: (candidate, its error)} of those that compute what they say. This package must: a wrong engine has no speed."""
    found, tolerance = {}, TOLERANCE[setting.dtype]
    for candidate in filter(wanted, everyone(setting.device)):
        error = error_of(candidate, setting)
        if error <= tolerance:
            found[candidate.key] = candidate, error
        elif candidate.ours:
            raise SystemExit(f"*** {candidate.key} is wrong: its relative error is {error:.1e}, more than {tolerance:.0e}")
        else:
            print(f"\n*** NOT MEASURED: {candidate.key}: relative error {error:.1e} to {candidate.loss}\n", flush=True)
    return found


# ---- time ----------------------------------------------------------------------------------------------------------------


def times(
    setting: Setting, candidates: list[Candidate], repeats: int
) -> tuple[Problem, dict[str, dict[str, list[float]]], dict[str, int]]:
    """Seconds of every candidate and of the floors that they stand on; on a GPU also the bytes that each took at most."""
    problem = setting.build()
    chunk = setting.chunk_of(problem)
    print(f"{setting.words}; {_facts(problem, chunk)}", flush=True)
    steps = {floor.key: floor.prepare(problem) for floor in _floors(candidates)}
    steps |= {c.key: partial(c.step, problem, chunk) for c in candidates}
    found = interleaved(steps, repeats, setting.device)
    on_cpu = setting.device.type == "cpu"  # where what is freed need not be given back: see `memory_of`
    peaks = {} if on_cpu else {c.key: peak_of(problem, c, steps[c.key]) for c in candidates}
    problem.start(frozen_head=True)
    return problem, found, peaks


def peak_of(problem: Problem, candidate: Candidate, step: Callable[[], object]) -> int:
    """Bytes over the inputs, of a candidate that has been warmed up."""
    problem.start(candidate.frozen)
    return peak_over_start(step, problem.hidden.device)


def _floors(candidates: list[Candidate]) -> list[Floor]:
    return list(dict.fromkeys(floor_of(candidate) for candidate in candidates))


def _facts(problem: Problem, chunk: int) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in problem.facts.items()) + f", chunk {chunk}"


def time_command(setting: Setting, args: argparse.Namespace) -> None:
    taking_part = participants(setting, lambda candidate: candidate.family in args.families)
    candidates = [candidate for candidate, _ in taking_part.values()]
    problem, seconds, peaks = times(setting, candidates, args.repeats)
    own = {name: entry[setting.clock] for name, entry in seconds.items()}
    tables = [time_table(setting, family, taking_part, own, peaks) for family in args.families]
    text = "\n\n".join([f"{setting.words}; {_facts(problem, setting.chunk_of(problem))}.", *tables])
    rows = [
        {"candidate": c.key, "loss": str(c.loss), "error": error, "floor": floor_of(c).key} for c, error in taking_part.values()
    ]
    some = "" if args.families == default_families("time") else "-" + "-".join(f.replace(" ", "-") for f in args.families)
    report(
        setting,
        args,
        f"time-{setting.slug}{some}",
        text,
        {"seconds": seconds, "peak_bytes": peaks, "candidates": rows, "facts": problem.facts},
    )


def time_table(
    setting: Setting,
    family: str,
    taking_part: dict[str, tuple[Candidate, float]],
    seconds: dict[str, list[float]],
    peaks: dict[str, int],
) -> str:
    """One family: every candidate over its floor and over each of ours."""
    members = [entry for entry in taking_part.values() if entry[0].family == family]
    ours = [candidate for candidate, _ in members if candidate.ours and family != REST]
    unit = "CPU s" if setting.clock == "cpu" else "wall s"
    memory = ["peak, MiB"] if peaks else []
    head = ["candidate", "loss", unit, "±", "÷ its floor", *[f"÷ {c.name}" for c in ours], "error", *memory]

    def row(key: str, floor: Floor, *ends: str) -> list[str]:
        taken = seconds[key]
        ratios = [f"{ratio(taken, seconds[other]):.2f}" for other in (floor.key, *[c.key for c in ours])]
        peak = [f"{peaks[key] / MIB:,.0f}" if key in peaks else ""] if peaks else []
        return [*ends[:2], f"{statistics.median(taken):.4f}", f"{spread(taken):.0%}", *ratios, *ends[2:], *peak]

    rows = [row(floor.key, floor, floor.name, "none", "") for floor in _floors([candidate for candidate, _ in members])]
    rows += [row(c.key, floor_of(c), c.name, str(c.loss), f"{error:.0e}") for c, error in members]
    notes = (
        f"**{family}**: {unit} of one step (loss and gradients), median; ±: half the range. ÷: this candidate's time over "
        "the named one's, so above 1 the named one is faster; median of the ratios of each round. Its floor: the bare products "
        "of the rows that its loss needs, gated or not. error: relative, against float64 at a small size."
        + (" peak: over the inputs, the head's gradient included." if peaks else "")
    )
    return f"{notes}\n\n{markdown(head, rows)}"


# ---- memory --------------------------------------------------------------------------------------------------------------


def memory_of(setting: Setting, key: str) -> int:
    """Bytes, from a process of its own. Blocks above 128 KiB go back to the system when freed: the peak is what is in use."""
    words = [sys.executable, __file__, "one_candidate", "--candidate", key, "--threads", str(setting.threads)]
    shape = asdict(setting.shape)
    words += ["--far"] if shape.pop("far") else []
    words += [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    words += ["--device", str(setting.device)] + (["--chunk", str(setting.chunk)] if setting.chunk else [])
    environment = os.environ | {"OMP_NUM_THREADS": str(setting.threads), "MALLOC_MMAP_THRESHOLD_": str(MIB // 8)}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])["bytes"]


def one_candidate_command(setting: Setting, args: argparse.Namespace) -> None:
    """In the process of `memory_of`: warm up at the small size, and where there is something to compile at the real one."""
    candidate = next(c for c in everyone(setting.device) if c.key == args.candidate)
    candidate.step(build(SMALL, setting.device, setting.dtype), SMALL_CHUNK)
    problem = setting.build()
    step = partial(candidate.step, problem, setting.chunk_of(problem))
    if candidate.compiled:
        step()
    problem.start(candidate.frozen)
    print(json.dumps({"bytes": peak_over_start(step, setting.device)}))


def memory_command(setting: Setting, args: argparse.Namespace) -> None:
    require_memory_clock(setting.device)
    taking_part = participants(setting, lambda candidate: candidate.family in args.families and args.only in candidate.name)
    count, vocabulary = round(setting.shape.positions * setting.shape.supervised), setting.shape.vocabulary
    chunk = setting.chunk or our_chunk(count, vocabulary, setting.device.type)
    element = torch.finfo(setting.dtype).bits // 8
    rows, cells = [], []
    for candidate, _ in taking_part.values():
        peak = memory_of(setting, candidate.key)
        head = 0 if candidate.frozen else vocabulary * setting.shape.student_width * element
        buffers = (peak - head) / (chunk * vocabulary * 4)
        rows.append({"candidate": candidate.key, "loss": str(candidate.loss), "bytes": peak, "head_gradient_bytes": head})
        cells.append([candidate.family, candidate.name, *[f"{b / MIB:.0f}" for b in (peak, peak - head)], f"{buffers:.1f}"])
        print(" ", *cells[-1], flush=True)
    head_names = ["family", "candidate", "peak, MiB", "less dW, MiB", f"in buffers of [{chunk}, V] float32"]
    text = (
        f"{setting.words}, chunk {chunk}.\n\nPeak memory over the inputs of one step (loss and gradients), each candidate in a "
        f"process of its own. dW, the head's gradient, is V · Hs; a buffer is {chunk * vocabulary * 4 / MIB:.0f} MiB, for "
        f"every candidate.\n\n{markdown(head_names, cells)}"
    )
    report(
        setting,
        args,
        f"memory-{setting.slug}{'-' + args.only if args.only else ''}",
        text,
        {"candidates": rows, "chunk": chunk},
    )


# ---- growth --------------------------------------------------------------------------------------------------------------

AXES: dict[str, tuple[str, list[Any]]] = {
    "tokens": ("positions", [1, 2, 4, 8]),  # times the base
    "vocabulary": ("vocabulary", [32_000, 64_000, 96_000, 128_000, 152_064]),
    "acceptance": ("acceptance", [1.0, 0.75, 0.5, 0.25, 0.1]),
}
OURS = ("ours, gated", "ours, gated, early rejection")


def points(setting: Setting, axis: str) -> Iterator[tuple[float, Setting]]:
    name, values = AXES[axis]
    for value in values:
        there = setting.shape.positions * value if axis == "tokens" else value
        yield there, replace(setting, shape=replace(setting.shape, **{name: there}))


def growth_command(setting: Setting, args: argparse.Namespace) -> None:
    from picture import draw

    require_memory_clock(setting.device)
    names = (*OURS, args.peer, NAIVE)
    candidates = [c for c, _ in participants(setting, lambda c: c.family == FORWARD_KL and c.name in names).values()]
    if args.peer not in [candidate.name for candidate in candidates]:
        raise SystemExit(f"*** --peer {args.peer!r} does not take part: see above, or name another one as `time` does")
    found: list[dict[str, Any]] = []
    for axis in args.axes:
        for value, there in points(setting, axis):
            problem, seconds, _ = times(there, candidates, args.repeats)
            rows = {"floor, gated": {"seconds": seconds[floor_of(candidates[0]).key][there.clock]}}
            chunk = there.chunk_of(problem)
            del problem
            for candidate in candidates:
                taken = seconds[candidate.key][there.clock]
                rows[candidate.name] = {"seconds": taken, "bytes": memory_of(there, candidate.key)}
            found.append({"axis": axis, "value": value, "shape": asdict(there.shape), "chunk": chunk, "candidates": rows})
    text = "\n\n".join(growth_table(setting, axis, found) for axis in args.axes)
    path = report(setting, args, "growth", text, {"points": found})
    draw(found, setting.words, path.with_suffix(".png"))
    print(f"Picture: {path.with_suffix('.png').name}")


def growth_table(setting: Setting, axis: str, found: list[dict[str, Any]]) -> str:
    of_axis = [point for point in found if point["axis"] == axis]
    names = list(of_axis[0]["candidates"])
    unit = "CPU s" if setting.clock == "cpu" else "wall s"
    head = [axis, *[f"{name}: {unit}" for name in names], *[f"{name}: MiB" for name in names[1:]]]
    rows = []
    for point in of_axis:
        members = point["candidates"].values()
        seconds = [f"{statistics.median(member['seconds']):.3f}" for member in members]
        rows.append([f"{point['value']:g}", *seconds, *[f"{m['bytes'] / MIB:.0f}" for m in members if "bytes" in m]])
    return (
        f"**{axis}**, otherwise {setting.words}. Forward KL; ours and naive gated, the peer not. MiB: peak over the inputs, "
        f"with dW.\n\n{markdown(head, rows)}"
    )


# ---- the command line ----------------------------------------------------------------------------------------------------


def report(setting: Setting, args: argparse.Namespace, table: str, text: str, result: dict[str, Any]) -> Path:
    about = {"setting": setting.words, "shape": asdict(setting.shape), "clock": setting.clock, "threads": setting.threads}
    path = write(args.out, table, setting.device, about | result | {"markdown": text.splitlines()})
    print(f"\n{text}\n\nWritten: {path.name}")
    return path


def default_families(command: str) -> list[str]:
    return [family for family in FAMILIES if command == "memory" or family != REST]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("time", "memory", "growth", "one_candidate"):
        command = commands.add_parser(name)
        command.add_argument("--positions", type=int, default=512)
        command.add_argument("--vocabulary", type=int, default=32_000)
        command.add_argument("--supervised", type=float, default=0.6)
        command.add_argument("--acceptance", type=float, default=0.5)
        command.add_argument("--far", action="store_true", help="rejected rows are wholly another row's, not a mixture")
        command.add_argument("--student_width", type=int, default=512)
        command.add_argument("--teacher_width", type=int, default=1024)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--device", type=torch.device, default=torch.device("cpu"))
        command.add_argument("--chunk", type=int, help="rows of a chunk, ours and 'equal'; by default the engine's own")
        command.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
        if name in ("time", "memory"):
            command.add_argument("--families", nargs="+", choices=FAMILIES, default=default_families(name))
        if name == "memory":
            command.add_argument("--only", default="", help="only candidates with this in their name, such as ours")
        if name in ("time", "growth"):
            command.add_argument("--repeats", type=int, default=5)
        if name == "growth":
            command.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
            command.add_argument("--peer", default="Liger compiled, rows compacted, equal chunk", help="the best peer")
        if name == "one_candidate":
            command.add_argument("--candidate", required=True)
    return parser.parse_args()


def main() -> None:
    args = parse()
    prepare_torch(args.threads)
    shape = Shape(**{name: getattr(args, name) for name in asdict(SMALL)})
    setting = Setting(shape, args.device, args.threads, args.chunk)
    {
        "time": time_command,
        "memory": memory_command,
        "growth": growth_command,
        "one_candidate": one_candidate_command,
    }[args.command](setting, args)


if __name__ == "__main__":
    main()
