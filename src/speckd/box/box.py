"""The box for programs that a model wrote: their own user, mounts, processes and network, with nothing in them.

docs/box.md says what it holds off and what it does not.
"""

import json
import os
import platform
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from speckd.box import launch, seccomp
from speckd.box.exchange import Ended, Job, converse, outcomes
from speckd.box.outcomes import Limits, Outcome
from speckd.errors import ConfigError

# The package itself imports torch, for which a launcher has no use: two empty packages stand in for it.
_START = """
import sys, types
for name, folder in (("speckd", sys.argv[2]), ("speckd.box", sys.argv[3])):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from speckd.box.launch import main
main()
"""
_HERE = Path(__file__).parent
_PYTHON = ("-I", "-S", "-B", "-X", "utf8", "-c")
_BACKUP_S = 5.0
_SYSTEM = ("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/usr/lib32", "/nix/store", "/gnu/store")
#: Tried inside by `missing`: each of these must fail there, else it is no box.
_PROOF = """
import os, socket
def held(act):
    try:
        act()
    except OSError:
        return True
    return False
tried = (
    lambda: open("/etc/passwd"), lambda: os.listdir(%r), lambda: open("/x", "w"), os.fork, socket.socket, lambda: os.setuid(0),
)
"""
_WALLS = 6


def _rlimits(limits: Limits) -> dict[str, list[int]]:
    """As names in `resource` -> (soft, hard)."""
    sizes = {
        "RLIMIT_AS": limits.memory_mb << 20,
        "RLIMIT_NPROC": limits.threads,
        "RLIMIT_FSIZE": limits.file_mb << 20,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_CORE": 1,  # with 0, a kernel that pipes dumps to a program outside would do so; nothing fits into 1 byte
    }
    return {**{name: [size, size] for name, size in sizes.items()}, "RLIMIT_CPU": [limits.cpu_s, limits.cpu_s + 1]}


def _program_text() -> str:
    return (_HERE / "inside.py").read_text(encoding="utf-8")


