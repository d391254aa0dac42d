"""Programs that try to get out, to take the machine or to be counted right: each is held, by every backend that this machine has.

A program is right if it writes what the test expects, and it writes that only where it did what it must not: so none may be right.
"""

from __future__ import annotations

import functools
import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from structcot.errors import ConfigError
from structcot.eval.problem import Problem, ProgramTest
from structcot.grading.case import Grade
from structcot.grading.code import grade_program
from structcot.sandbox.backend import Backend, choose_backend
from structcot.sandbox.process import Limits

BACKENDS = ("bubblewrap", "landlock")
# Stands in the command of every process of these tests and of no other, so that one that is left can be found.
MEMORY_BYTES = (1 << 29) + os.getpid() * 4096
LIMITS = Limits(seconds=1.0, memory_bytes=MEMORY_BYTES, threads=16, output_bytes=1 << 20)
ESCAPED = "ESCAPED"
GROWTH_KIB = 64 << 10

# Every program may use these; it says by escaped() that it did what it must not. Files are opened by `os`: `open` is not the real one.
PRELUDE = """
import ctypes, os, signal, socket, subprocess, sys, threading, time
def escaped():
    print("ESC" + "APED")
    sys.exit()
def read(path):
    fd = os.open(path, os.O_RDONLY)
    return os.read(fd, 1 << 16)
def attempt(action, *arguments):
    try:
        return action(*arguments)
    except Exception:
        return None
libc = ctypes.CDLL(None, use_errno=True)
parent = int(input())
folder = input()
port = int(input())
"""

