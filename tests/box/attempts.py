"""Sixty programs that try to get out of the box, to bring it down, or to pass without an answer.

Each defines `f`, whose answer is "WON" where the attempt got what it was after, and must never be what the test expects.
`@name@` stands for what the test fills in: files, ports, ids.
"""

import textwrap

_PRELUDE = """
import ctypes, glob, importlib, os, platform, re, signal, stat, sys, time
def any_of(*acts):
    '''"WON" if one of the acts gives something true; else what held them off.'''
    met = []
    for act in acts:
        try:
            if act():
                return "WON"
            met.append("nothing")
        except BaseException as error:
            met.append(type(error).__name__)
    return "held: " + ", ".join(met)
def wrote(path, opener=open):
    with opener(path, "w") as file:
        file.write("x")
    return True
def called(x86, arm, *arguments):
    number = {"x86_64": x86, "aarch64": arm}[platform.machine()]
    return ctypes.CDLL(None).syscall(number, *arguments) >= 0
"""

_FILES = {
    "open": """
        import io, _io, posix
        def f(x):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            return any_of(lambda: wrote("@marker@"), lambda: wrote("@marker@", io.open), lambda: _io.FileIO("@marker@", "w"),
                          lambda: os.open("@marker@", flags), lambda: posix.open("@marker@", flags))
        """,
    "passwd": """
        def f(x):
            return any_of(lambda: open("/etc/passwd").read(), lambda: open("/etc/shadow").read(), lambda: os.listdir("/etc"))
        """,
    "repository": """
        def f(x): return any_of(lambda: os.listdir("@repository@"), lambda: open("@repository@/pyproject.toml").read())
        """,
    "home": """
        def f(x):
            def seen():
                for folder, folders, names in os.walk("/"):
                    folders[:] = [name for name in folders if name not in ("lib", "proc")]
                    if any("@canary@" in name for name in folders + names): return True
            return any_of(lambda: open("@home@/.netrc").read(), seen)
        """,
    "proc_root": """
        def f(x):
            return any_of(*(lambda p=p: os.path.exists(p + "@marker@") for p in (
                "/proc/1/root", "/proc/self/root", "/proc/1/cwd", "/proc/self/root/..", "/proc/2/root/../..", "/..", "../..")))
        """,
    "inherited_descriptors": """
        def f(x):
            def useful(n):
                mode = os.fstat(n).st_mode
                return stat.S_ISDIR(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode) or stat.S_ISBLK(mode)
            return any_of(*(lambda n=n: useful(n) for n in range(1024)))
        """,
    "links": """
        def f(x):
            os.symlink("@marker@", "/tmp/a"); os.symlink("/tmp/b", "/tmp/c")
            def race():
                for n in range(2000):
                    for target in ("/tmp/b", "@marker@"):
                        try: os.unlink("/tmp/c")
                        except OSError: pass
                        os.symlink(target, "/tmp/c")
                        try: wrote("/tmp/c")
                        except OSError: pass
                return os.path.exists("@marker@")
            return any_of(lambda: wrote("/tmp/a"), race, lambda: os.link("@marker@", "/tmp/d") or True,
                          lambda: os.link(os.__file__, "/tmp/e") or True)
        """,
    "working_folder": """
        def f(x):
            return any_of(lambda: wrote("/canary"), lambda: wrote("../canary"), lambda: wrote(os.__file__),
                          lambda: wrote(os.path.dirname(os.__file__) + "/canary.py"), lambda: wrote("/usr/lib/canary"),
                          lambda: os.chmod(os.__file__, 0o777) or True, lambda: os.rename("/usr/lib", "/usr/lib2") or True)
        """,
    "full_disk": """
        def f(x):
            written = 0
            def fill():
                nonlocal written
                for n in range(400):
                    with open(f"/tmp/{n}", "wb") as file:
                        for _ in range(8):
                            written += file.write(bytes(1 << 17))
            try: fill()
            except BaseException: pass
            def long():
                with open("/tmp/long", "wb") as file:
                    return file.write(bytes(1 << 22)) > 1 << 21
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            return any_of(lambda: written > 65 << 20, long)
        """,
    "inodes": """
        def f(x):
            made = 0
            def many():
                nonlocal made
                for n in range(20000):
                    os.close(os.open(f"/tmp/{n}", os.O_CREAT)); made += 1
                return True
            return any_of(many, lambda: made > 1024)
        """,
}

