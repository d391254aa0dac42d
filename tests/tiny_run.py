"""Whole runs on a tiny model: what they are made of, and the ways to start one, to stop it and to kill it."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.torch import load_file, save_file

from structcot import cli
from structcot.config import Config
from structcot.config_file import load_config
from tests.tiny_models import tiny_chat_model

ROOT = Path(__file__).parents[1]
TINY_CONFIG = ROOT / "configs" / "tiny.toml"
NUM_STEPS = 8  # of configs/tiny.toml
DONE, FAILED, WRONG, STOPPED = 0, 1, 2, 75  # exit statuses
CLOCK_KEYS = ("perf/", "time/", "memory/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error message; fails where a traceback stands in its place."""
        assert "Traceback" not in self.err, self.err
        found = re.search(r"^structcot: (.*)", self.err, re.MULTILINE | re.DOTALL)
        assert found, f"no message in {self.err!r}"
        return found[1].strip()


@dataclass(frozen=True, slots=True)
class Site:
    """A directory with a tiny model, demonstrations and a cache of prepared samples, which many runs share."""

    directory: Path

    @property
    def model_dir(self) -> Path:
        return self.directory / "model"

    @property
    def data_path(self) -> Path:
        return self.directory / "train.jsonl"

    @property
    def environment(self) -> dict[str, str]:
        """One thread, since tiny products on several wait for each other; no network; samples cached beside the model."""
        return {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(self.directory / "cache")}

    def overrides(self, output_dir: Path, *more: str) -> list[str]:
        """Complete configs/tiny.toml."""
        return [f"model_name_or_path={self.model_dir}", f"data.train={self.data_path}", f"output_dir={output_dir}", *more]

    def config(self, output_dir: Path, *more: str) -> Config:
        return load_config(TINY_CONFIG, self.overrides(output_dir, *more))

    def train(self, output_dir: Path, *more: str) -> Outcome:
        """`structcot train configs/tiny.toml ...` in this process."""
        return self.run("train", str(TINY_CONFIG), *self.overrides(output_dir, *more))

    def run(self, *arguments: str) -> Outcome:
        """`structcot ...` in this process."""
        out, err = io.StringIO(), io.StringIO()
        try:
            with (
                mock.patch.dict(os.environ, self.environment),
                mock.patch.object(sys, "argv", ["structcot", *arguments]),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                cli.main()
            status: Any = DONE
        except SystemExit as ended:
            status = ended.code
        return Outcome(status=status or DONE, out=out.getvalue(), err=err.getvalue())

    def start(self, *arguments: str, program: Sequence[str] = ("-m", "structcot.cli")) -> subprocess.Popen[str]:
        """`structcot ...` in a process of its own, started and not waited for."""
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
        environment = {**os.environ, **self.environment, "PYTHONPATH": paths}
        return subprocess.Popen(
            [sys.executable, *program, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


def finish(process: subprocess.Popen[str]) -> Outcome:
    """Wait for a process that `Site.start` has started."""
    out, err = process.communicate(timeout=240)
    return Outcome(status=process.returncode, out=out, err=err)


def make_site(directory: Path, seed: int = 0) -> Site:
    """Write the model, in bfloat16 as released models are, and twenty demonstrations."""
    site = Site(directory)
    tiny_chat_model(site.model_dir, seed)
    weights = site.model_dir / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    config = json.loads((site.model_dir / "config.json").read_text())
    (site.model_dir / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    write_jsonl(site.data_path, [demonstration(number) for number in range(20)])
    return site


def demonstration(number: int, answer: str | None = None) -> dict[str, Any]:
    """Build a record in the Sky-T1 format; `answer` takes the place of the assistant's whole text."""
    thought = f"Let me add {number} and {number}. " + "Wait. " * (number % 7)
    text = (
        f"<|begin_of_thought|>\n\n{thought}\n\n<|end_of_thought|>\n\n"
        f"<|begin_of_solution|>\n\nIt is \\boxed{{{2 * number}}}.\n\n<|end_of_solution|>"
    )
    question = {"from": "user", "value": f"What is {number} + {number}?"}
    return {"conversations": [question, {"from": "assistant", "value": text if answer is None else answer}]}


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """Write one record a line; bytes and strings stand for themselves."""
    lines = [record if isinstance(record, bytes) else _text(record).encode("utf-8", "surrogatepass") for record in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def _text(record: Any) -> str:
    return record if isinstance(record, str) else json.dumps(record)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """What is the same in every run of the same config: all of metrics.jsonl but clocks and memory."""
    return [{key: value for key, value in line.items() if not key.startswith(CLOCK_KEYS)} for line in read_jsonl(run_dir / "metrics.jsonl")]


def adapter_of(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its path, with its content."""
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def checkpoints_of(run_dir: Path) -> list[str]:
    """Names in checkpoints/, LATEST aside."""
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*") if path.name != "LATEST")


def copy_run(run_dir: Path, to: Path) -> Path:
    return shutil.copytree(run_dir, to)


def signalling(work: Callable[..., Any], number: signal.Signals, call: int = 1) -> Callable[..., Any]:
    """`work`, but its `call`-th call sends this process a signal before it starts."""
    calls = 0

    def work_and_signal(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            signal.raise_signal(number)
        return work(*arguments, **named)

    return work_and_signal


class Launcher:
    """Processes forked from one that has imported everything: each is a fresh start in a fraction of a second."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.tiny_run", "structcot.train", "transformers", "peft"])

    def train(self, overrides: Sequence[str], trouble: Callable[..., None] | None = None, *about: Any) -> Outcome:
        """`structcot train configs/tiny.toml OVERRIDES` in `trouble`: `kill_at` or `fill_disk_at`, called with `about`."""
        reader, writer = self.context.Pipe(duplex=False)
        process = self.context.Process(target=train_apart, args=(self.site.environment, writer, list(overrides), trouble, about))
        process.start()
        writer.close()
        err = b"".join(iter(lambda: os.read(reader.fileno(), 65536), b""))
        process.join(timeout=240)
        assert process.exitcode is not None
        return Outcome(status=process.exitcode, out="", err=err.decode())


def train_apart(
    environment: Mapping[str, str], output: Connection, overrides: Sequence[str], trouble: Callable[..., None] | None, about: Sequence[Any]
) -> None:
    """Run the command in this process, with what it prints going to `output`."""
    os.environ |= environment
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    if trouble:
        trouble(*about)
    sys.argv = ["structcot", "train", str(TINY_CONFIG), *overrides]
    cli.main()


def kill_at(needle: str, count: int) -> None:
    """Kill this process, as `kill -9` does, just before its `count`-th change of a path that holds `needle`."""
    at_change(needle, count, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fill_disk_at(needle: str, count: int, file_bytes: int) -> None:
    """Let no file grow beyond `file_bytes` from the `count`-th change of a path that holds `needle` on."""
    at_change(needle, count, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes)))


def at_change(needle: str, count: int, action: Callable[[], None]) -> None:
    """Do `action` just before this process opens for writing, renames, makes or removes such a path for the `count`-th time."""
    seen = 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        if changes_files(event, details) and needle in str(details[0]):
            seen += 1
            if seen == count:
                action()

    sys.addaudithook(watch)


def changes_files(event: str, details: tuple[Any, ...]) -> bool:
    """Whether an audit event is a change to the file system."""
    if event == "open":
        return isinstance(details[0], str) and bool(details[2] & (os.O_WRONLY | os.O_RDWR))
    return event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
