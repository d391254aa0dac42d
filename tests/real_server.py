"""A real server of a small model: `transformers serve`, on a free local port, in a process that a test may kill and start again."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGES = ("fastapi", "openai", "uvicorn")
START_SECONDS = 180.0


@dataclass(slots=True, kw_only=True)
class RealServer:
    """The server, running or not. Its port stays the same, so that a client finds it again.

    It answers one request after another on one core, or with `batches` all at once on both: three times as fast, but what it samples then
    depends on what else it is asked.
    """

    model_dir: Path
    port: int
    log_path: Path
    batches: bool
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def model(self) -> str:
        return str(self.model_dir)

    def start(self) -> None:
        """Start it and wait until it answers."""
        program = [sys.executable, "-m", "transformers.cli.transformers", "serve", self.model]
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        if self.batches:
            options += ["--continuous-batching", "--cb-max-memory-percent", "0.2"]  # of the memory that is free, for keys and values
        with self.log_path.open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "2" if self.batches else "1", "HF_HUB_OFFLINE": "1"}
            self.process = subprocess.Popen([*program, *options], stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self.process.poll() is None, self.log_path.read_text()
            assert time.monotonic() < deadline, self.log_path.read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


def need_packages() -> None:
    """Skip the test where a package that the server needs is not installed."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        pytest.skip(f"transformers serve needs {', '.join(missing)}: pip install structcot[dev]")


@contextmanager
def real_server(model_dir: Path, log_path: Path, *, batches: bool = False) -> Iterator[RealServer]:
    """A started server of the model in `model_dir`; skips the test where a package that it needs is not installed."""
    need_packages()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = RealServer(model_dir=model_dir, port=free.getsockname()[1], log_path=log_path, batches=batches)
    try:
        server.start()
        yield server
    finally:
        server.kill()