def _python() -> str:
    """The interpreter itself, also where this one was started from a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _signal(ended: Ended) -> int | None:
    """The signal that ended the program, told by the launcher or, without a box, by the system."""
    if ended.code is None or 0 <= ended.code <= launch.BY_SIGNAL:
        return None
    return ended.code - launch.BY_SIGNAL if ended.code > 0 else -ended.code


def _outcomes(ended: Ended, wanted: int) -> list[Outcome]:
    number = _signal(ended)
    late = ended.code in (launch.TIMEOUT, None) or number == signal.SIGXCPU
    return outcomes(ended, wanted, late, _how(ended, number))


def _how(ended: Ended, number: int | None) -> str:
    """In words, how a program ended that did not answer."""
    if ended.flooded:
        return "it answered more than may be read"
    if number is not None:
        return f"killed by {signal.Signals(number).name if number in set(signal.Signals) else f'signal {number}'}"
    return f"it ended without an answer{': ' + ended.said[-300:] if ended.said else ''}"


@dataclass(frozen=True)
class Box:
    """Runs programs in namespaces of their own: no network, no process but one, nothing to read but Python, 64 MiB to write.

    The program and all its calls run in one process, in their order, as a test file would: what one call leaves behind, the
    next one finds, and where one ends the process, those after it have `died`, too. A process for each would guard nothing
    more, because no answer is trusted: the expected values stay outside, and a verdict needs every call.
    """

    limits: Limits = field(default_factory=Limits)

    def missing(self) -> str | None:
        """Why there can be no box here, found by starting one and trying its walls; None where it holds."""
        if sys.platform != "linux":
            return f"it needs Linux, and this is {sys.platform}"
        if platform.machine() not in seccomp.MACHINES:
            return (
                f"its filter of system calls is written for {' and '.join(seccomp.MACHINES)}, and this is {platform.machine()}"
            )
        ended = self._converse(_PROOF % str(_HERE), ["[held(act) for act in tried]"], "")
        if ended.code == launch.IMPOSSIBLE or ended.code is None:
            return ended.said or "it did not start in time"
        outcome = _outcomes(ended, 1)[0]
        if outcome.kind != "value":
            return f"Python does not start inside: {outcome.detail}"
        return None if outcome.value == [True] * _WALLS else f"it does not hold: {outcome.value}"

    def run(self, program: str, calls: Sequence[str], setup: str = "") -> list[Outcome]:
        """The outcome of each call, in their order.

        Args:
            program: source text; runs once, as a module of the name `program`.
            calls: expressions over the program's names.
            setup: source text that runs after the program, before the calls.

        Raises:
            ConfigError: there can be no box here.
        """
        ended = self._converse(program, calls, setup)
        if ended.code == launch.IMPOSSIBLE:
            raise ConfigError(f"The box for programs cannot be had here: {ended.said}", "docs/box.md says what it needs.")
        return _outcomes(ended, len(calls))

    def _converse(self, program: str, calls: Sequence[str], setup: str) -> Ended:
        plan = json.dumps(asdict(self._plan()))
        command = [sys.executable, *_PYTHON, _START, plan, str(_HERE.parent), str(_HERE)]
        # The launcher keeps the time and clears up; if it should fail to, this side does.
        limits = Limits(wall_s=self.limits.wall_s + _BACKUP_S, output_bytes=self.limits.output_bytes)
        return converse(command, Job(program, setup, calls, {}), limits, Path("/"))

    def _plan(self) -> launch.Plan:
        prefix, python = sys.base_prefix, _python()
        library = [] if prefix == "/usr" else [f"{prefix}/lib"]
        bases = {"installed_base": prefix, "platbase": sys.base_exec_prefix}
        standard = [sysconfig.get_path(name, vars=bases) for name in ("stdlib", "platstdlib")]
        wanted = [*(path for path in _SYSTEM if os.path.isdir(path) and not os.path.islink(path)), *library, *standard, python]
        readable: list[str] = []
        for path in dict.fromkeys(wanted):  # one below another is there already
            if not any(Path(path).is_relative_to(other) for other in readable):
                readable.append(path)
        packages = [f"{folder}/{name}" for folder in dict.fromkeys(standard) for name in ("site-packages", "dist-packages")]
        return launch.Plan(
            command=[python, *_PYTHON, _program_text()],
            environment={"LD_LIBRARY_PATH": library[0]} if library else {},
            readable=readable,
            links={path: os.readlink(path) for path in _SYSTEM[:3] if os.path.islink(path)},
            hidden=[path for path in [*packages, "/usr/lib/python3/dist-packages"] if os.path.isdir(path)],
            rlimits=_rlimits(self.limits),
            scratch_mb=self.limits.scratch_mb,
            inodes=self.limits.inodes,
            wall_s=self.limits.wall_s,
        )


@dataclass(frozen=True)
class Unboxed:
    """Runs programs in an ordinary child process with limits on time, memory and files, for who accepts that in so many words.

    Such a program can read and send whatever the user can, write where the user can, and leave processes behind. What it
    answers is judged as strictly as in the box.
    """

    limits: Limits = field(default_factory=Limits)

    def missing(self) -> str | None:
        """Never anything: it promises nothing."""
        return None

    def run(self, program: str, calls: Sequence[str], setup: str = "") -> list[Outcome]:
        """As `Box.run`."""
        job = Job(program, setup, calls, _rlimits(self.limits))
        with tempfile.TemporaryDirectory() as folder:
            ended = converse([_python(), *_PYTHON, _program_text()], job, self.limits, Path(folder))
        return _outcomes(ended, len(calls))


def required(accept_unsandboxed_code: bool, limits: Limits | None = None) -> Box | Unboxed:
    """Where programs will run, settled before any text is generated for them.

    Args:
        accept_unsandboxed_code: what `--i-accept-unsandboxed-code` says; then, and only then, it goes without a box.

    Raises:
        ConfigError: no box can be had here, and the user did not accept to go without.
    """
    if accept_unsandboxed_code:
        return Unboxed(limits or Limits())
    box = Box(limits or Limits())
    why = box.missing()
    if why:
        fix = "docs/box.md says what it needs; --i-accept-unsandboxed-code runs them without, with all that you may do."
        raise ConfigError(f"The programs that the model writes need a box, and it cannot be had here: {why}", fix)
    return box
