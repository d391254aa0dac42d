"""Finds a rank that hangs: whoever makes no progress for too long tells where it stands, and ends.

In a run of many ranks one that hangs keeps all others waiting in a collective, so every rank notices about the same time, each on its own
and without talking to anyone: the stacks of all of them together show who waits and who is waited for. The process then ends, which
torchrun takes as a failure of the run.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKS = 20
"""How often, within the time allowed, the watchdog looks; once a second at least."""

GRACE_SECONDS = 30.0
"""A rank that has told its stack waits this long, or half of the time allowed, before it ends: its end would end those that it left behind
before they have told theirs."""

LAST_RESORT_SECONDS = 60.0
"""So much later the process is ended even if no Python code can run in it any more."""


class Watchdog:
    """Watches this rank; `beat` says that it is alive and what it does next. Without `hang_seconds` it never bites."""

    def __init__(self, rank: int, hang_seconds: float | None, directory: Path):
        self._rank, self._hang_seconds, self._directory = rank, hang_seconds, directory
        self._work, self._beat_seconds = "starting", time.monotonic()
        self._done = threading.Event()

    def beat(self, work: str) -> None:
        """Progress was made, and `work` is what comes next."""
        self._work, self._beat_seconds = work, time.monotonic()
        if self._hang_seconds is not None:
            faulthandler.dump_traceback_later(self._hang_seconds + LAST_RESORT_SECONDS, exit=True)

    def watch(self) -> None:
        """Look until `finish`; ends the process when the rank hangs."""
        while self._hang_seconds is not None and not self._done.wait(min(1.0, self._hang_seconds / CHECKS)):
            if time.monotonic() - self._beat_seconds > self._hang_seconds:
                self._give_up(self._hang_seconds)

    def finish(self) -> None:
        """Stop watching."""
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def _give_up(self, hang_seconds: float) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"rank-{self._rank:05d}.txt"
        head = f"rank {self._rank} has made no progress for {hang_seconds:g} s; it was {self._work}"
        with path.open("w", encoding="utf-8") as file:
            print(f"{head} (process {os.getpid()})\n", file=file, flush=True)
            faulthandler.dump_traceback(file)
        print(f"structcot: {head}; its stack is in {path} and here:\n{path.read_text(encoding='utf-8')}", file=sys.stderr, flush=True)
        time.sleep(min(GRACE_SECONDS, hang_seconds / 2))
        os._exit(1)


@contextmanager
def watched(rank: int, hang_seconds: float | None, directory: Path) -> Iterator[Watchdog]:
    """A watchdog of this rank, whose stacks go to `directory`."""
    watchdog = Watchdog(rank, hang_seconds, directory)
    thread = threading.Thread(target=watchdog.watch, name="watchdog", daemon=True)
    watchdog.beat("starting")
    thread.start()
    try:
        yield watchdog
    finally:
        watchdog.finish()
        thread.join()
