"""The few system calls that Python has no function for. Each raises OSError with the call's name."""

import ctypes
import os

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 1 << 14, 1 << 18
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = (
    1,
    4,
    24,
    28,
    38,
    47,
)

_AT_FDCWD, _AT_RECURSIVE, _AT_EMPTY_PATH = -100, 0x8000, 0x1000
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH, _MNT_DETACH = 1, 4, 2
# The same numbers on every architecture, but for pivot_root and capset.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _call(
    name: str, number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_uint64] | ctypes.Array[ctypes.c_uint32]
) -> int:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(name, _libc.syscall(ctypes.c_long(number), *wide))


def unshare(flags: int) -> None:
    """unshare(2)."""
    _checked("unshare", _libc.unshare(ctypes.c_int(flags)))


def name_machine(name: str) -> None:
    """sethostname(2)."""
    _checked("sethostname", _libc.sethostname(name.encode(), ctypes.c_size_t(len(name))))


def prctl(option: int, second: int = 0, third: int = 0) -> None:
    """prctl(2) with up to three arguments."""
    _checked("prctl", _libc.prctl(ctypes.c_int(option), *(ctypes.c_ulong(a) for a in (second, third, 0, 0))))


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    name = f"mount of {kind or 'a tree'} on {target}"
    _checked(name, _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()))


def copy_of_tree(path: str) -> int:
    """A descriptor of what is mounted at and below `path`, which can be attached elsewhere."""
    return _call(f"open_tree of {path}", _OPEN_TREE, _AT_FDCWD, path.encode(), _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC)


def attach_tree(tree: int, target: str) -> None:
    """Mounts what `copy_of_tree` copied."""
    _call(f"move_mount to {target}", _MOVE_MOUNT, tree, b"", _AT_FDCWD, target.encode(), _MOVE_MOUNT_F_EMPTY_PATH)


def restrict(path: str, attributes: int, recursive: bool = True) -> None:
    """Sets attributes of a mount, of those below it, too."""
    settings = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    _call(f"mount_setattr of {path}", _MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, settings, ctypes.sizeof(settings))


def become_root(path: str, machine: str) -> None:
    """Makes `path` this mount namespace's root, and lets go of the old one."""
    os.chdir(path)
    _call("pivot_root", _PIVOT_ROOT[machine], b".", b".")
    _checked("umount", _libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def drop_capabilities(machine: str) -> None:
    """All of them, for this thread and for all that it becomes; then no_new_privs, so that none come back."""
    last = 0
    while last < 64:
        try:
            prctl(PR_CAPBSET_DROP, last)
        except OSError:  # beyond the kernel's last
            break
        last += 1
    prctl(PR_CAP_AMBIENT, 4)
    prctl(PR_SET_SECUREBITS, 0x2F)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _call("capset", _CAPSET[machine], header, (ctypes.c_uint32 * 6)())
    prctl(PR_SET_NO_NEW_PRIVS, 1)