_PROCESSES = {
    "system_after_reload": """
        os.system = None
        def f(x): return any_of(lambda: importlib.reload(os).system("echo x > @marker@") == 0)
        """,
    "posix_system": """
        import posix
        def f(x):
            return any_of(lambda: posix.system("echo x > @marker@") == 0, lambda: posix.posix_spawn("/bin/sh", ["sh"], {}))
        """,
    "fork_and_exec": """
        def f(x):
            def go():
                if os.fork() == 0:
                    os.execv("/bin/sh", ["sh", "-c", "echo x > @marker@"])
                return os.wait()
            return any_of(go, lambda: os.execv("/bin/sh", ["sh", "-c", "echo x > @marker@"]))
        """,
    "libc": """
        def f(x):
            libc = ctypes.CDLL(None)
            return any_of(lambda: libc.system(b"echo x > @marker@") == 0, lambda: libc.fork() > 0, lambda: called(57, -1) if
                          platform.machine() == "x86_64" else False, lambda: called(435, 435, 0, 0),
                          lambda: ctypes.PyDLL(None).open(b"@marker@", 0x41, 0o644) >= 0)
        """,
    "subprocess": """
        def f(x):
            run = importlib.import_module("sub" + "process").run
            return any_of(lambda: run("echo x > @marker@", shell=True), lambda: run([sys.executable, "-c", "0"]))
        """,
    "fork_bomb": """
        def f(x):
            def bomb():
                while True: os.fork()
            return any_of(bomb)
        """,
    "daemon": """
        def f(x):
            def leave():
                if os.fork() == 0:
                    os.setsid(); time.sleep(30); os._exit(0)
                return True
            return any_of(leave)
        """,
    "double_fork": """
        def f(x):
            def leave():
                if os.fork() == 0:
                    if os.fork() == 0: time.sleep(30)
                    os._exit(0)
                return os.wait()
            return any_of(leave, lambda: __import__("multiprocessing").Process(target=print).start() or True)
        """,
    "kill": """
        def f(x):
            for target in (1, -1, os.getppid(), @pid@, -@pid@):
                try: os.kill(target, signal.SIGKILL)
                except OSError: pass
            return any_of(lambda: os.kill(@pid@, 0) or True, lambda: open("/proc/@pid@/stat").read())
        """,
    "ptrace": """
        def f(x):
            libc = ctypes.CDLL(None)
            return any_of(lambda: libc.ptrace(16, 1, 0, 0) == 0, lambda: libc.ptrace(0, 0, 0, 0) == 0,
                          lambda: open("/proc/1/mem", "rb").read(1), lambda: called(310, 270, 1, 0, 0, 0, 0, 0))
        """,
}

_NETWORK = {
    "tcp": """
        import socket
        def f(x): return any_of(lambda: socket.create_connection(("1.1.1.1", 80), timeout=1), lambda: socket.socket())
        """,
    "udp": """
        import socket
        def f(x): return any_of(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", @udp@)))
        """,
    "dns": """
        import socket
        def f(x): return any_of(lambda: socket.getaddrinfo("example.com", 80), lambda: socket.gethostbyname("example.com"))
        """,
    "loopback": """
        import socket
        def f(x):
            def through_libc():
                made = ctypes.CDLL(None).socket(2, 1, 0)
                return made >= 0 and socket.socket(fileno=made).connect(("127.0.0.1", @tcp@)) is None
            return any_of(lambda: socket.create_connection(("127.0.0.1", @tcp@), timeout=1), through_libc,
                          lambda: __import__("urllib.request").request.urlopen("http://127.0.0.1:@tcp@", timeout=1))
        """,
    "abstract_socket": """
        import socket
        def f(x):
            def connect():
                socket.socket(socket.AF_UNIX).connect("\\0@canary@"); return True
            return any_of(connect, lambda: socket.socketpair(), lambda: socket.socket(16, 3, 0))
        """,
    "metadata": """
        import socket
        def f(x): return any_of(lambda: socket.create_connection(("169.254.169.254", 80), timeout=1), lambda: socket.socket(10))
        """,
}

_RESOURCES = {
    "memory": "def f(x): return any_of(lambda: bytearray(1 << 30))",
    "mmap": """
        import mmap
        def f(x): return any_of(lambda: mmap.mmap(-1, 1 << 30), lambda: [mmap.mmap(-1, 1 << 26) for _ in range(16)])
        """,
    "list": """
        def f(x):
            def grow():
                held = [0]
                while True: held = held + held
            return any_of(grow)
        """,
    "regular_expression": "def f(x): return any_of(lambda: re.match('(a+)+$', 'a' * 60 + 'b'))",
    "large_power": "def f(x): return any_of(lambda: 10 ** 10 ** 8 % 7 + 1)",
    "endless_loop": """
        def f(x):
            while True:
                try:
                    while True: pass
                except BaseException: pass
        """,
    "ignored_signals": """
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        def f(x):
            while True:
                try: time.sleep(100)
                except BaseException: pass
        """,
    "threads": """
        import threading
        def f(x):
            def many():
                for _ in range(500): threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
                return True
            return any_of(many)
        """,
}

