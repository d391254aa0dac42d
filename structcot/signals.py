"""Stopping on request: a signal sets a flag, and the work asks for it where it can stop without losing anything."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequested(BaseException):
    """Leaves the work at a point where nothing is lost. Not an error, so that no handler of errors takes it for one."""


class StopFlag:
    """Holds the signal that asked to stop, inside `with`; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.signal_name = ""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in STOPPING:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def is_set(self) -> bool:
        """Whether a signal asked to stop."""
        return bool(self.signal_name)

    def check(self) -> None:
        """Leave here if a signal asked for it.

        Raises:
            StopRequested: if one did.
        """
        if self.is_set():
            raise StopRequested
