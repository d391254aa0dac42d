"""A program that attempts what the sandbox must forbid, run once to learn whether a backend holds on this machine."""

from __future__ import annotations

import json
import os
import tempfile

from structcot.sandbox.backend import Backend
from structcot.sandbox.process import Limits
from structcot.sandbox.run import run_program

_LIMITS = Limits(seconds=20.0, memory_bytes=1 << 30)
_BURST_THREADS = 16
_HELD = "held"

# Prints the names of the attempts that did what they should not. An attempt that raises anything was refused; the rest of the lines are
# told by what they return. The number of this process and a folder are given on standard input.
_ATTEMPTS = r"""
import ctypes, json, os, socket, sys
parent, folder = json.loads(sys.stdin.read())
libc = ctypes.CDLL(None, use_errno=True)
def failing(call):
    if call < 0:
        raise OSError(ctypes.get_errno(), "refused")
def writing():
    with open(folder + "/file", "w") as file:
        file.write("x")
attempts = {
    "it reads /etc/passwd": lambda: open("/etc/passwd").read(),
    "it lists a folder of this process": lambda: os.listdir(folder),
    "it reads the environment of this process": lambda: open(f"/proc/{parent}/environ").read(),
    "it writes a file": writing,
    "it makes a folder": lambda: os.mkdir(folder + "/folder"),
    "it makes a socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "it makes a local socket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
    "it starts a process": os.fork,
    "it becomes another program": lambda: os.execv("/bin/true", ["true"]),
    "it signals another process": lambda: os.kill(parent, 0),
    "it makes a namespace": lambda: failing(libc.unshare(0x10000000)),
    "it traces": lambda: failing(libc.ptrace(0x4206, parent, 0, 0)),
    "it takes more memory than allowed": lambda: bytearray(1 << 31),
}
for what, attempt in attempts.items():
    try:
        attempt()
    except BaseException:
        continue
    os.write(1, (what + "\n").encode())
os.write(1, b"held\n")
"""
# More threads than allowed, which then wait to be seen.
_THREADS = """
import threading
threading.stack_size(65536)
stop = threading.Event()
for _ in range(4 * THREADS):
    threading.Thread(target=stop.wait, daemon=True).start()
stop.wait()
""".replace("THREADS", f"{_BURST_THREADS}")


def find_hole(backend: Backend) -> str:
    """Run the attempts; return what is wrong with the backend, "" where it holds."""
    with tempfile.TemporaryDirectory() as folder:
        tried = run_program(_ATTEMPTS, backend, _LIMITS, stdin=json.dumps([os.getpid(), folder]).encode())
    if tried.ending == "sandbox":
        return f"a program cannot be started: {_last_line(tried.stderr)}"
    done = tried.stdout.decode("utf-8", "replace").splitlines()
    if done != [_HELD]:
        return ", ".join(line for line in done if line != _HELD) or f"the trial ended early: {tried.ending}, {_last_line(tried.stderr)}"
    burst = run_program(_THREADS, backend, Limits(seconds=20.0, memory_bytes=1 << 30, threads=_BURST_THREADS))
    return "" if burst.ending == "threads" else f"threads are not counted: {burst.ending}, {_last_line(burst.stderr)}"


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    return json.dumps(lines[-1]) if lines else "no message"
