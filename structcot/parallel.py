"""Lines through a function in several processes: results in order, and memory that does not grow with the file."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

from structcot.errors import ConfigError

Lines = list[tuple[str, bytes]]
Context = TypeVar("Context")
Result = TypeVar("Result")

# A batch ends at the first of the two. It does not depend on the number of processes, and so neither does a sum over batches.
LINES_PER_BATCH, BYTES_PER_BATCH = 64, 2_000_000
BATCHES_AHEAD = 2

_work: tuple[Callable[[Lines, Any], Any], Any] | None = None


def num_processes() -> int:
    """How many processes this one may keep busy."""
    return len(os.sched_getaffinity(0))


def jobs_of(settings: Mapping[str, str]) -> int:
    """The number of processes that `jobs` names, else as many as there are cores.

    Raises:
        ConfigError: if it names none.
    """
    text = settings.get("jobs", str(num_processes()))
    if not text.isdecimal() or not int(text):
        raise ConfigError(f'jobs: got "{text}"; use a number of processes, 1 or more')
    return int(text)


def map_batches(
    function: Callable[[Lines, Context], Result], lines: Iterable[tuple[str, bytes]], context: Context, jobs: int
) -> Iterator[Result]:
    """Yield `function(batch, context)` for batches of lines, in order, from `jobs` processes; `context` travels to each of them once.

    What fits into two batches is done in this process: others would take longer to start.
    """
    batches = _batches(lines)
    first = list(islice(batches, 2))
    if jobs == 1 or len(first) < 2:
        yield from (function(batch, context) for batch in chain(first, batches))
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("forkserver"), _remember, (function, context)) as pool:
        waiting: deque[Future[Result]] = deque()
        for batch in chain(first, batches):
            waiting.append(pool.submit(_call, batch))
            if len(waiting) > jobs * BATCHES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _batches(lines: Iterable[tuple[str, bytes]]) -> Iterator[Lines]:
    batch: Lines = []
    num_bytes = 0
    for source, line in lines:
        batch.append((source, line))
        num_bytes += len(line)
        if len(batch) == LINES_PER_BATCH or num_bytes >= BYTES_PER_BATCH:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _remember(function: Callable[[Lines, Any], Any], context: Any) -> None:
    global _work
    _work = (function, context)


def _call(batch: Lines) -> Any:
    if _work is None:
        raise RuntimeError("a process of the pool was started without its work")
    function, context = _work
    return function(batch, context)
