"""Sixty programs that try to get out or to cheat: none does anything outside, none passes, and the judge answers in time."""

import ast
import ctypes
import os
import platform
import select
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from speckd.box import Box, Limits, Problem, Unboxed, Verdict, judge, problem
from tests.box.attempts import ATTEMPTS, GROUPS, REAL

ROOT = Path(__file__).parents[2]
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Outside:
    """What must stay untouched: a folder with a marker, listeners, and processes."""

    folder: Path
    canary: str = field(default_factory=lambda: f"canary-{uuid.uuid4().hex}")
    expected: str = field(default_factory=lambda: f"expected-{uuid.uuid4().hex}")

    def __post_init__(self) -> None:
        (self.folder / "home").mkdir()
        (self.folder / "home" / ".netrc").write_text("password")
        (self.folder / self.canary).write_text("as it was")
        self.tcp, self.udp = socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind("\0" + self.canary)
        self.unix.listen()
        self.before, self.children = self.files(), self.processes()

    def files(self) -> dict[str, tuple[int, bytes]]:
        found = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}

    def processes(self) -> set[int]:
        """All below this one; what loses its parent comes back here, and so is seen."""
        return {child.pid for child in psutil.Process().children(recursive=True)}

    def filled(self, program: str) -> str:
        known = {
            "marker": self.folder / "marker", "home": self.folder / "home", "canary": self.canary, "repository": ROOT,
            "tcp": self.tcp.getsockname()[1], "udp": self.udp.getsockname()[1], "pid": os.getpid(), "node": platform.node(),
            "secret": os.environ["SPECKD_TEST_SECRET"],
        }  # fmt: skip
        for name, value in known.items():
            program = program.replace(f"@{name}@", str(value))
        return program

    def problem(self, name: str) -> Problem:
        tests = [f"assert f(3) == '{self.expected}'"]
        if name == "judge-near_values":
            tests = ["assert f(3) == 1", "assert f(4) == f(4)", "assert f(5) == [1, 2]", "assert f(6) == 'a'"]
        elif name in ("judge-lazy", "judge-subclasses"):
            tests = ["assert f(3) == 'passed'", "assert f(4) == ['1']", "assert f(5) == [0, 1, 2]", "assert f(6) == 'a'"]
        return problem({"task_id": name, "text": "None.", "code": "def f(x): ...", "test_list": tests})

    def close(self) -> None:
        for opened in (self.tcp, self.udp, self.unix):
            opened.close()


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    monkeypatch.setenv("SPECKD_TEST_SECRET", f"secret-{uuid.uuid4().hex}")
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    found = Outside(tmp_path)
    yield found
    found.close()


def won(verdict: Verdict) -> bool:
    return any(outcome.value == "WON" for outcome in verdict.outcomes)


def test_there_are_sixty_in_seven_groups() -> None:
    assert len(ATTEMPTS) == 60 and [len(group) for group in GROUPS.values()] == [10, 10, 6, 8, 8, 6, 12]


@pytest.mark.parametrize("name", ATTEMPTS)
def test_contained(box: Box, outside: Outside, name: str) -> None:
    program = outside.filled(ATTEMPTS[name])
    ast.parse(program)
    started = time.monotonic()
    verdict = judge(outside.problem(name), program, box)
    assert time.monotonic() - started < box.limits.wall_s + 6
    assert not verdict.passed and verdict.judgeable and verdict.reason and not won(verdict), verdict
    assert not any(error in outcome.detail for outcome in verdict.outcomes for error in ("NameError", "SyntaxError")), verdict
    assert outside.files() == outside.before
    assert outside.processes() == outside.children
    assert not select.select([outside.tcp, outside.udp, outside.unix], [], [], 0)[0]


@pytest.mark.parametrize("name", REAL)
def test_without_a_box_the_attempt_succeeds(outside: Outside, name: str) -> None:
    """Else nothing would be shown by its failing in the box."""
    verdict = judge(outside.problem(name), outside.filled(ATTEMPTS[name]), Unboxed(Limits(threads=1 << 20)))
    assert won(verdict) and not verdict.passed


def test_a_box_that_is_killed_leaves_nothing(box: Box, outside: Outside) -> None:
    """The launcher is killed while a program sleeps: everything in the box goes with it."""
    import threading

    outcomes: list[str] = []
    run = threading.Thread(target=lambda: outcomes.extend(o.kind for o in box.run("import time", ["time.sleep(60)"])))
    run.start()
    until = time.monotonic() + 5
    while len(outside.processes() - outside.children) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)
    launcher = next(p for p in psutil.Process().children() if p.pid not in outside.children)
    launcher.kill()
    run.join(10)
    for _ in range(200):
        left = {p for p in outside.processes() - outside.children if psutil.Process(p).status() != psutil.STATUS_ZOMBIE}
        if not left:
            break
        time.sleep(0.01)
    assert not run.is_alive() and not left and outcomes == ["died"]


def test_answers_that_take_long_to_read_are_read_in_time(box: Box) -> None:
    """Keys of equal hash, brackets without end, and sizes just below the limit."""
    modulus = (1 << 61) - 1
    programs = [
        f"def f(x): return set(n * {modulus} for n in range(9000))",
        f"def f(x): return {{n * {modulus}: n for n in range(6000)}}",
        "import os\nos.write(3, b'{\"call\": 0, \"value\": ' + b'[' * 200000 + b'\\n')",
        "def f(x): return 'a' * 120000",
        "def f(x): return 1 << 400000",
    ]
    for program in programs:
        started = time.monotonic()
        box.run(program, ["f(1)"])
        assert time.monotonic() - started < 9
