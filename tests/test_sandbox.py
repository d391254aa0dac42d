"""Running a program apart: what it is given, how it may end, what is kept of it, and which way of keeping it in is chosen."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structcot.errors import ConfigError
from structcot.sandbox import backend as backends
from structcot.sandbox import process as processes
from structcot.sandbox.backend import CHOICES, ENVIRONMENT, Backend, choose_backend
from structcot.sandbox.probe import find_hole
from structcot.sandbox.process import ENDINGS, Limits, SandboxFailure, running
from structcot.sandbox.run import Run, run_program
from structcot.sandbox.syscalls import MACHINES, allowed_numbers, filter_program

LIMITS = Limits(seconds=20.0, memory_bytes=1 << 30)
HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


@functools.cache
def found(kind: str) -> Backend | str:
    try:
        return choose_backend(kind)
    except ConfigError as error:
        return str(error)


@pytest.fixture(params=["bubblewrap", "landlock"])
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen = found(request.param)
    if isinstance(chosen, str):
        pytest.skip(chosen)
    return chosen


def run(text: str, backend: Backend, stdin: bytes = b"", **limits: float) -> Run:
    return run_program(text, backend, Limits(**{"seconds": 20.0, "memory_bytes": 1 << 30, **limits}), stdin)  # pyright: ignore


def test_a_program_reads_its_input_and_writes_its_output(backend: Backend) -> None:
    done = run("import sys\nprint(sys.stdin.read().upper())\nprint('aside', file=sys.stderr)", backend, "grüße".encode())
    assert (done.stdout, done.stderr, done.exit_status, done.ending) == ("GRÜSSE\n".encode(), b"aside\n", 0, "exited")
    assert 0 < done.seconds < 20


@pytest.mark.parametrize(
    ("text", "ending", "status"),
    [
        ("raise SystemExit(7)", "exited", 7),
        ("1 / 0", "exited", 1),
        ("import os; os._exit(3)", "exited", 3),
        ("import ctypes; ctypes.string_at(0)", "signal", -11),
        ("bytearray(1 << 40)", "memory", 113),
        ("kept = []\nwhile True: kept.append(bytes(1 << 20))", "memory", 113),
    ],
)
def test_a_program_that_ends_by_itself_says_how(text: str, ending: str, status: int, backend: Backend) -> None:
    done = run(text, backend)
    assert (done.ending, done.exit_status) == (ending, status)
    assert ending in ENDINGS


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("import time; time.sleep(600)", "time"),
        ("while True: pass", "time"),
        ("import sys\nwhile True: sys.stdout.write('x' * 65536)", "output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 65536)", "output"),
        ("import threading\nfor _ in range(20): threading.Thread(target=threading.Event().wait).start()", "threads"),
    ],
)
def test_a_program_that_passes_a_limit_is_stopped(text: str, ending: str, backend: Backend) -> None:
    done = run(text, backend, seconds=1.5, threads=8, output_bytes=1 << 20)
    assert (done.ending, done.exit_status) == (ending, None)
    assert max(len(done.stdout), len(done.stderr)) <= 1 << 20
    assert done.seconds < 5


def test_as_many_threads_as_are_allowed_may_run(backend: Backend) -> None:
    text = """
import threading, time
def wait(): time.sleep(0.3); print("x", end="", flush=True)
for _ in range(7): threading.Thread(target=wait).start()
"""
    done = run(text, backend, threads=8)
    assert (done.ending, done.stdout) == ("exited", b"x" * 7)


def test_threads_with_large_stacks_may_recurse_deeply(backend: Backend) -> None:
    text = """
import sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(512 << 20)
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
threading.Thread(target=lambda: print(depth(200000))).start()
"""
    done = run(text, backend, memory_bytes=4 << 30)
    assert (done.stdout, done.ending) == (b"200000\n", "exited"), done.stderr


@pytest.mark.slow
def test_processor_time_is_bounded_apart_from_wall_time(backend: Backend) -> None:
    with running("while True: pass", backend, LIMITS, cpu_seconds=0.5) as one:
        assert one.wait(lambda: False, 60.0) == "time"
    ignoring = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    with running(ignoring, backend, LIMITS, cpu_seconds=0.5) as one:
        assert one.wait(lambda: False, 60.0) == "signal"
        assert one.exit_status == -9


def test_a_program_finds_an_empty_environment_and_no_files_but_the_interpreter(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSTARTUP", "/nothing")
    monkeypatch.setenv("STRUCTCOT_TEST_SECRET", "do-not-tell")
    done = run(
        "import os, sys\nprint(dict(os.environ), os.getcwd(), sys.argv, [p for p in sys.path if 'packages' in p], hash('x'))", backend
    )
    again = run("print(hash('x'))", backend)
    opened = run("import fcntl\nfor fd in range(1000):\n    try: fcntl.fcntl(fd, 1)\n    except OSError: continue\n    print(fd)", backend)
    assert opened.stdout == b"0\n1\n2\n"
    assert done.stdout.decode().startswith(f"{ENVIRONMENT} / ['program'] []"), done
    assert done.stdout.split()[-1] == again.stdout.strip()
    folders = (f"{sysconfig.get_path('stdlib')}/site-packages", str(Path(pytest.__file__).parent), str(Path(__file__).parent), "/proc/self")
    looks = f"import os\nfor path in {folders}:\n    try: print(*os.listdir(path), end='')\n    except OSError: pass"
    assert run(looks, backend).stdout == b""


def test_the_whole_standard_library_can_be_imported(backend: Backend) -> None:
    left_out = {"antigravity", "this", "idlelib", "turtledemo", "lib2to3"}
    names = sorted(name for name in sys.stdlib_module_names if not name.startswith("_") and name not in left_out)
    text = f"""
import importlib
for name in {names}:
    try: importlib.import_module(name)
    except ImportError as error:
        if "o module named" not in str(error): print(name, error)
"""
    done = run(text, backend, seconds=60)
    # Windows has them, or they need a screen.
    assert (done.ending, done.stdout) == ("exited", b""), done


def test_input_larger_than_a_pipe_arrives_and_may_be_left_unread(backend: Backend) -> None:
    data = os.urandom(3 << 20)
    done = run("import sys, hashlib\nprint(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())", backend, data)
    import hashlib

    assert done.stdout.decode().strip() == hashlib.sha256(data).hexdigest()
    assert run("import os\nos.close(0)\nprint('left')", backend, data).stdout == b"left\n"


def test_a_program_may_be_any_text(backend: Backend) -> None:
    assert run("x = 'ü\\udc80'\nprint(len(x), '𝄞')", backend).stdout == "2 𝄞\n".encode()
    assert b"null bytes" in run("print(1)\0", backend).stderr
    assert b"SyntaxError" in run("\udc80", backend).stderr
    long = "x = 1\n" * 100_000 + "print('end')"
    assert run(long, backend).stdout == b"end\n"


def test_messages_go_back_and_forth_until_a_program_ends(backend: Backend) -> None:
    text = """
import sys
def read(): return sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(8), "little"))
for _ in range(3):
    message = read()[::-1]
    sys.stdout.buffer.write(len(message).to_bytes(8, "little") + message)
    sys.stdout.buffer.flush()
"""
    with running(text, backend, LIMITS, cpu_seconds=20) as process:
        for message in (b"abc", b"", b"x" * (1 << 20) + b"y"):
            process.tell(message)
            assert process.hear(20.0) == ("", message[::-1])
        process.tell(b"more")
        assert process.hear(20.0) == ("exited", b"")


def test_many_threads_may_run_programs_at_once(backend: Backend) -> None:
    results: dict[int, bytes] = {}

    def work(number: int) -> None:
        results[number] = run(f"print({number} ** 2)", backend).stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: f"{number**2}\n".encode() for number in range(12)}


def test_no_descriptor_and_no_memory_is_left_behind(backend: Backend) -> None:
    run("print(1)", backend)
    before = len(os.listdir("/proc/self/fd"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        run("print(1)", backend)
        run("while True: print('x' * 60000)", backend, output_bytes=1 << 20)
    assert len(os.listdir("/proc/self/fd")) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 32 << 10


def test_a_program_dies_with_the_process_that_started_it(backend: Backend) -> None:
    text = f"""
import os, sys
from structcot.sandbox.backend import choose_backend
from structcot.sandbox.process import Limits, running
with running("import time; time.sleep(600)", choose_backend({backend.kind!r}), Limits(memory_bytes={MARK}), 9):
    print("runs", flush=True)
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert (done.stdout, done.returncode) == ("runs\n", -9), done.stderr
    assert marked_processes() == []


