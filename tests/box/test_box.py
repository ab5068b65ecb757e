"""What runs, what comes back, and when it is refused."""

import ast
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import speckd.box.box as module
from speckd.box import Box, Limits, Unboxed, extract_code, judge, problem, required, seccomp
from speckd.box.inside import encode
from speckd.box.values import decode
from speckd.errors import ConfigError

ROOT = Path(__file__).parents[2]
ATOMS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9) | st.complex_numbers()
)
KEYS = st.recursive(ATOMS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4)
VALUES = st.recursive(
    KEYS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=4) | st.sets(KEYS)
    ),
    max_leaves=12,
)


@given(VALUES)
@settings(max_examples=80, deadline=None)
def test_a_plain_value_comes_back_as_it_was(value: Any) -> None:
    """In type and value; `repr` also tells -0.0 from 0.0, and one NaN is as good as another."""
    found = decode(json.loads(json.dumps(encode(value))))
    assert type(found) is type(value) and canonical(found) == canonical(value)


def canonical(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted(repr(canonical(v)) for v in value)
    if isinstance(value, dict):
        return "dict", [(canonical(k), canonical(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [canonical(v) for v in value]
    return type(value).__name__, repr(value)


@given(st.recursive(st.none() | st.booleans() | st.text(max_size=3) | st.integers() | st.sampled_from("ifcbltszd"),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner)))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_whatever_a_program_writes_is_a_plain_value_or_a_value_error(told: Any) -> None:
    try:
        found = decode(told)
    except ValueError:
        return
    assert canonical(decode(json.loads(json.dumps(encode(found))))) == canonical(found)


def test_what_is_not_plain_stays_inside(box: Box) -> None:
    program = (
        "import collections, enum, fractions\n"
        "class I(int): pass\nclass E(enum.IntEnum):\n    A = 1\nP = collections.namedtuple('P', 'x')\n"
        "def deep(n):\n    x = []\n    for _ in range(n): x = [x]\n    return x\nloop = []; loop.append(loop)"
    )
    refused = ["I(1)", "E.A", "P(1)", "[I(1)]", "{1: P(1)}", "range(3)", "iter([])", "fractions.Fraction(1)", "deep", "loop",
               "deep(100)", "object()", "bytearray(1)", "'a' * 10 ** 6", "10 ** 10 ** 6"]  # fmt: skip
    assert [outcome.kind for outcome in box.run(program, refused)] == ["error"] * len(refused)
    plain = [
        "collections.Counter('aab')",
        "collections.OrderedDict(a=1)",
        "collections.defaultdict(int, a=1)",
        "deep(50)",
        "2 ** 20000",
    ]
    outcomes = box.run(program, plain)
    assert [type(outcome.value) for outcome in outcomes] == [dict, dict, dict, list, int]
    assert outcomes[0].value == {"a": 2, "b": 1} and outcomes[4].value == 2**20000


@pytest.mark.parametrize("where", [Box, Unboxed])
def test_each_call_has_an_outcome(box: Box, where: type[Box] | type[Unboxed]) -> None:
    there = where(Limits(wall_s=2, cpu_s=1))
    outcomes = there.run(
        "n = 0\ndef f():\n    global n\n    n += 1\n    return n", ["f()", "1 / 0", "f()", "nothing", "(", "raise"]
    )
    assert [(o.kind, o.value) for o in outcomes[:3]] == [("value", 1), ("error", None), ("value", 2)]
    assert [o.kind for o in outcomes[3:]] == ["error"] * 3 and "ZeroDivisionError" in outcomes[1].detail
    died = there.run("import os", ["1", "os._exit(0)", "2"])
    assert [(o.kind, o.value) for o in died] == [("value", 1), ("died", None), ("died", None)]
    late = there.run("import time", ["1", "time.sleep(60)", "2"])
    assert [o.kind for o in late] == ["value", "timeout", "timeout"]
    broken = there.run("def f(:", ["f()", "f()"])
    assert [o.kind for o in broken] == ["error"] * 2 and "SyntaxError" in broken[0].detail
    assert there.run("x = 1", []) == []


def test_limits_are_kept(box: Box) -> None:
    late = box.run("def f():\n    while True: pass", ["f()"])[0]
    assert late.kind == "timeout"
    program = (
        "import resource\ndef limits(): return [resource.getrlimit(getattr(resource, 'RLIMIT_' + n)) for n in names]\n"
        "names = ['AS', 'FSIZE', 'NOFILE', 'CORE', 'CPU', 'NPROC']\n"
        "def change(limit): return resource.setrlimit(resource.RLIMIT_CORE, limit)"
    )
    limits, *changes = box.run(program, ["limits()", "change((0, 0))", "change((1, 1))", "change((-1, -1))"])
    assert limits.value == [(512 << 20,) * 2, (1 << 20,) * 2, (64, 64), (1, 1), (1, 2), (32, 32)]
    assert [change.kind for change in changes] == ["error"] * 3
    with pytest.raises(ConfigError, match="cpu_s is 0"):
        Limits(cpu_s=0)


@pytest.mark.parametrize(("signal", "where"), [("SEGV", Box), ("ABRT", Box), ("SEGV", Unboxed)])
def test_a_crash_is_told(box: Box, signal: str, where: type[Box] | type[Unboxed]) -> None:
    outcome = where().run("import os, signal", [f"os.kill(os.getpid(), signal.SIG{signal})"])[0]
    assert (outcome.kind, outcome.detail) == ("died", f"killed by SIG{signal}")


def test_the_process_inside_has_no_power(box: Box) -> None:
    status = box.run("", ["open('/proc/self/status').read()", "__import__('os').listdir('/')"])
    packages = f"__import__('os').listdir({sysconfig.get_path('stdlib') + '/site-packages'!r})"
    assert box.run("", [packages])[0].value in ([], None)
    if status[0].kind != "value":
        pytest.skip("The state of the process is NOT tested: no /proc may be mounted here")
    lines = dict(line.split(":", 1) for line in status[0].value.splitlines())
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(lines[name], 16) == 0
    assert lines["NoNewPrivs"].strip() == "1" and lines["Seccomp"].strip() == "2" and lines["Uid"].split() == ["65534"] * 4
    assert not {"etc", "home", "sys", "work", "var"} & set(status[1].value)


def test_many_boxes_at_a_time(box: Box) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: box.run(f"x = {n}", ["x"])[0].value, range(8)))
    assert found == list(range(8))


def test_where_there_is_no_box_it_is_refused_with_the_way_out(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's architecture has no filter: known before anything starts. With a box, the flag changes nothing."""
    assert isinstance(required(accept_unsandboxed_code=True), Box)
    monkeypatch.setattr(module.platform, "machine", lambda: "riscv64")
    assert "riscv64" in str(Box().missing())
    with pytest.raises(ConfigError, match=r"need a box, and it cannot be had here: .*riscv64.* --i-accept-unsandboxed-code"):
        required(accept_unsandboxed_code=False)
    assert isinstance(required(accept_unsandboxed_code=True), Unboxed)


@pytest.fixture
def light() -> Iterator[Path]:
    """A folder from which the box is imported by anybody, without the rest of the package."""
    with tempfile.TemporaryDirectory() as name:
        package = Path(name) / "speckd"
        shutil.copytree(ROOT / "src" / "speckd" / "box", package / "box", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "src" / "speckd" / "errors.py", package)
        (package / "__init__.py").touch()
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        yield Path(name)


def test_a_kernel_that_gives_no_namespaces_is_found_by_trying(box: Box, light: Path) -> None:
    """In a user namespace that allows no more of them."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("A kernel without namespaces is NOT tested: there is no unshare(1)")
    script = (
        "from speckd.box import Box, required\nfrom speckd.errors import ConfigError\nprint(Box().missing())\n"
        "try: Box().run('', ['1'])\nexcept ConfigError as e: print(e)\n"
        "try: required(False)\nexcept ConfigError as e: print(e)"
    )
    forbid = f'echo 0 > /proc/sys/user/max_mnt_namespaces && exec {sys.executable} -c "$SCRIPT"'
    environment = {"SCRIPT": script, "PYTHONPATH": str(light), "PATH": os.environ["PATH"]}
    done = subprocess.run([unshare, "-Ur", "sh", "-c", forbid], capture_output=True, text=True, check=False, env=environment)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert "unshare" in lines[0] and "cannot be had here" in lines[1] and "--i-accept-unsandboxed-code" in lines[2]


def test_nobody_gets_the_same_box(box: Box, light: Path) -> None:
    """Who owns nothing and may do nothing; with the system's Python, because nobody may not read root's."""
    python = Path("/usr/bin/python3")
    if os.geteuid() != 0 or not python.exists():
        pytest.skip("The box of nobody is NOT tested: this is not root, or there is no /usr/bin/python3")
    script = "from speckd.box import Box\nprint([Box().missing(), Box().run('', ['__import__(\"os\").getuid()'])[0].value])"
    done = subprocess.run(
        [str(python), "-B", "-c", script], user=65534, group=65534, extra_groups=[], cwd=light, capture_output=True, text=True,
        env={"PYTHONPATH": str(light)}, check=False,
    )  # fmt: skip
    if "SyntaxError" in done.stderr:
        pytest.skip("The box of nobody is NOT tested: the system's Python is too old")
    assert ast.literal_eval(done.stdout or "None") == [None, 65534], done.stderr


def test_with_its_caller_killed_the_box_is_gone(box: Box, light: Path) -> None:
    script = "from speckd.box import Box, Limits\nBox(Limits(wall_s=60)).run('import time', ['time.sleep(60)'])"
    caller = subprocess.Popen([sys.executable, "-c", script], env={"PYTHONPATH": str(light)})
    seen = psutil.Process(caller.pid)
    until = time.monotonic() + 10
    while len(inside := seen.children(recursive=True)) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    caller.kill()
    caller.wait()
    assert len(inside) == 3
    while left := [p for p in inside if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < until, left
        time.sleep(0.01)


def test_the_filter_names_the_calls_of_this_kernel() -> None:
    """Against the headers of the system, where they are."""
    header = Path("/usr/include/asm-generic/unistd.h")
    native = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists() or not native.exists():
        pytest.skip("The numbers of system calls are NOT tested: no kernel headers here")
    import re

    x86 = {name: int(n) for name, n in re.findall(r"__NR_(\w+) (\d+)", native.read_text())}
    arm = {name: int(n) for name, n in re.findall(r"__NR(?:3264)?_(\w+) (\d+)", header.read_text())}
    for name, first, second in seccomp.DENIED:
        assert first == x86.get(name) and (second == arm.get(name) or name.endswith("handle_at")), name


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_the_filter_decides_as_it_should(machine: str) -> None:
    """Run by a small interpreter of classic BPF, for both architectures."""
    column, arch, clone, clone3, ioctl, prlimit64 = seccomp.MACHINES[machine]
    steps = seccomp.program(machine)
    allow, refuse, unknown = 0x7FFF0000, 0x50001, 0x50026
    assert len(steps) < 4096 and verdict(steps, arch ^ 1, 0) == 0x80000000
    for row in seccomp.DENIED:
        if row[column] is not None:
            assert verdict(steps, arch, row[column]) == refuse
    assert verdict(steps, arch, clone3) == verdict(steps, arch, 452) == verdict(steps, arch, (1 << 30) + 1) == unknown
    assert verdict(steps, arch, clone, 0x3D0F00) == allow  # a thread of glibc's
    assert verdict(steps, arch, clone, 17) == verdict(steps, arch, clone, 0x3D0F00 | 0x10000000) == refuse
    assert verdict(steps, arch, ioctl, 1, 0x5412) == refuse and verdict(steps, arch, ioctl, 1, 0x5401) == allow
    assert verdict(steps, arch, prlimit64, 0, 4) == allow
    assert verdict(steps, arch, prlimit64, 0, 4, 1) == verdict(steps, arch, prlimit64, 0, 4, 1 << 32) == refuse
    for name in ("x86_64", "aarch64"):
        for number in {"x86_64": (0, 1, 9, 12, 59, 202, 231, 257), "aarch64": (56, 63, 64, 93, 98, 221, 222)}[name]:
            assert name != machine or verdict(steps, arch, number) == allow


def verdict(
    steps: list[seccomp.Instruction], arch: int, number: int | None, first: int = 0, second: int = 0, third: int = 0
) -> int:
    memory = {0: number or 0, 4: arch, 16: first, 24: second, 32: third & 0xFFFFFFFF, 36: third >> 32}
    at, held = 0, 0
    while True:
        code, true, false, k = steps[at]
        if code == 0x06:
            return k
        if code == 0x20:
            held, jump = memory[k], 0
        else:
            jump = true if {0x15: held == k, 0x25: held > k, 0x45: bool(held & k)}[code] else false
        at += 1 + jump


FUNCTION = "def f(x):\n    return x"


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        (FUNCTION, FUNCTION),
        (f"Here it is:\n```python\n{FUNCTION}\n```\nIt works.\n```python\nf(1)\n```", FUNCTION),
        (f"```\n{FUNCTION}\n```", FUNCTION),
        (f"```text\nnone\n```\n```py\n{FUNCTION}\n```", FUNCTION),
        (f"```python\n{FUNCTION}", FUNCTION),
        (f"{FUNCTION}\n```\nThis adds.", FUNCTION),
        (f"[BEGIN]\n{FUNCTION}\n[DONE]\nmore", FUNCTION),
        (f"{FUNCTION}\n[DONE]\n\nYou are an expert", FUNCTION),
        (f"{FUNCTION}\nif __name__ == '__main__':\n    f(1)", FUNCTION),
        (f"{FUNCTION}\nassert f(1) == 2", FUNCTION),
        (f"{FUNCTION}<|endoftext|>x", FUNCTION),
        (f"{FUNCTION}\ndef g(", FUNCTION),
        (f"{FUNCTION}\nThis function adds.", FUNCTION),
        (FUNCTION.replace("\n", "\r\n"), FUNCTION),
        ("    return x\n\nclass A:\n    pass", "    return x"),
        ("    return x\ndef g():", "    return x"),
        ("\n    return x\n# next", "    return x"),
        ("class A: pass\n\nclass B: pass", "class A: pass\n\nclass B: pass"),
        (f"```\nInput: 1\n```\nSo:\n```python\n{FUNCTION}\n```", FUNCTION),
        (f"```\n[1, 2]\n```\nSo:\n```\n{FUNCTION}\n```", FUNCTION),
        (f"```\nInput: 1\n```python\n{FUNCTION}\n```", FUNCTION),
        (f"```python\nf(1)\n```\nis\n```python\n{FUNCTION}\n```", FUNCTION),
        (f"~~~python\n{FUNCTION}\n~~~\nIt works.", FUNCTION),
        (f"````python\n{FUNCTION}\n````", FUNCTION),
        (f"It is:\n```\n{FUNCTION}", FUNCTION),
        (f"{FUNCTION}\nIt gives\n```\n5\n```", FUNCTION),
        (f"{FUNCTION}\n```\nUse it:\n```\nf(1)\n```", FUNCTION),
        (f"{FUNCTION}\n```\ny = f(2)", FUNCTION),
        ("    return x\n\nUse:\n```python\nprint(f(1))\n```", "    return x"),
        ("```\n    return x\n```", "    return x"),
        ("```python\nf(1)\n```", "f(1)"),
        (f"I think:\n\n{FUNCTION}", FUNCTION),
        (f"I think:\n\n{FUNCTION}\nThis adds.", FUNCTION),
        (f"Sure\n\n{FUNCTION}", FUNCTION),
        (f"from here on,\nclass or not:\nK = 1\n{FUNCTION}", f"K = 1\n{FUNCTION}"),
        (f"Let there be\nn = 3\nAnd then:\n{FUNCTION}", FUNCTION),
        ("So:\nf = lambda x: x", "f = lambda x: x"),
        (f"I need math:\nimport math\n@cache\n{FUNCTION}", f"import math\n@cache\n{FUNCTION}"),
        (f"f = lambda x: x\nOr so:\n{FUNCTION}", "f = lambda x: x"),
        ("I cannot", "I cannot"),
        ("", ""),
    ],
)
def test_a_program_is_found_in_a_completion(completion: str, program: str) -> None:
    assert extract_code(completion) == program


@pytest.mark.parametrize(
    "text", ["1" + "+1" * 50000, "-" * 50000 + "1", "(" * 50000, "x" + ".a" * 50000, "[" * 90 + "]" * 90, "not " * 50000,
             "x = 1\n)" * 5000, "no\nx = (\n" * 5000, "no no\nfrom a import b\n" * 5000, "```\nx\n```\n" * 2000,
             "if 1:\n" * 99, "\0", "\ud800", "lambda:" * 9000, "f'{" * 900, "a if b else " * 9000])  # fmt: skip
def test_no_text_brings_the_judge_down(text: str) -> None:
    """It is parsed out here, before it goes into the box."""
    started = time.monotonic()
    assert isinstance(extract_code(text), str)
    assert time.monotonic() - started < 5


def test_nan_is_never_right(box: Box) -> None:
    given = problem({"task_id": 1, "text": "x", "code": "def f(): ...", "test_list": ["assert f() == float('nan')"]})
    outcome = judge(given, "def f(): return float('nan')", box)
    assert not outcome.passed and math.isnan(outcome.outcomes[0].value)
