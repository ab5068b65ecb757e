"""Seconds, bytes, and what they were measured on."""

import ctypes
import gc
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

Step = Callable[[], object]
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def prepare_torch(threads: int) -> None:
    """Compiled peers are compiled for their exact shapes, each of them, and may not fall back to eager unnoticed."""
    torch.set_num_threads(threads)
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True


# ---- time ----------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(steps: Mapping[str, Step], repeats: int, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """{name: {"cpu": seconds, "wall": seconds}}: one warm-up each, then rounds in which every step runs once.

    Each round starts with another step, so that nobody always runs after the same neighbour. A step that would compile again
    after its warm-up is an error.
    """
    for name, step in steps.items():
        print(f"  warm-up: {name}", flush=True)
        step()
    names = list(steps)
    found: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in names}
    with torch.compiler.set_stance("fail_on_recompile"):
        for turn in range(repeats):
            first = turn * len(names) // repeats
            for name in names[first:] + names[:first]:
                gc.collect()
                synchronize(device)
                cpu, wall = time.process_time(), time.perf_counter()
                steps[name]()
                synchronize(device)
                found[name]["cpu"].append(round(time.process_time() - cpu, 6))
                found[name]["wall"].append(round(time.perf_counter() - wall, 6))
            print(f"  round {turn + 1} of {repeats}", flush=True)
    return found


def spread(seconds: list[float]) -> float:
    """Half the range over the median."""
    return (max(seconds) - min(seconds)) / 2 / statistics.median(seconds)


def ratio(seconds: list[float], by: list[float]) -> float:
    """The median of the ratios round by round: what slows the whole machine down for a while divides out."""
    return statistics.median(a / b for a, b in zip(seconds, by, strict=True))


# ---- memory --------------------------------------------------------------------------------------------------------------


def require_memory_clock(device: torch.device) -> None:
    if device.type == "cpu" and not os.access(CLEAR, os.W_OK):
        raise SystemExit(f"*** NO PEAK MEMORY CAN BE MEASURED HERE: {CLEAR} is absent or read-only; run on Linux or with CUDA")


def peak_over_start(step: Step, device: torch.device) -> int:
    """The most bytes that the step held beside what was there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # the high-water mark starts again from what is resident now
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found, f"{STATUS} has no {name}"
    return 1024 * int(found[1])


# ---- where ---------------------------------------------------------------------------------------------------------------


def hardware(device: torch.device) -> str:
    """The GPU's name, or cores and model of the CPU: 2-core-AMD-EPYC."""
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
        words = f"{os.cpu_count()}-core {model[1] if model else platform.machine()}"
    return re.sub(r"[^\w]+", "-", words).strip("-")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("speckd", "torch", "transformers", "trl", "liger-kernel", "triton", "axolotl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write(folder: Path, table: str, device: torch.device, result: dict[str, Any]) -> Path:
    """`<hardware>-<date>-<table>.json`."""
    today = date.today().isoformat()
    about = {"table": table, "hardware": hardware(device), "date": today, "versions": versions()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{about['hardware']}-{today}-{table}.json"
    path.write_text(json.dumps(about | result, indent=1) + "\n")
    return path


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)
