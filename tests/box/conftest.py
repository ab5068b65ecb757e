"""A box for the tests, or a loud skip where none can be had."""

import json
from pathlib import Path
from typing import Any

import pytest

from speckd.box import Box, Limits

MBPP = Path(__file__).parents[3] / "shared" / "data" / "mbpp"


@pytest.fixture(scope="session")
def box() -> Box:
    found = Box(Limits(wall_s=3.0, cpu_s=1))
    why = found.missing()
    if why:
        pytest.skip(f"The box is NOT tested: {why}")
    return found


@pytest.fixture(scope="session")
def mbpp() -> list[dict[str, Any]]:
    """Every row, in the order of the files' names."""
    if not MBPP.is_dir():
        pytest.skip("MBPP is NOT tested: it is not in ../shared/data")
    return [json.loads(line) for path in sorted(MBPP.glob("*.jsonl")) for line in path.read_text().splitlines()]
