"""Graders in worker processes that are killed when a case takes too long or too much memory: each case gets a grade, whatever happens.

A worker is a fresh interpreter that imports the grader's module and nothing of the caller's, so a pool works from any thread and takes
along no device and no lock. It grades one case at a time and is replaced when it dies. It ends by itself when its caller does, and a case
that outlives both is ended by a timer of the worker's own.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from types import TracebackType

from structcot.errors import StructcotError
from structcot.grading.case import Case, Grade

Grader = Callable[[Case], Grade]

LIMIT_SECONDS = 10.0
MEMORY_BYTES = 4 * 1024**3
START_SECONDS = 120.0
# Cases read beyond the last grade given out, for each worker.
CASES_AHEAD = 32
# A worker ends itself this long after the caller should have ended it.
_GRACE_SECONDS = 5.0
_LONGEST_REASON = 300


@dataclass(slots=True, eq=False)
class _Worker:
    """A process, the connection to it, the number of the case that it has (None while it is idle or starting), and when its time is up."""

    process: subprocess.Popen[bytes]
    connection: Connection
    deadline: float
    is_ready: bool = False
    number: int | None = None


@dataclass(slots=True)
class _Caught:
    """A block whose exceptions become a value: what a grader raises is its own and of any kind, and none may end the worker."""

    error: Exception | None = field(default=None)

    def __enter__(self) -> _Caught:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


class GraderPool:
    """Workers that grade cases. `grade` is a function at the top of a module; `limit_seconds` bounds each case, `memory_bytes` each worker.

    Use it in a `with` block: leaving it ends all workers. One `map` at a time: a new one ends the one before.
    """

    def __init__(self, grade: Grader, *, jobs: int = 1, limit_seconds: float = LIMIT_SECONDS, memory_bytes: int = MEMORY_BYTES):
        self.grade, self.jobs = grade, max(1, jobs)
        self.limit_seconds, self.memory_bytes = limit_seconds, memory_bytes
        self._workers: list[_Worker] = []

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, whatever they do."""
        while self._workers:
            self._end(self._workers[-1])

    def map(self, cases: Iterable[Case]) -> Iterator[Grade]:
        """Yield the grade of each case, in order; cases are read as workers need them. What an earlier `map` left undone is given up.

        Raises:
            ConfigError: if the grader needs a package that is not installed.
            StructcotError: if a worker cannot start.
        """
        for worker in [worker for worker in self._workers if worker.number is not None]:
            self._end(worker)
        unread = enumerate(cases)
        waiting: deque[tuple[int, Case]] = deque()
        grades: dict[int, Grade] = {}
        given = read = 0
        while True:
            more = list(islice(unread, max(0, given + self.jobs * CASES_AHEAD - read)))
            read += len(more)
            waiting.extend(more)
            if given == read:
                return
            self._fill(min(self.jobs, len(waiting)))
            self._hand_out(waiting)
            self._take_in(grades)
            while given in grades:
                yield grades.pop(given)
                given += 1

    def _fill(self, wanted: int) -> None:
        """Start workers until as many are idle or starting as there is work for, at most `jobs` in all."""
        free = sum(worker.number is None for worker in self._workers)
        for _ in range(min(wanted - free, self.jobs - len(self._workers))):
            self._workers.append(_start(self.grade, self.limit_seconds, self.memory_bytes))

    def _hand_out(self, waiting: deque[tuple[int, Case]]) -> None:
        for worker in list(self._workers):
            if not waiting:
                return
            if not worker.is_ready or worker.number is not None:
                continue
            try:
                worker.connection.send(waiting[0][1])
            except (BrokenPipeError, ConnectionResetError):  # it died while idle: the case goes to another
                self._end(worker)
                continue
            worker.number, _ = waiting.popleft()
            worker.deadline = time.monotonic() + self.limit_seconds

    def _take_in(self, grades: dict[int, Grade]) -> None:
        """Wait until a worker answers, dies or is late, and note the grades."""
        busy = [worker for worker in self._workers if worker.number is not None or not worker.is_ready]
        if not busy:
            return
        seconds = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        answered = set(wait([worker.connection for worker in busy], seconds))
        for worker in busy:
            if worker.connection in answered:
                self._hear(worker, grades)
            elif time.monotonic() >= worker.deadline:
                self._end(worker)
                if worker.number is None:
                    raise StructcotError(f"grader: a worker did not start within {START_SECONDS:.0f} s; try again on a less busy machine")
                reason = f"not graded within {self.limit_seconds:g} s"
                grades[worker.number] = Grade(extracted="", verdict="timeout", reason=reason)

    def _hear(self, worker: _Worker, grades: dict[int, Grade]) -> None:
        """Read what a worker says: that it is ready, a grade, or nothing, since it is dead."""
        try:
            said = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            said = ""
        number, worker.number = worker.number, None
        if isinstance(said, Grade) and number is not None:
            grades[number] = said
        elif worker.is_ready:
            why = self._end(worker)
            if number is not None:
                grades[number] = Grade(extracted="", verdict="error", reason=f"the grader's process {why}")
        elif said == _READY:
            worker.is_ready = True
        elif isinstance(said, StructcotError):
            raise said
        else:
            raise StructcotError(f"grader: a worker cannot start: {said or f'it {self._end(worker)}'}")

    def _end(self, worker: _Worker) -> str:
        """End a worker and say how it ended by itself, if it did."""
        self._workers.remove(worker)
        worker.connection.close()
        try:
            status = worker.process.wait(0.5 if worker.number is None else 0)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            status = worker.process.wait()
        return f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"


_READY = "ready"


def _start(grade: Grader, limit_seconds: float, memory_bytes: int) -> _Worker:
    """Start a worker: a fresh interpreter that is told what to import from where."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-c", f"from structcot.grading.isolated import work; work({theirs.fileno()})"]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # a Ctrl-C is the caller's to handle
        )
    connection = Connection(ours.detach())
    connection.send_bytes(pickle.dumps((limit_seconds, memory_bytes)))
    connection.send_bytes(pickle.dumps(grade))
    return _Worker(process=process, connection=connection, deadline=time.monotonic() + START_SECONDS)


def work(descriptor: int) -> None:
    """Be a worker: take cases from a connection and give grades, until the caller closes it."""
    connection = Connection(descriptor)
    limit_seconds, memory_bytes = pickle.loads(connection.recv_bytes())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    grade: Grader | None = None
    with _Caught() as caught:
        grade = pickle.loads(connection.recv_bytes())
    if caught.error or not grade:
        connection.send(caught.error if isinstance(caught.error, StructcotError) else _told(caught.error or TypeError("no grader")))
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    connection.send(_READY)
    try:
        while True:
            connection.send(_graded(grade, connection.recv(), limit_seconds))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _graded(grade: Grader, case: Case, limit_seconds: float) -> Grade:
    # No handler: the signal's default ends the process, even where the interpreter is deep in one long operation.
    signal.setitimer(signal.ITIMER_REAL, limit_seconds + _GRACE_SECONDS)
    result = None
    with _Caught() as caught:
        result = grade(case)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(result, Grade):
        return result
    reason = f"the grader raised {_told(caught.error)}" if caught.error else f"the grader gave a {type(result).__name__}"
    return Grade(extracted="", verdict="error", reason=reason)


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
