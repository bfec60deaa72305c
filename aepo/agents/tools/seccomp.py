"""The system calls that a program in the Python sandbox may use, as a seccomp filter.

What is not in `ALLOWED` fails with EPERM: there is no call that opens a file, makes a socket, starts or signals a
process, or changes the program's own rights. Written here because libseccomp has no maintained Python binding, and
the sandboxes on PyPI that do more want a kernel (Landlock ABI 6, Linux 6.12) that most distributions do not run yet.
"""

from __future__ import annotations

import struct

# name: (number on x86_64, number on aarch64). A test compares them with the kernel's headers.
ALLOWED: dict[str, tuple[int, int | None]] = {
    # the only open descriptors are 0, 1 and 2: the connection
    "read": (0, 63),
    "write": (1, 64),
    "writev": (20, 66),
    "close": (3, 57),
    "lseek": (8, 62),  # says that the connection has no position
    # memory
    "mmap": (9, 222),  # with MAP_FLAGS only
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    # signal handlers and locks of this one process
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "futex": (202, 98),
    "sched_yield": (24, 124),
    # time
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "select": (23, None),  # how Python 3.10 sleeps
    "pselect6": (270, 72),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "getrusage": (98, 165),
    "times": (100, 153),
    # numbers about itself, random bytes, the end
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getrandom": (318, 278),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
# machine: (column of the table above, AUDIT_ARCH_* of linux/audit.h)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, as malloc uses them. One page that stays mapped of a shared mapping keeps
# all of it in memory, and RLIMIT_AS counts that page only.
MAP_FLAGS = 0x02 | 0x20 | 0x4000

_LOAD, _AND, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06  # opcodes of classic BPF
_ALLOW, _EPERM, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # SECCOMP_RET_*
_NUMBER, _ARCH, _FOURTH_ARGUMENT = 0, 4, 40  # offsets in struct seccomp_data; of the argument, the lower half


def filter_program(machine: str) -> bytes:
    """The filter for `platform.machine()` as an array of `struct sock_filter`; ValueError where there is none.

    The architecture is checked first: 32-bit system calls on a 64-bit kernel have other numbers, and kill the process.
    """
    if machine not in MACHINES:
        raise ValueError(f"machine must be one of {', '.join(MACHINES)}, got {machine!r}")
    column, arch = MACHINES[machine]
    known = {name: number for name, entry in ALLOWED.items() if (number := entry[column]) is not None}
    mmap = known.pop("mmap")
    numbers = list(known.values())
    program = [(_LOAD, 0, 0, _ARCH), (_JUMP_IF_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    # mmap: other flags than these leave something of the argument; any other call jumps over the check
    program += [(_JUMP_IF_EQUAL, 0, 3, mmap), (_LOAD, 0, 0, _FOURTH_ARGUMENT), (_AND, 0, 0, 0xFFFFFFFF & ~MAP_FLAGS)]
    program += [(_JUMP_IF_EQUAL, len(numbers) + 1, len(numbers), 0)]
    # a match jumps over the remaining comparisons and the EPERM
    program += [(_JUMP_IF_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    program += [(_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