_POWER = {
    "unshare": """
        def f(x):
            libc = ctypes.CDLL(None)
            return any_of(lambda: libc.unshare(0x10000000) == 0, lambda: libc.unshare(0x20000) == 0,
                          lambda: libc.setns(0, 0) == 0, lambda: called(56, 220, 0x10000011, 0, 0, 0, 0))
        """,
    "mount": """
        def f(x):
            libc = ctypes.CDLL(None)
            return any_of(lambda: libc.mount(b"x", b"/tmp", b"tmpfs", 0, 0) == 0, lambda: libc.umount2(b"/proc", 2) == 0,
                          lambda: libc.mount(b"x", b"/", b"", 32 | 4096, 0) == 0, lambda: called(430, 430, b"tmpfs", 0),
                          lambda: called(428, 428, -100, b"/", 1), lambda: wrote("/proc/sys/kernel/core_pattern"))
        """,
    "chroot": """
        def f(x):
            def out():
                os.mkdir("/tmp/r"); os.chroot("/tmp/r")
                for _ in range(50): os.chdir("..")
                os.chroot("."); return True
            return any_of(out, lambda: os.setuid(0) or True, lambda: called(155, 41, b"/tmp", b"/tmp"))
        """,
    "setuid_files": """
        def f(x):
            def there(path):
                return os.path.exists(path) and os.execv(path, [path])
            marked = []
            for path in glob.glob("/usr/*bin/*") + glob.glob("/usr/lib*/*/*"):
                mode = os.lstat(path).st_mode
                if stat.S_ISREG(mode) and mode & stat.S_ISUID: marked.append(path)
            for path in marked:  # the mount takes the bit away, and with it what it would give
                if not os.statvfs(path).f_flag & os.ST_NOSUID: return "WON"
            return any_of(lambda: there("/bin/su"), lambda: there("/usr/bin/sudo"), lambda: there("/bin/mount"),
                          lambda: ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) != 1)
        """,
    "kernel_log": """
        def f(x):
            libc = ctypes.CDLL(None)
            return any_of(lambda: open("/dev/kmsg"), lambda: open("/proc/kmsg"), lambda: libc.klogctl(3, bytes(99), 99) > 0,
                          lambda: open("/dev/mem"), lambda: os.mknod("/tmp/m", 0o600 | stat.S_IFCHR, os.makedev(1, 1)) or True)
        """,
    "io_uring": "def f(x): return any_of(lambda: called(425, 425, 4, bytes(120)), lambda: called(206, 0, 1, bytes(8)))",
    "userfaultfd": """
        def f(x):
            return any_of(lambda: called(323, 282, 1), lambda: called(298, 241, bytes(128), 0, -1, -1, 0),
                          lambda: called(321, 280, 0, bytes(72), 72))
        """,
    "keys": "def f(x): return any_of(lambda: called(250, 219, 0, -3, 1), lambda: called(248, 217, b'user', b'a', b'b', 1, -3))",
}

_KNOWLEDGE = {
    "environment": """
        def f(x):
            held = [repr(dict(os.environ))] + [open(p, errors="replace").read() for p in glob.glob("/proc/*/environ")]
            return any_of(lambda: "@secret@" in "".join(held), lambda: os.environ)
        """,
    "arguments": """
        def f(x):
            held = [repr(sys.argv), repr(sys.orig_argv)] + [open(p).read() for p in glob.glob("/proc/*/cmdline")]
            return any_of(lambda: "@repository@" in "".join(held), lambda: "expected" + "-" in "".join(held))
        """,
    "descriptors": """
        def f(x):
            def open_ones(): return {os.readlink(p) for p in glob.glob("/proc/self/fd/*") if os.path.lexists(p)}
            return any_of(lambda: [o for o in open_ones() if not o.startswith(("/dev/null", "pipe:", "/proc/"))],
                          lambda: any(os.read(n, 1) for n in range(3)))
        """,
    "other_processes": """
        def f(x):
            return any_of(lambda: [n for n in os.listdir("/proc") if n.isdigit() and int(n) != os.getpid()],
                          lambda: os.getpgid(@pid@), lambda: open("/proc/1/environ").read(), lambda: open("/proc/1/maps"))
        """,
    "memory_of_its_own": """
        def f(x):
            start = "expec" + "ted-"
            pattern = re.compile((start + "[0-9a-f]{32}").encode())
            with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
                for line in maps:
                    first, last = (int(n, 16) for n in line.split()[0].split("-"))
                    if line.split()[1][0] == "r":
                        try:
                            memory.seek(first)
                            found = pattern.search(memory.read(last - first))
                        except (OSError, OverflowError, ValueError): continue
                        if found: return found[0].decode()
            return "held: nothing found"
        """,
    "sys": """
        def f(x):
            return any_of(lambda: os.listdir("/sys"), lambda: open("/proc/cpuinfo").read(), lambda: os.listdir("/run"),
                          lambda: open("/proc/net/tcp").read().count("\\n") > 1, lambda: os.uname().nodename == "@node@")
        """,
}

