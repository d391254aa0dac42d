"""A program in the sandbox: started, fed, watched, and ended with all that belongs to it.

Everything is measured and stopped from outside, so it does not matter what the program catches, ignores or changes in its own process.
What is kept of its output is bounded, and so the memory of this process stays as it is whatever the program does.
"""

from __future__ import annotations

import functools
import json
import math
import os
import selectors
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from structcot.sandbox.backend import ENVIRONMENT, Backend, interpreter
from structcot.sandbox.inside import OUT_OF_MEMORY_STATUS, READY

# How a program can end: by itself, or by a signal; over its time, memory, output or threads; or "sandbox": it was never started, which is
# no fault of the program.
ENDINGS = ("exited", "signal", "time", "memory", "output", "threads", "sandbox")
START_SECONDS = 60.0
_WATCH_SECONDS = 0.05
_CHUNK_BYTES = 1 << 16
# A message is its length in bytes and then as many bytes.
_LENGTH = struct.Struct("<Q")
# No user packages, no site, no folder of a script, nothing written beside the standard library.
_INTERPRETER_OPTIONS = ("-S", "-s", "-P", "-B")
# bwrap stays outside the namespaces and stands as their first process inside.
_TASKS_OF_BUBBLEWRAP = 2
_SHELL_SIGNAL = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use: wall time, address space, threads at a time, and bytes of each of its two outputs."""

    seconds: float = 6.0
    memory_bytes: int = 4 << 30
    threads: int = 64
    output_bytes: int = 16 << 20


class SandboxFailure(Exception):
    """A program was never started: the fault is the machine's, not the program's."""


@contextmanager
def running(text: str, backend: Backend, limits: Limits, cpu_seconds: float) -> Iterator[Process]:
    """Start a Python program in the sandbox; at the end of the block nothing of it is left.

    `cpu_seconds` bounds the processor time of all its threads together.

    Raises:
        SandboxFailure: if it cannot be started.
    """
    status_read, status_write = os.pipe()
    program = text.encode("utf-8", "surrogatepass")
    try:
        popen = subprocess.Popen(
            _command(backend, limits, status_fd=status_write, program_bytes=len(program), cpu_seconds=math.ceil(cpu_seconds)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=ENVIRONMENT,
            pass_fds=(status_write,),
            start_new_session=True,
        )
    except OSError as error:
        os.close(status_read)
        raise SandboxFailure(f"{error}") from error
    finally:
        os.close(status_write)
    process = Process(popen, status_read, backend, limits)
    try:
        process.send(program)
        ending = process.wait(process.is_ready, START_SECONDS)
        if ending:
            raise SandboxFailure(_last_line(process.stderr) or f"the program did not start: {ending}")
        yield process
    finally:
        process.end()


class Process:
    """A program that runs, to be talked to by one thread; made by `running`.

    `stdout` and `stderr` hold what it wrote and was not yet taken, `exit_status` its status once it ended by itself.
    """

    def __init__(self, popen: subprocess.Popen[bytes], status_fd: int, backend: Backend, limits: Limits):
        self.stdout, self.stderr = bytearray(), bytearray()
        self.exit_status: int | None = None
        self._popen, self._backend, self._limits = popen, backend, limits
        self._status = bytearray()
        self._unsent = bytearray()
        self._closes_stdin = False
        self._has_ended = False
        self._next_watch = 0.0
        self._selector = selectors.DefaultSelector()
        self._fds = [status_fd, os.pidfd_open(popen.pid)]
        self._selector.register(self._fds[1], selectors.EVENT_READ, self._note_end)
        for pipe, kept in ((popen.stdout, self.stdout), (popen.stderr, self.stderr), (status_fd, self._status)):
            fd = pipe if isinstance(pipe, int) else cast(IO[bytes], pipe).fileno()
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ, functools.partial(self._read, fd, kept))
        self._stdin = cast(IO[bytes], popen.stdin)
        os.set_blocking(self._stdin.fileno(), False)

    def is_ready(self) -> bool:
        """Whether the sandbox is around the program, which runs from then on."""
        return self._status == READY

    def send(self, data: bytes, close: bool = False) -> None:
        """Put `data` on the program's standard input, as fast as it reads while it is waited for; then close it if asked to."""
        self._unsent += data
        self._closes_stdin = close
        if not self._stdin.closed and self._stdin not in self._selector.get_map():
            self._selector.register(self._stdin, selectors.EVENT_WRITE, self._write)

    def tell(self, message: bytes) -> None:
        """Send a message: its length and then itself."""
        self.send(_LENGTH.pack(len(message)) + message)

    def hear(self, seconds: float) -> tuple[str, bytes]:
        """Wait for a message and return ("", the message), or else how the program ended, and nothing."""
        ending = self.wait(self._holds_message, seconds)
        if ending:
            return ending, b""
        end = self._message_end()
        message = bytes(self.stdout[_LENGTH.size : end])
        del self.stdout[:end]
        return "", message

    def wait(self, until: Callable[[], bool], seconds: float) -> str:
        """Wait until `until()` holds and return "", or until the program has ended or passed a limit, and return how."""
        deadline = time.monotonic() + seconds
        while not until():
            remaining = deadline - time.monotonic()
            if max(len(self.stdout), len(self.stderr)) > self._limits.output_bytes:
                return "output"
            if self._has_ended:
                return self._how_it_ended()
            if remaining <= 0:
                return "time"
            if self._has_too_many_threads():
                return "threads"
            for key, _ in self._selector.select(min(remaining, _WATCH_SECONDS)):
                key.data()
        return ""

    def end(self) -> None:
        """Kill the program with all its processes, if it still runs, and let go of it."""
        self._reap()
        self._selector.close()
        for fd in self._fds:
            os.close(fd)
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if pipe:
                pipe.close()

    def _reap(self) -> None:
        """Kill the group while its first process, even if dead, still holds the number of it, and take the status of that process."""
        if self._popen.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()

    def _read(self, fd: int, kept: bytearray) -> bool:
        """Keep what has been written, a bounded part of it; return whether there was any."""
        try:
            data = os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not data and fd in self._selector.get_map():
            self._selector.unregister(fd)
        kept += data
        return bool(data)

    def _write(self) -> None:
        try:
            sent = os.write(self._stdin.fileno(), memoryview(self._unsent)[:_CHUNK_BYTES])
        except BlockingIOError:
            return
        except BrokenPipeError:
            sent, self._closes_stdin = len(self._unsent), True
        del self._unsent[:sent]
        if not self._unsent:
            self._selector.unregister(self._stdin)
            if self._closes_stdin:
                self._stdin.close()

    def _note_end(self) -> None:
        """Take what the program left in the pipes: nothing more will come."""
        self._has_ended = True
        self._selector.unregister(self._fds[1])
        for key in list(self._selector.get_map().values()):
            while key.events == selectors.EVENT_READ and len(key.data.args[1]) <= self._limits.output_bytes and key.data():
                pass

    def _how_it_ended(self) -> str:
        self._reap()
        status = self._popen.returncode
        if self._backend.is_nested and status > _SHELL_SIGNAL:
            status = _SHELL_SIGNAL - status
        if status == -signal.SIGXCPU:
            return "time"
        self.exit_status = status
        if status == OUT_OF_MEMORY_STATUS:
            return "memory"
        return "signal" if status < 0 else "exited"

    def _holds_message(self) -> bool:
        return len(self.stdout) >= _LENGTH.size and len(self.stdout) >= self._message_end()

    def _message_end(self) -> int:
        return _LENGTH.size + _LENGTH.unpack_from(self.stdout)[0]

    def _has_too_many_threads(self) -> bool:
        if time.monotonic() < self._next_watch:
            return False
        self._next_watch = time.monotonic() + _WATCH_SECONDS
        allowed = self._limits.threads + (_TASKS_OF_BUBBLEWRAP if self._backend.is_nested else 0)
        return _num_tasks(self._popen.pid) > allowed


def _command(backend: Backend, limits: Limits, **settings: int) -> list[str]:
    """The command that makes the sandbox and waits for the program."""
    told = {
        **settings,
        "memory_bytes": limits.memory_bytes,
        "parent": 0 if backend.is_nested else os.getpid(),
        "readable": backend.readable,
        "writable": backend.writable,
        "filter": backend.filter.hex(),
    }
    return [*backend.prefix, interpreter(), *_INTERPRETER_OPTIONS, "-c", _text_of_inside(), json.dumps(told)]


@functools.cache
def _text_of_inside() -> str:
    return Path(__file__).with_name("inside.py").read_text(encoding="utf-8")


def _num_tasks(pid: int) -> int:
    """Threads of a process and of all below it; 0 of one that is gone."""
    try:
        tasks = len(os.listdir(f"/proc/{pid}/task"))
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return tasks + sum(_num_tasks(int(child)) for child in children.split())


def _last_line(stderr: bytearray) -> str:
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""
