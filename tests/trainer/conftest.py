import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny import task_rows, write_model, write_rows


@dataclass(frozen=True)
class World:
    """Two models, data, and a place to write."""

    student: Path
    teacher: Path
    data: Path
    place: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    place = tmp_path_factory.mktemp("world")
    return World(
        write_model(place / "student", seed=1),
        write_model(place / "teacher", seed=2, hidden=32, layers=2, width=256),
        write_rows(place / "data.jsonl", task_rows(24)),
        place,
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with an empty folder for temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    return tmp_path
