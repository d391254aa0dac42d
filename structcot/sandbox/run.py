"""Runs a program to its end in the sandbox: text and input in, output and how it ended out."""

from __future__ import annotations

import time
from dataclasses import dataclass

from structcot.sandbox.backend import Backend
from structcot.sandbox.process import Limits, SandboxFailure, running


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a program ran: what it wrote, its status, how it ended (one of structcot.sandbox.process.ENDINGS), and its wall time.

    `exit_status` is None where the program was stopped. Where `ending` is "sandbox" it never ran, and `stderr` says why.
    """

    stdout: bytes
    stderr: bytes
    exit_status: int | None
    ending: str
    seconds: float


def run_program(text: str, backend: Backend, limits: Limits, stdin: bytes = b"") -> Run:
    """Run a Python program to its end, or to the first limit that it passes. The clock starts when the sandbox is made."""
    try:
        with running(text, backend, limits, cpu_seconds=2 * limits.seconds) as process:
            start = time.monotonic()
            process.send(stdin, close=True)
            ending = process.wait(lambda: False, limits.seconds)
            seconds = time.monotonic() - start
            stdout, stderr = (bytes(kept[: limits.output_bytes]) for kept in (process.stdout, process.stderr))
            return Run(stdout=stdout, stderr=stderr, exit_status=process.exit_status, ending=ending, seconds=seconds)
    except SandboxFailure as failure:
        return Run(stdout=b"", stderr=f"{failure}".encode(), exit_status=None, ending="sandbox", seconds=0.0)
