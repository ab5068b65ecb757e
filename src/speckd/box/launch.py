"""Starts the box and waits for it: a small process of its own between speckd and what a model wrote.

It becomes three. The first, outside, kills the second when time is over or nobody listens any more. The second is the first
process of the new namespaces: with its end the kernel ends everything in them. The third becomes the Python inside.
Standard input is the job, standard output what it answers, standard error where this module says what it could not do.
"""

import json
import os
import platform
import resource
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from speckd.box import kernel, seccomp

#: Exit codes: what the program did; it ran out of time; the box could not be had. 130 and above: 130 + the signal it died of.
ENDED, FAILED, TIMEOUT, IMPOSSIBLE = 0, 1, 124, 125
BY_SIGNAL = 130
NOBODY = 65534
_SYS_ADMIN, _SETUID, _SETGID = 21, 7, 6
_ISOLATED = kernel.NEWNS | kernel.NEWPID | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS | kernel.NEWCGROUP
_QUIET = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC


@dataclass(frozen=True)
class Plan:
    """What the box holds, from `Box`.

    Args:
        command: the Python inside and its arguments.
        environment: what its loader needs; the program never sees it.
        readable: files and folders that are mounted there, to be read only, under their own paths.
        links: symbolic links, path -> target.
        hidden: folders below those that appear empty.
        rlimits: name in `resource` -> (soft, hard).
        scratch_mb, inodes: of /tmp.
        wall_s: seconds until everything is killed.
    """

    command: list[str]
    environment: dict[str, str]
    readable: list[str]
    links: dict[str, str]
    hidden: list[str]
    rlimits: dict[str, list[int]]
    scratch_mb: int
    inodes: int
    wall_s: float


def _has_power() -> bool:
    """Whether this is root in more than name: it may mount and may become someone else who exists here."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    able = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)
    known = [[int(n) for n in line.split()] for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()]
    return all(able >> n & 1 for n in (_SYS_ADMIN, _SETUID, _SETGID)) and any(a <= NOBODY < a + n for a, _, n in known)


def _own_user(proc: int, user: int, group: int) -> None:
    """A user namespace in which this process is nobody, and nobody else exists."""
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # else the maps belong to root
    for name, line in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        descriptor = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(descriptor, line.encode())
        os.close(descriptor)


def _build(plan: Plan, machine: str) -> None:
    """A new root: an empty file system in memory, with what Python needs mounted there to be read only."""
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    trees = {path: kernel.copy_of_tree(path) for path in [*plan.readable, "/dev/null"]}
    root = "/tmp"  # any folder: only this process sees what is mounted there
    kernel.mount("box", root, "tmpfs", _QUIET & ~kernel.MS_NOEXEC, "size=1m,nr_inodes=1024,mode=755")
    for path, tree in trees.items():
        target = Path(root + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir() if os.path.isdir(path) else target.touch()
        kernel.attach_tree(tree, str(target))
        limits = kernel.ATTR_RDONLY | kernel.ATTR_NOSUID
        kernel.restrict(str(target), limits | (kernel.ATTR_NOEXEC if path == "/dev/null" else kernel.ATTR_NODEV))
        os.close(tree)
    for path, goal in plan.links.items():
        os.symlink(goal, root + path)
    for path in plan.hidden:
        kernel.mount("hidden", root + path, "tmpfs", _QUIET | kernel.MS_RDONLY, "size=4k,nr_inodes=1")
    os.mkdir(f"{root}/proc")
    with suppress(OSError):  # a container may hide parts of /proc, and then the kernel gives none; Python needs none
        options = "hidepid=invisible,subset=pid"
        kernel.mount("proc", f"{root}/proc", "proc", _QUIET | kernel.MS_RDONLY, options)
    os.mkdir(f"{root}/tmp")
    kernel.mount("scratch", f"{root}/tmp", "tmpfs", _QUIET, f"size={plan.scratch_mb}m,nr_inodes={plan.inodes},mode=1777")
    kernel.restrict(root, kernel.ATTR_RDONLY, recursive=False)
    kernel.become_root(root, machine)


def _become_program(plan: Plan, machine: str) -> None:
    """The last step: limits, the filter, and Python. Every descriptor but 0, 1 and 2 closes with it."""
    os.chdir("/tmp")
    os.setsid()
    for name, limits in plan.rlimits.items():
        resource.setrlimit(getattr(resource, name), (limits[0], limits[1]))
    seccomp.install(machine)
    os.execve(plan.command[0], plan.command, plan.environment)


def _start_program(plan: Plan, machine: str) -> int:
    """Process id of the Python inside; OSError where it could not be started, told through a pipe that a start closes."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _become_program(plan, machine)
        except BaseException as error:
            os.write(writing, str(error).encode())
        os._exit(IMPOSSIBLE)
    os.close(writing)
    failure = os.read(reading, 4096)
    if failure:
        raise OSError(f"Python does not start inside: {failure.decode(errors='replace')}")
    return child


def _first_process(plan: Plan, machine: str, proc: int, powerful: bool) -> int:
    """The first process inside: builds, gives up all power, starts the program, and ends when that ends."""
    kernel.name_machine("box")
    _build(plan, machine)
    if powerful:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        kernel.unshare(kernel.NEWUSER)
        _own_user(proc, NOBODY, NOBODY)
    os.close(proc)
    kernel.drop_capabilities(machine)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # so that its memory is nobody's
    child = _start_program(plan, machine)
    while True:
        ended, status = os.wait()
        if ended == child:
            return BY_SIGNAL + os.WTERMSIG(status) if os.WIFSIGNALED(status) else (FAILED if status else ENDED)


def _watch(first: int, wall_s: float) -> int:
    """Waits for the box's first process; kills it when time is over, or when nobody reads the answers any more."""
    ended = os.pidfd_open(first)
    watched = select.poll()
    watched.register(ended, select.POLLIN)
    watched.register(1, 0)  # the reader's end closed: POLLERR
    ready = watched.poll(wall_s * 1000)
    if ended not in dict(ready):
        os.kill(first, signal.SIGKILL)
    _, status = os.waitpid(first, 0)  # comes back only when the last process inside is gone
    if not ready:
        return TIMEOUT
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else FAILED


def launch(plan: Plan) -> int:
    """Runs the box to its end and returns the exit code that tells how it ended."""
    machine = platform.machine()
    powerful = _has_power()
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(_ISOLATED if powerful else _ISOLATED | kernel.NEWUSER)
    if not powerful:
        _own_user(proc, user, group)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")  # if memory runs out, this goes first
    first = os.fork()
    if first == 0:
        os._exit(_said(lambda: _first_process(plan, machine, proc, powerful)))
    return _watch(first, plan.wall_s)


def _said(act: Callable[[], int]) -> int:
    """What `act` returns; where it fails, that is said on standard error."""
    try:
        return act()
    except Exception as error:
        os.write(2, str(error).encode())
        return IMPOSSIBLE


def main() -> None:
    """The plan is the first argument, as JSON."""
    os._exit(_said(lambda: launch(Plan(**json.loads(sys.argv[1])))))