_JUDGE = {
    "equal_to_all": """
        class Always:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 0
        def f(x): return Always()
        """,
    "subclasses": """
        class Text(str):
            def __eq__(self, other): return True
            __hash__ = str.__hash__
        class Row(list):
            def __eq__(self, other): return True
        def f(x): return Text("x") if x == 3 else Row()
        """,
    "frames": """
        def f(x):
            frame = sys._getframe()
            while frame:
                for name, value in list(frame.f_locals.items()) + list(frame.f_globals.items()):
                    if isinstance(value, list): value.append("passed")
                    if isinstance(value, dict) and name != "space": value.update(passed=True, ok=True, result="passed")
                frame = frame.f_back
        """,
    "patched_driver": """
        import json, builtins
        main = sys.modules["__main__"]
        main._answer = lambda *a: {"value": True, "passed": True}
        main.encode = lambda *a: True
        builtins.AssertionError = type("AssertionError", (Exception,), {"__new__": lambda *a: None})
        sys.modules["pytest"] = sys.modules["__main__"]
        def f(x): return True
        """,
    "system_exit": "raise SystemExit(0)",
    "os_exit": "os._exit(0)",
    "printed_answers": """
        import json
        def f(x): print(json.dumps({"call": 0, "value": "passed"}))
        for descriptor in (0, 1, 2):
            for told in ({"call": 0, "value": "passed"}, {"passed": True}):
                os.write(descriptor, json.dumps(told).encode() + b"\\n")
        print(json.dumps({"call": 0, "value": "passed", "passed": True}))
        """,
    "answers_by_hand": """
        import json
        for n in range(3, 64):
            try:
                for call in range(4):
                    os.write(n, json.dumps({"call": call, "kind": "value", "value": True, "passed": True}).encode() + b"\\n")
            except OSError: pass
        os._exit(0)
        """,
    "flood": """
        def f(x):
            for n in range(3, 64):
                try:
                    while True: os.write(n, b"[" * 65536)
                except OSError: pass
        """,
    "near_values": """
        def f(x): return {3: True, 4: float("nan"), 5: (1, 2), 6: b"a"}[x]
        """,
    "lazy": """
        def f(x):
            def later():
                yield "passed"
            return {3: later(), 4: map(str, [1]), 5: range(3), 6: iter("a")}[x]
        """,
    "gadget": """
        class Gadget:
            def __reduce__(self): return os.system, ("echo x > @marker@",)
        def f(x):
            forged = ["l", [["i", "1"], ["__reduce__", "os.system"], {"py/object": "os"}]]
            sys.modules["__main__"].encode = lambda value, depth=0: forged
            return Gadget()
        """,
}

GROUPS = {
    "files": _FILES,
    "processes": _PROCESSES,
    "network": _NETWORK,
    "resources": _RESOURCES,
    "power": _POWER,
    "knowledge": _KNOWLEDGE,
    "judge": _JUDGE,
}
ATTEMPTS = {
    f"{group}-{name}": _PRELUDE + textwrap.dedent(text) for group, attempts in GROUPS.items() for name, text in attempts.items()
}
#: Done without a box, and with no harm, these get what they are after: the attempts are real.
REAL = (
    "files-open", "files-passwd", "files-repository", "files-home", "processes-posix_system", "processes-libc",
    "processes-subprocess", "processes-system_after_reload", "network-udp", "network-loopback", "network-abstract_socket",
    "knowledge-other_processes", "knowledge-sys",
)  # fmt: skip
