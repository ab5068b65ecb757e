"""Cached and served, a teacher is the teacher in this process: the same verdicts, loss and gradients, within what is stated."""

from pathlib import Path

import pytest

from tests.served.sources import gaps
from tests.served.test_real_vllm import PYTHON, QUICKSTART, STORIES, free_port
from tests.served.vllm_cpu import RealServer
from tests.served.widened import widen

#: Relative: of the loss and of the gradients. 16 bits a log-probability; a server's own arithmetic.
BOUNDS = {"32 bits": (1e-6, 1e-6), "16 bits": (1e-4, 1e-3), "vLLM": (1e-4, 1e-3)}
MODELS = {"quickstart": QUICKSTART, "stories260K": STORIES}


def check(folder: Path, place: Path, url: str | None) -> None:
    for name, gap in gaps(folder, place, url):
        loss, gradients = next(bound for kind, bound in BOUNDS.items() if kind in name)
        assert gap.verdicts == 0 and 0 < gap.accepted < gap.tokens, name
        assert gap.loss <= loss and gap.gradients <= gradients, name
        assert gap.of_whole <= 1 + loss, f"{name}: on a top-K and a tail, a divergence is at most the whole"


@pytest.mark.parametrize("name", MODELS)
def test_cached(name: str, tmp_path: Path) -> None:
    if not MODELS[name].is_dir():
        pytest.skip(f"NOT TESTED: {name} is not there (shared/)")
    check(MODELS[name], tmp_path, None)


@pytest.mark.timeout(900)
@pytest.mark.skipif(not PYTHON, reason="NO REAL SERVER WAS TESTED: SPECKD_VLLM is not set (vllm_cpu.py)")
@pytest.mark.parametrize("name", MODELS)
def test_served(name: str, tmp_path: Path) -> None:
    model = widen(MODELS[name], tmp_path / "teacher")
    with RealServer(PYTHON, model, free_port(), tmp_path / "log", "--max-logprobs", "-1") as server:
        check(MODELS[name], tmp_path, server.url)