PROGRAMS = {
    "forks as often as it can": "while True:\n    attempt(os.fork)",
    "forks by bare system calls": """
fork, vfork, clone, clone3 = {'x86_64': (57, 58, 56, 435), 'aarch64': (1079, 1071, 220, 435)}[os.uname().machine]
if libc.syscall(fork) >= 0 or libc.syscall(vfork) >= 0 or libc.syscall(clone, 17, 0, 0, 0, 0) >= 0:
    escaped()
if libc.syscall(clone3, ctypes.create_string_buffer(88), 88) >= 0:
    escaped()
""",
    "leaves a daemon": """
if attempt(os.fork) == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    escaped()
""",
    "allocates 100 GB": "bytearray(100 << 30)\nescaped()",
    "allocates piece by piece": "kept = []\nwhile len(kept) < 100:\n    kept.append(bytearray(b'x') * (10 << 20))\nescaped()",
    "allocates and catches the error": """
kept = []
while True:
    try:
        kept.append(bytearray(b'x') * (10 << 20))
    except MemoryError:
        pass
""",
    "prints without end": "while True:\n    print('x' * 1000)",
    "writes to every descriptor without end": """
while True:
    for fd in range(64):
        attempt(os.write, fd, b'x' * 4096)
""",
    "answers for its checker": """
for fd in range(64):
    for answer in (b'l', b'wESCAPED?', b'r"x"', b'correct', b'{"verdict": "correct"}'):
        attempt(os.write, fd, len(answer).to_bytes(8, 'little') + answer)
""",
    "announces an answer of 2**63 bytes": "for fd in range(3, 64):\n    attempt(os.write, fd, (1 << 63).to_bytes(8, 'little'))",
    "loops": "while True:\n    pass",
    "sleeps": "time.sleep(1000)",
    "catches everything": """
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
""",
    "ignores all signals and then waits": """
for number in range(1, 65):
    attempt(signal.signal, number, signal.SIG_IGN)
while True:
    time.sleep(1)
""",
    "stops itself": "os.kill(os.getpid(), signal.SIGSTOP)\nsignal.raise_signal(signal.SIGSTOP)\nescaped()",
    "recurses without end": "def f(n):\n    return f(n + 1) + 1\nf(0)\nescaped()",
    "recurses in C without end": "import functools\n@functools.lru_cache(None)\ndef f(n):\n    return f(n + 1) + 1\nf(0)\nescaped()",
    "reads at address 0": "ctypes.string_at(0)",
    "reads /etc/passwd": "if b'root' in (attempt(read, '/etc/passwd') or b''):\n    escaped()",
    "reads the environment of other processes": """
given = {b'PATH', b'HOME', b'LANG', b'PYTHONHASHSEED'}
for pid in (parent, 1, os.getppid(), 'self', *(attempt(os.listdir, '/proc') or ())):
    names = {line.split(b'=')[0] for line in (attempt(read, f'/proc/{pid}/environ') or b'').split(b'\\0') if line}
    if names - given or set(os.environb) - given:
        escaped()
""",
    "reads the memory of its parent": "if attempt(os.open, f'/proc/{parent}/mem', os.O_RDONLY) is not None:\n    escaped()",
    "lists folders": """
if any(attempt(os.listdir, path) for path in ('/proc', folder, os.path.dirname(folder))) or 'passwd' in (attempt(os.listdir, '/etc') or ()):
    escaped()
""",
    "reads a file of ours": "if attempt(read, folder + '/kept'):\n    escaped()",
    "writes a file of ours": "if attempt(os.open, folder + '/kept', os.O_WRONLY) is not None:\n    escaped()",
    "changes its own interpreter": """
for path in (os.__file__, sys.executable, '/etc/ld.so.cache', '/usr/lib/os-release', json.__file__):
    for mode in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND):
        if attempt(os.open, path, mode) is not None:
            escaped()
""",
    "truncates a file of ours": "attempt(os.truncate, folder + '/kept', 0)",
    "removes a file of ours": "attempt(os.unlink, folder + '/kept')",
    "changes the mode of a file of ours": "attempt(os.chmod, folder + '/kept', 0)",
    "writes wherever it can": """
for place in (folder, '/', '/tmp', '/dev', '/dev/shm', '/var/tmp', '/run', os.path.dirname(os.__file__), os.getcwd()):
    if attempt(os.open, place + '/structcot-left', os.O_WRONLY | os.O_CREAT) is not None or attempt(os.mkdir, place + '/structcot-left'):
        escaped()
""",
    "writes a big file": """
for place in (folder, '/tmp', '/dev/shm'):
    fd = attempt(os.open, place + '/structcot-left', os.O_WRONLY | os.O_CREAT)
    while fd is not None:
        os.write(fd, b'x' * (1 << 20))
""",
    "fills memory that looks like a file": "if attempt(os.memfd_create, 'x') is not None:\n    escaped()",
    "escapes by a symbolic link": """
for place in (folder, '/tmp'):
    attempt(os.symlink, '/etc/passwd', place + '/structcot-left')
    if attempt(read, place + '/structcot-left'):
        escaped()
""",
    "escapes by a hard link": """
for place in (folder, '/tmp'):
    attempt(os.link, folder + '/kept', place + '/structcot-left')
    if attempt(read, place + '/structcot-left'):
        escaped()
""",
    "writes below /proc/self": """
for name, text in (('oom_score_adj', b'-1000'), ('uid_map', b'0 0 1'), ('mem', b'x'), ('coredump_filter', b'1')):
    fd = attempt(os.open, '/proc/self/' + name, os.O_WRONLY)
    if fd is not None and attempt(os.write, fd, text):
        escaped()
""",
    "connects on loopback": "if attempt(socket.create_connection, ('127.0.0.1', port), 0.5):\n    escaped()",
    "connects outside": "if attempt(socket.create_connection, ('1.1.1.1', 53), 0.5):\n    escaped()",
    "listens": "if attempt(socket.create_server, ('127.0.0.1', 0)):\n    escaped()",
    "looks up a name": "if attempt(socket.getaddrinfo, 'localhost', 80) or attempt(socket.getaddrinfo, 'example.com', 80):\n    escaped()",
    "makes a local socket": "if attempt(socket.socket, socket.AF_UNIX, socket.SOCK_STREAM):\n    escaped()",
    "kills its parent": "for pid in (parent, os.getppid()):\n    attempt(os.kill, pid, signal.SIGKILL)",
    "kills everyone": "attempt(os.kill, -1, signal.SIGKILL)",
    "kills its group": "attempt(os.killpg, 0, signal.SIGKILL)\nattempt(os.kill, 0, signal.SIGKILL)",
    "kills by a descriptor": """
fd = attempt(os.pidfd_open, parent)
if fd is not None:
    signal.pidfd_send_signal(fd, signal.SIGKILL)
""",
    "has the kernel signal its parent": """
import fcntl
r, w = os.pipe()
attempt(fcntl.fcntl, r, 10, signal.SIGKILL)
attempt(fcntl.fcntl, r, fcntl.F_SETOWN, parent)
attempt(fcntl.fcntl, r, fcntl.F_SETFL, os.O_ASYNC)
os.write(w, b'x')
""",
    "traces its parent": "if libc.ptrace(16, parent, 0, 0) == 0 or libc.ptrace(0x4206, parent, 0, 0) == 0:\n    escaped()",
    "reads another process by the kernel": """
buffer = ctypes.create_string_buffer(8)
vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
if libc.process_vm_readv(parent, vector, 1, vector, 1, 0) >= 0:
    escaped()
""",
    "makes a user namespace": "if libc.unshare(0x10000000) == 0 or libc.unshare(0x20000) == 0 or libc.setns(0, 0) == 0:\n    escaped()",
    "mounts": "if libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 or libc.umount2(b'/', 2) == 0:\n    escaped()",
    "changes its root": "if attempt(os.chroot, folder) is not None or libc.chroot(b'/usr') == 0:\n    escaped()",
    "becomes another user": "if libc.setuid(0) == 0 or libc.setresuid(1, 1, 1) == 0 or libc.setgroups(0, None) == 0:\n    escaped()",
    "uses io_uring, bpf, perf, keys, userfaultfd": """
names = {'x86_64': (425, 321, 298, 250, 323), 'aarch64': (425, 280, 241, 219, 282)}[os.uname().machine]
buffer = ctypes.create_string_buffer(256)
if any(libc.syscall(number, 1, buffer, 0, 0, 0) >= 0 for number in names):
    escaped()
""",
    "raises its limits": """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
    attempt(resource.setrlimit, kind, (-1, -1))
    if resource.getrlimit(kind)[1] == -1 or attempt(resource.prlimit, parent, kind):
        escaped()
""",
    "becomes another program": """
attempt(os.execv, '/bin/sh', ['sh', '-c', 'echo ESCAPED'])
attempt(os.execv, sys.executable, ['python', '-c', 'print("ESCAPED")'])
if attempt(os.posix_spawn, sys.executable, ['python', '-c', ''], {}):
    escaped()
""",
    "starts another program": "attempt(subprocess.run, ['/bin/true']) and escaped()",
    "makes threads without end": """
stop = threading.Event()
while True:
    attempt(lambda: threading.Thread(target=stop.wait, daemon=True).start())
""",
    "makes threads by the C library": """
threading.stack_size(1 << 15)
lock = threading.Lock()
lock.acquire()
import _thread
while True:
    attempt(_thread.start_new_thread, lock.acquire, ())
""",
    "waits in a thread that outlives it": "threading.Thread(target=time.sleep, args=(1000,)).start()",
    "reads what it inherited": """
import stat
for fd in range(3, 1000):
    status = attempt(os.fstat, fd)
    if status and not stat.S_ISFIFO(status.st_mode) and not stat.S_ISCHR(status.st_mode):
        escaped()
""",
    "looks for the expected output in memory": """
import gc, inspect
wanted = 'ESC' + 'APED'
frames = [info.frame for info in inspect.stack()]
texts = [value for frame in frames for value in (*frame.f_locals.values(), *frame.f_globals.values()) if isinstance(value, str)]
for thing in gc.get_objects():
    for inner in gc.get_referents(thing):
        if isinstance(inner, str):
            texts.append(inner)
if any(text.strip() == wanted for text in texts if text is not wanted and len(text) < 20 and text not in ('ESC', 'APED')):
    escaped()
""",
    "replaces the functions of its checker": """
checker = sys._getframe()
while checker.f_back:
    checker = checker.f_back
import json, builtins
class Same(str):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = str.__hash__
for frame in (sys._getframe(depth) for depth in range(5)):
    names = frame.f_globals
    for name in ('WROTE', 'RETURNED', 'LOADED'):
        if name in names:
            names[name] = Same('w')
    if '_send' in names:
        names['plain'] = lambda value: Same('x')
json.loads = json.dumps = lambda *_, **__: Same('x')
builtins.all = builtins.any = lambda *_: True
builtins.len = lambda *_: 0
sys.modules['decimal'] = None
print(Same('x'))
""",
    "leaves by sys.exit(0)": "sys.exit(0)",
    "leaves by os._exit(0)": "os._exit(0)",
    "raises what cannot be told": """
class Odd(BaseException):
    def __str__(self):
        while True:
            pass
raise Odd
""",
    "raises a gigabyte": "raise ValueError('x' * (1 << 28))",
    "closes all descriptors": "os.closerange(0, 64)\nprint('x')",
    "replaces standard output": "sys.stdout = sys.__stdout__ = None",
    "makes a system call of another architecture": """
import mmap
if os.uname().machine == 'x86_64':
    code = mmap.mmap(-1, 4096, prot=7)
    code.write(bytes.fromhex('b814000000cd80c3'))
    pid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
    escaped()
""",
    "prints that it is right": "print('correct\\npassed all 1 tests')",
}


