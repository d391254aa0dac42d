"""What the new process does before it runs the program: it gives up all that a program must not have. Standard library only.

Started as `python -c <this text> <settings as JSON>` with the program's text on standard input, ahead of the program's own input. It sets
limits, drops privileges, closes files to itself by Landlock (if the backend asks for it) and system calls by a seccomp filter; reports on
a pipe that it did; and turns into the program. Nothing of it can be undone from inside.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import stat
import struct
import sys
from typing import Any

READY = b"ready"
# How the process ends where the program ran out of memory and did not catch it.
OUT_OF_MEMORY_STATUS = 113
OPEN_FILES = 64
_HIGHEST_FD = 65536

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522

# The same numbers on all architectures.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_ASKED = 1
_RULE_PATH_BENEATH = 1
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
# What each version of Landlock can forbid of files, of network, and of reaching processes outside, up to the newest that is known here.
_FILE_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
_NETWORK_SINCE, _NETWORK_RIGHTS = 4, 0b11
_SCOPE_SINCE, _SCOPES = 6, 0b11


def main() -> None:
    """Take the settings and the program, confine this process, and run the program."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    text = _read_exactly(0, settings["program_bytes"])
    if settings["parent"] and os.getppid() != settings["parent"]:
        raise SystemExit("the process that wanted this program is gone")
    libc = _c_library()
    if settings["parent"]:
        _check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "the signal of the parent's death")
    os.chdir("/")
    os.environ.pop("PWD", None)  # left by bwrap
    _close_files(settings["status_fd"])
    _set_limits(settings)
    if settings["filter"]:
        _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
        _check(libc.capset(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)), "dropping capabilities")
        if settings["readable"]:
            _restrict_files(libc, settings["readable"], settings["writable"])
        _install_filter(libc, bytes.fromhex(settings["filter"]))
    os.write(settings["status_fd"], READY)
    os.close(settings["status_fd"])
    _run(text)


def _read_exactly(fd: int, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise SystemExit("the program did not arrive")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _c_library() -> ctypes.CDLL:
    """The C library, given whole registers: of some arguments the kernel looks at all 64 bits."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 4
    libc.syscall.argtypes = [ctypes.c_long] + [ctypes.c_void_p] * 4
    libc.syscall.restype = ctypes.c_long
    return libc


def _check(result: int, what: str) -> int:
    if result < 0:
        raise SystemExit(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _close_files(kept: int) -> None:
    """Close all but the three standard files and `kept`."""
    os.closerange(3, kept)
    os.closerange(kept + 1, _HIGHEST_FD)


def _set_limits(settings: dict[str, Any]) -> None:
    """Bound this process. The soft limit on processor time sends a signal, the hard one kills a program that ignores it."""
    seconds, memory = settings["cpu_seconds"], settings["memory_bytes"]
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
    ):
        allowed = resource.getrlimit(kind)[1]
        bounded = [value if allowed == resource.RLIM_INFINITY else min(value, allowed) for value in (soft, hard)]
        resource.setrlimit(kind, (bounded[0], bounded[1]))


def _restrict_files(libc: ctypes.CDLL, readable: list[str], writable: list[str]) -> None:
    """Leave no file but those below `readable`, to read, and the devices `writable`; nothing can be made, renamed or removed."""
    version = _check(libc.syscall(_CREATE_RULESET, None, 0, _VERSION_ASKED, 0), "Landlock")
    files = _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]
    network = _NETWORK_RIGHTS if version >= _NETWORK_SINCE else 0
    scopes = _SCOPES if version >= _SCOPE_SINCE else 0
    attributes = struct.pack("=QQQ", files, network, scopes)
    ruleset = _check(libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0, 0), "making a Landlock ruleset")
    for path in (*readable, *writable):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        is_folder = stat.S_ISDIR(os.fstat(fd).st_mode)
        rights = _READ_FILE | (_READ_DIR if is_folder else 0) | (_WRITE_FILE if path in writable else 0)
        rule = struct.pack("=Qi", rights, fd)
        _check(libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0), f"allowing {path}")
        os.close(fd)
    _check(libc.syscall(_RESTRICT_SELF, ruleset, 0, 0, 0), "Landlock")
    os.close(ruleset)


def _install_filter(libc: ctypes.CDLL, program: bytes) -> None:
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    _check(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0), "the filter of system calls")


def _run(text: bytes) -> None:
    """Run the program as `__main__`, as the interpreter would, but say by the exit status that it ran out of memory."""
    module = type(sys)("__main__")
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    sys.argv[:] = ["program"]
    try:
        exec(compile(text, "<program>", "exec"), module.__dict__)
    except MemoryError:
        os._exit(OUT_OF_MEMORY_STATUS)


if __name__ == "__main__":
    main()
