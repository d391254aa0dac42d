"""Which system calls a program in the sandbox may make, as a seccomp filter: a list of what is allowed, all else is refused.

A program may compute, read what it can open, write to what is open, start threads and wait. It may not start a process or another
program, signal anyone, open a socket, change or make a file, or reach for the kernel's rarer services (mounts, namespaces, keys, tracing,
io_uring, bpf ...): those calls are simply not in the table. A refused call fails with EPERM, one newer than the table with ENOSYS, for
which the C library has other ways. Calls for another architecture end the process.

The numbers are those of Linux's own headers, asm/unistd_64.h and asm-generic/unistd.h.
"""

from __future__ import annotations

import errno
import struct

# Name, number on x86_64, number on aarch64; "-" where the architecture has no such call.
_ALLOWED = """
read 0 63 | write 1 64 | readv 19 65 | writev 20 66 | pread64 17 67 | pwrite64 18 68 | lseek 8 62 | close 3 57 | close_range 436 436
open 2 - | openat 257 56 | stat 4 - | lstat 6 - | fstat 5 80 | newfstatat 262 79 | statx 332 291
access 21 - | faccessat 269 48 | faccessat2 439 439 | getdents 78 - | getdents64 217 61 | getcwd 79 17 | umask 95 166
dup 32 23 | dup2 33 - | dup3 292 24 | pipe 22 - | pipe2 293 59 | eventfd2 290 19
poll 7 - | ppoll 271 73 | select 23 - | pselect6 270 72
epoll_create 213 - | epoll_create1 291 20 | epoll_ctl 233 21 | epoll_wait 232 - | epoll_pwait 281 22
mmap 9 222 | munmap 11 215 | mprotect 10 226 | mremap 25 216 | madvise 28 233 | brk 12 214 | arch_prctl 158 -
futex 202 98 | set_robust_list 273 99 | get_robust_list 274 100 | rseq 334 293 | membarrier 324 283 | set_tid_address 218 96
rt_sigaction 13 134 | rt_sigprocmask 14 135 | rt_sigreturn 15 139 | rt_sigpending 127 136 | rt_sigsuspend 130 133
rt_sigtimedwait 128 137 | sigaltstack 131 132 | pause 34 - | restart_syscall 219 128
exit 60 93 | exit_group 231 94 | wait4 61 260 | waitid 247 95 | sched_yield 24 124 | sched_getaffinity 204 123
time 201 - | gettimeofday 96 169 | clock_gettime 228 113 | clock_getres 229 114 | clock_nanosleep 230 115 | nanosleep 35 101
alarm 37 - | getitimer 36 102 | setitimer 38 103 | times 100 153 | getrusage 98 165 | getrlimit 97 163
getpid 39 172 | getppid 110 173 | gettid 186 178 | getpgrp 111 - | getpgid 121 155 | getsid 124 156
getuid 102 174 | geteuid 107 175 | getgid 104 176 | getegid 108 177 | getgroups 115 158 | getresuid 118 148 | getresgid 120 150
uname 63 160 | sysinfo 99 179 | getcpu 309 168 | getrandom 318 278
"""
# Allowed for some values of one argument: name, numbers, which argument, and its values.
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
_FCNTL = (0, 1, 2, 3, 4, 1030, 1032)  # duplicate, flags, pipe size; not F_SETOWN, by which the kernel would signal another process
_PRCTL = (3, 15, 16)  # PR_GET_DUMPABLE PR_SET_NAME PR_GET_NAME
_THIS_PROCESS = (0,)
_ALLOWED_FOR = (
    (("ioctl", 16, 29), 1, _IOCTL),
    (("fcntl", 72, 25), 1, _FCNTL),
    (("prctl", 157, 167), 0, _PRCTL),
    (("prlimit64", 302, 261), 0, _THIS_PROCESS),
)
_CLONE = ("clone", 56, 220)
_CLONE_THREAD = 0x10000
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME.
_CLONE_NAMESPACES = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x80
# Since 5.1 all architectures number new calls alike. The C library falls back where one of these does not exist: clone3 to clone, whose
# flags a filter can read.
_FIRST_COMMON_NUMBER = 424

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
MACHINES = tuple(_AUDIT_ARCH)

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_KILL, _ALLOW, _ERROR = 0x80000000, 0x7FFF0000, 0x00050000
# Offsets in struct seccomp_data: number, architecture, six arguments of 64 bits, of which the low halves are read.
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16


def allowed_numbers(machine: str) -> dict[str, int]:
    """The calls that are allowed whatever their arguments, with their numbers on `machine`, "x86_64" or "aarch64"."""
    rows = [entry.split() for line in _ALLOWED.strip().splitlines() for entry in line.split("|")]
    numbers = {row[0]: row[1 + MACHINES.index(machine)] for row in rows}
    return {name: int(number) for name, number in numbers.items() if number != "-"}


def filter_program(machine: str) -> bytes:
    """The filter as the kernel takes it, an array of struct sock_filter, for one of `MACHINES`."""
    column = 1 + MACHINES.index(machine)
    code = [
        _instruction(_LOAD, _ARCHITECTURE_AT),
        *_unless_equal(_AUDIT_ARCH[machine], _return(_KILL)),
        _instruction(_LOAD, _NUMBER_AT),
    ]
    for number in allowed_numbers(machine).values():
        code += _if_equal(number, [_return(_ALLOW)])
    for row, argument, values in _ALLOWED_FOR:
        accept = [instruction for value in values for instruction in _if_equal(value, [_return(_ALLOW)])]
        code += _if_equal(int(row[column]), [_load_argument(argument), *accept, _return(_ERROR | errno.EPERM)])
    only_a_thread = [
        _load_argument(0),
        _instruction(_AND, _CLONE_THREAD | _CLONE_NAMESPACES),
        *_if_equal(_CLONE_THREAD, [_return(_ALLOW)]),
        _return(_ERROR | errno.EPERM),
    ]
    code += _if_equal(int(_CLONE[column]), only_a_thread)
    code += [_instruction(_JUMP_AT_LEAST, _FIRST_COMMON_NUMBER, 0, 1), _return(_ERROR | errno.ENOSYS), _return(_ERROR | errno.EPERM)]
    return b"".join(code)


def _instruction(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, if_true, if_false, value)


def _return(action: int) -> bytes:
    return _instruction(_RETURN, action)


def _load_argument(index: int) -> bytes:
    return _instruction(_LOAD, _ARGUMENTS_AT + 8 * index)


def _if_equal(value: int, then: list[bytes]) -> list[bytes]:
    """Do `then` if what was loaded is `value`; it ends in a return, or loads nothing."""
    return [_instruction(_JUMP_EQUAL, value, 0, len(then)), *then]


def _unless_equal(value: int, otherwise: bytes) -> list[bytes]:
    return [_instruction(_JUMP_EQUAL, value, 1, 0), otherwise]