@functools.cache
def backend_of(kind: str) -> Backend | str:
    try:
        return choose_backend(kind)
    except ConfigError as error:
        return str(error)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    found = backend_of(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture
def port() -> Iterator[int]:
    """A port of this process on which nobody may call."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server.getsockname()[1]
        with pytest.raises(BlockingIOError):
            server.accept()


def is_ours(pid: str) -> bool:
    try:
        return str(MEMORY_BYTES).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def processes_left() -> list[str]:
    """The processes of these tests that still run, once they had the time to be gone."""
    deadline = time.monotonic() + 2
    while (left := [pid for pid in os.listdir("/proc") if pid.isdigit() and is_ours(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def judge(program: str, backend: Backend, folder: Path, port: int) -> Grade:
    problem = Problem(id="hostile", question="", tests=(ProgramTest(input=f"{os.getpid()}\n{folder}\n{port}\n", output=f"{ESCAPED}\n"),))
    return grade_program(f"```python\n{PRELUDE}{program}\n```", problem, backend, LIMITS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_is_held_and_never_right(name: str, backend: Backend, port: int, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("ours")
    mode, peak = kept.stat().st_mode, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    grade = judge(PROGRAMS[name], backend, tmp_path, port)
    assert grade.verdict == "wrong", grade.reason
    assert time.monotonic() - start < 30
    assert processes_left() == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + GROWTH_KIB
    assert sorted(tmp_path.iterdir()) == [kept]
    assert (kept.read_text(), kept.stat().st_mode) == ("ours", mode)
    assert not any(Path(place, "structcot-left").exists() for place in ("/tmp", "/dev/shm", "/var/tmp", "/", os.path.dirname(os.__file__)))


def test_a_program_that_does_what_it_must_not_would_be_seen(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        grade = judge("escaped()", choose_backend("none"), tmp_path, server.getsockname()[1])
    assert grade.verdict == "correct", grade.reason
