from pathlib import Path

import pytest

from speckd.report import charts
from speckd.report.build import report
from tests.report.folders import png, write_all


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of three runs, two evaluations and a benchmark."""
    place = tmp_path_factory.mktemp("report")
    return report(write_all(place / "in"), place / "out")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are one point: a test that asks for no picture need not wait for any."""
    monkeypatch.setattr(charts, "_drawn", lambda *_: png())
