"""The filter of system calls: what a program in the box may not ask the kernel for.

Numbers are those of Linux's `asm/unistd.h` (x86_64) and `asm-generic/unistd.h` (aarch64).
"""

import ctypes
import errno
import struct
from typing import NamedTuple

from speckd.box import kernel

# (name, number on x86_64, number on aarch64); None: that architecture has no such call.
DENIED: tuple[tuple[str, int | None, int | None], ...] = (
    # other processes
    ("ptrace", 101, 117), ("process_vm_readv", 310, 270), ("process_vm_writev", 311, 271), ("kcmp", 312, 272),
    ("pidfd_open", 434, 434), ("pidfd_getfd", 438, 438), ("pidfd_send_signal", 424, 424), ("process_madvise", 440, 440),
    ("process_mrelease", 448, 448),
    # new processes
    ("fork", 57, None), ("vfork", 58, None),
    # namespaces, mounts, roots
    ("unshare", 272, 97), ("setns", 308, 268), ("mount", 165, 40), ("umount2", 166, 39), ("pivot_root", 155, 41),
    ("chroot", 161, 51), ("open_tree", 428, 428), ("move_mount", 429, 429), ("fsopen", 430, 430), ("fsconfig", 431, 431),
    ("fsmount", 432, 432), ("fspick", 433, 433), ("mount_setattr", 442, 442),
    # devices, handles, quotas, watches
    ("mknod", 133, None), ("mknodat", 259, 33), ("name_to_handle_at", 303, 264), ("open_by_handle_at", 304, 265),
    ("quotactl", 179, 60), ("quotactl_fd", 443, 443), ("swapon", 167, 224), ("swapoff", 168, 225),
    ("fanotify_init", 300, 262), ("fanotify_mark", 301, 263), ("inotify_init", 253, None), ("inotify_init1", 294, 26),
    # large and little used parts of the kernel
    ("bpf", 321, 280), ("seccomp", 317, 277), ("perf_event_open", 298, 241), ("userfaultfd", 323, 282),
    ("io_uring_setup", 425, 425), ("io_uring_enter", 426, 426), ("io_uring_register", 427, 427), ("io_setup", 206, 0),
    ("io_submit", 209, 2), ("io_destroy", 207, 1), ("io_getevents", 208, 4), ("io_cancel", 210, 3),
    ("io_pgetevents", 333, 292), ("memfd_create", 319, 279), ("memfd_secret", 447, 447), ("vmsplice", 278, 75),
    ("splice", 275, 76), ("tee", 276, 77), ("remap_file_pages", 216, 234), ("modify_ldt", 154, None), ("uselib", 134, None),
    ("ustat", 136, None), ("sysfs", 139, None), ("_sysctl", 156, None), ("nfsservctl", 180, 42),
    ("lookup_dcookie", 212, 18),
    # keys
    ("keyctl", 250, 219), ("add_key", 248, 217), ("request_key", 249, 218),
    # sockets of every family
    ("socket", 41, 198), ("socketpair", 53, 199), ("connect", 42, 203), ("bind", 49, 200), ("listen", 50, 201),
    ("accept", 43, 202), ("accept4", 288, 242), ("sendto", 44, 206), ("sendmsg", 46, 211), ("sendmmsg", 307, 269),
    ("recvfrom", 45, 207), ("recvmsg", 47, 212), ("recvmmsg", 299, 243),
    # messages between processes
    ("shmget", 29, 194), ("shmat", 30, 196), ("shmctl", 31, 195), ("shmdt", 67, 197), ("msgget", 68, 186),
    ("msgsnd", 69, 189), ("msgrcv", 70, 188), ("msgctl", 71, 187), ("semget", 64, 190), ("semop", 65, 193),
    ("semctl", 66, 191), ("semtimedop", 220, 192), ("mq_open", 240, 180), ("mq_unlink", 241, 181), ("mq_notify", 244, 184),
    ("mq_getsetattr", 245, 185), ("mq_timedsend", 242, 182), ("mq_timedreceive", 243, 183),
    # the machine
    ("iopl", 172, None), ("ioperm", 173, None), ("kexec_load", 246, 104), ("kexec_file_load", 320, 294),
    ("init_module", 175, 105), ("finit_module", 313, 273), ("delete_module", 176, 106), ("reboot", 169, 142),
    ("syslog", 103, 116), ("acct", 163, 89), ("settimeofday", 164, 170), ("clock_settime", 227, 112),
    ("clock_adjtime", 305, 266), ("adjtimex", 159, 171), ("sethostname", 170, 161), ("setdomainname", 171, 162),
    ("vhangup", 153, 58), ("personality", 135, 92),
    # memory of other nodes, priorities
    ("get_mempolicy", 239, 236), ("set_mempolicy", 238, 237), ("mbind", 237, 235), ("migrate_pages", 256, 238),
    ("move_pages", 279, 239), ("set_mempolicy_home_node", 450, 450), ("sched_setscheduler", 144, 119),
    ("sched_setattr", 314, 274), ("ioprio_set", 251, 30),
    # identities
    ("setuid", 105, 146), ("setgid", 106, 144), ("setreuid", 113, 145), ("setregid", 114, 143), ("setresuid", 117, 147),
    ("setresgid", 119, 149), ("setgroups", 116, 159), ("setfsuid", 122, 151), ("setfsgid", 123, 152), ("capset", 126, 91),
    # limits (prlimit64 may still be asked what they are, see below)
    ("setrlimit", 160, 164),
)  # fmt: skip