def test_without_a_sandbox_children_end_with_the_program() -> None:
    text = "import os, time\nif os.fork() == 0: time.sleep(600)"
    done = run_program(text, Backend(kind="none"), Limits(seconds=20.0, memory_bytes=MARK))
    assert (done.ending, done.exit_status) == ("exited", 0)
    assert marked_processes() == []


MARK = (1 << 30) + 4096 * os.getpid() + 512


def is_marked(pid: str) -> bool:
    try:
        return str(MARK).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def marked_processes() -> list[str]:
    """The processes of these tests that still run, once they had the time to be gone."""
    deadline = time.monotonic() + 5
    while (left := [pid for pid in os.listdir("/proc") if pid.isdigit() and is_marked(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_what_cannot_be_started_is_no_fault_of_the_program() -> None:
    gone = Backend(kind="bubblewrap", prefix=("/nowhere/bwrap",))
    refusing = Backend(kind="bubblewrap", prefix=("/bin/sh", "-c", "echo no namespaces here >&2; exit 1"))
    for backend, reason in ((gone, b"/nowhere/bwrap"), (refusing, b"no namespaces here")):
        done = run_program("print(1)", backend, LIMITS)
        assert (done.ending, done.stdout, done.exit_status) == ("sandbox", b"", None)
        assert reason in done.stderr
    with pytest.raises(SandboxFailure, match="no namespaces"), running("print(1)", refusing, LIMITS, 9):
        pass


def test_a_sandbox_that_is_never_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "START_SECONDS", 0.2)
    done = run_program("print(1)", Backend(kind="bubblewrap", prefix=("/bin/sh", "-c", "sleep 600")), LIMITS)
    assert (done.ending, done.stderr) == ("sandbox", b"the program did not start: time")


def test_a_landlock_path_that_is_gone_stops_the_program_from_running() -> None:
    backend = found("landlock")
    if isinstance(backend, str):
        pytest.skip(backend)
    broken = Backend(kind="landlock", readable=(*backend.readable, "/nowhere"), filter=backend.filter)
    assert run_program("print(1)", broken, LIMITS).ending == "sandbox"


def test_the_strongest_way_that_holds_is_chosen() -> None:
    usable = [kind for kind in ("bubblewrap", "landlock") if isinstance(found(kind), Backend)]
    if not usable:
        pytest.skip("no backend holds on this machine")
    assert choose_backend().kind == choose_backend("auto").kind == usable[0]
    assert choose_backend("none") == Backend(kind="none")


def test_landlock_holds_wherever_the_kernel_has_it() -> None:
    version = ctypes.CDLL(None).syscall(444, None, 0, 1)
    if version < 1 or platform.machine() not in MACHINES:
        pytest.skip("this kernel has no Landlock, or the machine no filter")
    assert choose_backend("landlock").kind == "landlock"


def test_bubblewrap_holds_wherever_it_can_make_namespaces() -> None:
    if not shutil.which("bwrap") or platform.machine() not in MACHINES:
        pytest.skip("bubblewrap is not installed, or the machine has no filter")
    if subprocess.run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True, check=False).returncode:
        pytest.skip("bubblewrap may make no namespaces here")
    assert choose_backend("bubblewrap").kind == "bubblewrap"


def test_an_unknown_way_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r'code\.sandbox: got "docker"; use one of auto, bubblewrap, landlock, none'):
        choose_backend("docker")
    assert CHOICES == ("auto", "bubblewrap", "landlock", "none")


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered of what was tried before, nor after."""
    monkeypatch.setattr(backends, "_try", functools.cache(backends._try.__wrapped__))


@pytest.mark.usefixtures("bare_machine")
def test_where_nothing_holds_programs_are_not_run_and_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structcot.sandbox.probe.find_hole", lambda backend: "it reads /etc/passwd")
    monkeypatch.setattr(backends.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        choose_backend()
    for part in ("bubblewrap: the program bwrap is not installed", "landlock: it reads /etc/passwd", 'code.sandbox = "none"'):
        assert part in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.usefixtures("bare_machine")
def test_without_bubblewrap_landlock_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(found("landlock"), str):
        pytest.skip(str(found("landlock")))
    monkeypatch.setattr(backends.shutil, "which", lambda name: None)
    assert choose_backend().kind == "landlock"


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize("machine", ["riscv64", "i686", ""])
def test_a_machine_without_a_filter_is_refused(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(ConfigError, match=f"no filter of system calls is known for {machine}"):
        choose_backend()


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize("wanted", CHOICES)
def test_a_kernel_that_cannot_wait_for_processes_is_refused(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", missing)
    with pytest.raises(ConfigError, match=r"code\.sandbox: .* Linux 5\.3 or newer"):
        choose_backend(wanted)


def test_the_probe_sees_what_a_weaker_backend_lets_through() -> None:
    backend = found("landlock")
    if isinstance(backend, str):
        pytest.skip(backend)
    assert find_hole(backend) == ""
    assert "it makes a socket" in find_hole(Backend(kind="none"))
    open_files = find_hole(Backend(kind="landlock", readable=(*backend.readable, "/etc", "/proc"), filter=backend.filter))
    assert open_files == "it reads /etc/passwd"
    everything = bytes.fromhex("060000000000ff7f")
    no_filter = find_hole(Backend(kind="landlock", readable=backend.readable, filter=everything))
    assert "it starts a process" in no_filter
    assert "it reads" not in no_filter
    assert "it makes a folder" not in no_filter


@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_of_system_calls_are_those_of_the_kernels_headers(machine: str) -> None:
    header = Path(HEADERS[machine])
    if not header.exists():
        pytest.skip(f"no kernel headers at {header}")
    named = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text(encoding="utf-8")))
    # The generic header gives this one its 32-bit name.
    named.setdefault("newfstatat", named.get("fstatat", ""))
    numbers = allowed_numbers(machine)
    assert len(numbers) > 75
    for name, number in numbers.items():
        assert int(named[name]) == number, name


@pytest.mark.parametrize("machine", MACHINES)
@given(number=st.integers(0, 2**32 - 1), arguments=st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6), foreign=st.booleans())
@settings(max_examples=300)
def test_the_filter_allows_the_table_and_nothing_else(machine: str, number: int, arguments: list[int], foreign: bool) -> None:
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    action = decide(filter_program(machine), number, architecture ^ foreign, arguments)
    special = {"x86_64": {16, 72, 157, 302, 56}, "aarch64": {29, 25, 167, 261, 220}}[machine]
    if foreign:
        assert action == "kill"
    elif number in allowed_numbers(machine).values():
        assert action == "allow"
    elif number not in special:
        assert action == ("not there" if number >= 424 else "refuse")


@pytest.mark.parametrize(
    ("number", "argument", "value", "action"),
    [
        (56, 0, 0x3D0F00, "allow"),  # a thread, as the C library makes it
        (56, 0, 17, "refuse"),  # fork
        (56, 0, 0x4111, "refuse"),  # vfork
        (56, 0, 0x3D0F00 | 0x10000000, "refuse"),
        (72, 1, 1030, "allow"),
        (72, 1, 8, "refuse"),  # F_SETOWN
        (157, 0, 15, "allow"),
        (157, 0, 22, "refuse"),  # PR_SET_SECCOMP
        (302, 0, 0, "allow"),
        (302, 0, 1, "refuse"),
        (16, 1, 0x5401, "allow"),
        (16, 1, 0x5412, "refuse"),  # TIOCSTI
        (435, 0, 0, "not there"),
        (0x40000000 + 1, 0, 0, "not there"),
    ],
)
def test_some_calls_are_allowed_for_some_arguments(number: int, argument: int, value: int, action: str) -> None:
    arguments = [0] * 6
    arguments[argument] = value
    assert decide(filter_program("x86_64"), number, 0xC000003E, arguments) == action


def decide(program: bytes, number: int, architecture: int, arguments: list[int]) -> str:
    """What the kernel would do with a call, by a second reading of the filter's instructions."""
    words = {0: number, 4: architecture} | {16 + 8 * index: value & 0xFFFFFFFF for index, value in enumerate(arguments)}
    at = loaded = 0
    while True:
        operation, if_true, if_false = int.from_bytes(program[at : at + 2], "little"), program[at + 2], program[at + 3]
        value = int.from_bytes(program[at + 4 : at + 8], "little")
        at += 8
        if operation == 0x20:
            loaded = words[value]
        elif operation == 0x54:
            loaded &= value
        elif operation == 0x06:
            return {0x80000000: "kill", 0x7FFF0000: "allow", 0x50001: "refuse", 0x50026: "not there"}[value]
        else:
            holds = loaded == value if operation == 0x15 else loaded >= value
            at += 8 * (if_true if holds else if_false)
