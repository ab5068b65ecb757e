"""The kernels, in processes of their own: Triton's interpreter must be asked for before Triton is imported.

Three times: interpreted; compiled for GPUs that need not be there; and run on a GPU where there is one.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.repository.files import ROOT

CASES = "tests/kernels/under_triton.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed, so no kernel is tested: pip install 'speckd[gpu]'",
)


def run(*command: str, cache: Path, **environment: str) -> str:
    """Standard output of `python -m COMMAND`, which must succeed."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    inherited |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=inherited, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def passed(output: str) -> int:
    """How many, where nothing else happened."""
    summary = output.strip().splitlines()[-1]
    assert not re.search("failed|error|skipped", summary), output[-6000:]
    return int(re.search(r"(\d+) passed", summary).group(1))


def test_interpreted(tmp_path: Path) -> None:
    output = run(
        "pytest", "-q", "-x", "-p", "no:cacheprovider", CASES, cache=tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""
    )
    assert passed(output) > 100


@pytest.mark.parametrize("target", ["cuda:90"])  # others by hand: python -m tests.kernels.compile_only cuda:80
def test_compiled_without_a_gpu(tmp_path: Path, target: str) -> None:
    """What the package launches goes through the real compiler, to machine code that needs registers, not memory."""
    output = run("tests.kernels.compile_only", target, cache=tmp_path, CUDA_VISIBLE_DEVICES="")
    spilled = [int(count) for count in re.findall(r"(\d+) bytes spilled", output)]
    assert len(spilled) > 20 and max(spilled) < 64, output


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here, so the kernels ran in Triton's interpreter only")
def test_on_a_gpu(tmp_path: Path) -> None:
    assert passed(run("pytest", "-q", "-x", "-p", "no:cacheprovider", CASES, cache=tmp_path)) > 100
