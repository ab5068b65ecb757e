"""`python -m tests.kernels.compile_only cuda:90`: everything the package launches, compiled for a GPU that need not be there.

The launching code itself runs, on CPU tensors, with a driver that knows the target and launches nothing.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from speckd import LMHead, Objective
from speckd.gates import NoGate
from speckd.kernels.kernel_pass import KernelPass, move_rows
from speckd.kernels.statistics import MeasuredSignal
from speckd.policies import Label, Mask
from speckd.row_pass import JudgedRows
from speckd.types import DenseSignal, TeacherSignal, TokenKeys, TopKSignal
from tests.parity.cases import ENTRYWISE

WIDTH = 152_064
_run = JITFunction.run


class Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(target: GPUTarget) -> dict[str, bytes]:
    """Machine code by name of kernel and choice of arguments."""
    compiled: dict[str, bytes] = {}

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = _run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[f"{self.fn.__name__} {kernel.hash[:8]}"] = kernel.asm["cubin"]
        return kernel

    JITFunction.run = compile_instead
    triton.runtime.driver.set_active(Driver(target))
    for name, divergence in ENTRYWISE.items():
        for temperature, capped, policy in ((1.0, None, Mask()), (2.5, 30.0, Label())):
            row_pass = KernelPass(
                Objective(NoGate(), policy, divergence, divergence_temperature=temperature),
                LMHead(torch.zeros(WIDTH, 1), softcap=capped),
                1,
                False,
            )
            launch(row_pass, DenseSignal(torch.randn(2, WIDTH)))
            if name == "forward_kl" and temperature == 1:
                launch(row_pass, DenseSignal(torch.randn(2, WIDTH).bfloat16()))
                launch(row_pass, TopKSignal(torch.arange(6).view(2, 3), torch.full((2, 3), -2.0)))
    signal = MeasuredSignal.of(torch.randn(2, WIDTH).bfloat16())
    signal.in_top_k(torch.zeros(2, dtype=torch.int64), 5)
    signal.entropy()
    for swap in (False, True):
        move_rows(torch.zeros(3, WIDTH), torch.tensor([2]), torch.tensor([0]), swap)
    for width in (1, 100, 32_001):  # Triton makes constants of ones, and vectors where sizes are multiples of 16
        MeasuredSignal.of(torch.randn(2, width), 2.5).in_top_k(torch.zeros(2, dtype=torch.int64), 1)
    return compiled


def launch(row_pass: KernelPass, teacher: TeacherSignal) -> None:
    """A row that learns from the teacher, and one that does not; what is computed means nothing."""
    logits, index = torch.randn(2, WIDTH), torch.arange(2)
    row_pass(JudgedRows(DenseSignal(logits), teacher, index, TokenKeys(index, index), 1.0 - index), logits)


def spilled(machine_code: bytes) -> int:
    """Bytes of local memory that a kernel needs a thread, by NVIDIA's own tool, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        report = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", report))


if __name__ == "__main__":
    backend, capability = sys.argv[1].split(":")
    found = compile_all(GPUTarget(backend, int(capability), 32))
    for name, machine_code in sorted(found.items()):
        print(f"{name}: {spilled(machine_code)} bytes spilled")
    print(f"compiled {len(found)} kernels for {sys.argv[1]} with Triton {triton.__version__}")
