"""Settings for all tests: one thread (two processes share two cores), hypothesis profiles, counted examples."""

import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

settings.register_profile(
    "speckd",
    max_examples=int(os.environ.get("SPECKD_EXAMPLES", "100")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("speckd")

EXAMPLES: Counter[str] = Counter()


@pytest.fixture
def counted(request: pytest.FixtureRequest):
    """Call it once an example: the summary says how many examples each property saw."""

    def count() -> None:
        EXAMPLES[request.node.name] += 1

    return count


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of a process that runs a part of the tests
        session.config.workeroutput["examples"] = dict(EXAMPLES)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    EXAMPLES.update(getattr(node, "workeroutput", {}).get("examples", {}))


def pytest_terminal_summary(terminalreporter) -> None:
    if EXAMPLES:
        terminalreporter.section("examples by property")
        for name, count in sorted(EXAMPLES.items()):
            terminalreporter.write_line(f"{count:>7,}  {name}")
        terminalreporter.write_line(f"{sum(EXAMPLES.values()):>7,}  in all")