class Machine(NamedTuple):
    """Column of DENIED, AUDIT_ARCH of linux/audit.h, and the numbers of calls that are refused for some arguments."""

    column: int
    arch: int
    clone: int
    clone3: int
    ioctl: int
    prlimit64: int


MACHINES = {"x86_64": Machine(1, 0xC000003E, 56, 435, 16, 302), "aarch64": Machine(2, 0xC00000B7, 220, 435, 29, 261)}
#: Later calls than cachestat(2) are unknown here: programs are told that the kernel has none of them.
_LAST_KNOWN = 451
_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020080
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: typing into the user's terminal
_LOAD, _EQUAL, _GREATER, _SET, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
# Offsets in struct seccomp_data: the lower words of the arguments, of the third the upper one, too.
_NUMBER, _ARCH, _FIRST, _SECOND, _THIRD, _THIRD_UPPER = 0, 4, 16, 24, 32, 36
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

Instruction = tuple[int, int, int, int]


def program(machine: str) -> list[Instruction]:
    """The filter as (code, jump if true, jump if false, k), for classic BPF.

    Args:
        machine: a key of `MACHINES`.
    """
    column, arch, clone, clone3, ioctl, prlimit64 = MACHINES[machine]
    refuse, unknown = (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
    steps: list[Instruction] = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    steps += [(_GREATER, 0, 1, _LAST_KNOWN), unknown]  # also x86_64's second table (x32), which starts at 2**30
    steps += [(_EQUAL, 0, 1, clone3), unknown]  # its flags lie in memory; libraries fall back to clone
    # Threads are started with clone; everything else that it makes is refused.
    steps += [(_EQUAL, 0, 5, clone), (_LOAD, 0, 0, _FIRST), (_SET, 1, 0, _CLONE_NEW), (_SET, 1, 0, _CLONE_THREAD)]
    steps += [refuse, (_RETURN, 0, 0, _ALLOW)]
    steps += [(_EQUAL, 0, 4, ioctl), (_LOAD, 0, 0, _SECOND), (_EQUAL, 1, 0, _TERMINAL_INPUT[0])]
    steps += [(_EQUAL, 0, 1, _TERMINAL_INPUT[1]), refuse, (_LOAD, 0, 0, _NUMBER)]
    # prlimit64 with new limits, which would be lower ones: without one on dumps, they would go to a program outside.
    steps += [(_EQUAL, 0, 5, prlimit64), (_LOAD, 0, 0, _THIRD), (_EQUAL, 0, 2, 0), (_LOAD, 0, 0, _THIRD_UPPER)]
    steps += [(_EQUAL, 1, 0, 0), refuse, (_LOAD, 0, 0, _NUMBER)]
    for row in DENIED:
        number = row[column]
        if isinstance(number, int):
            steps += [(_EQUAL, 0, 1, number), refuse]
    return [*steps, (_RETURN, 0, 0, _ALLOW)]


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def install(machine: str) -> None:
    """From here on the filter holds for this thread and all that it starts or becomes. Needs no_new_privs."""
    steps = program(machine)
    packed = b"".join(struct.pack("HBBI", *step) for step in steps)
    filtered = _Filter(len(steps), packed)
    kernel.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(filtered))
