"""The work on one cell: its stages one after the other, each a command in a process of its own, and what is kept of an earlier call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from structcot.config import Config
from structcot.config_file import load_config
from structcot.errors import ConfigError, DataError, StructcotError
from structcot.eval.config import EvalConfig
from structcot.files import write_text
from structcot.study.cells import LOG, Cell, Stage, is_whole, need_own, read_record, remove_outputs, write_record
from structcot.study.config import BASE, StudyConfig
from structcot.study.resolved import PROBLEMS, of_as_many_steps, of_as_many_tokens
from structcot.study.sources import count_lines, places_of, system_prompt_of

LAST_LINES, LAST_BYTES = 5, 65536
PROMPTS, SAYS = ("$ structcot ", "$ torchrun "), "structcot: "
# Stands in the lines that torchrun logs when a rank has ended badly, before it says at length what the rank has said already.
LAUNCHER_SAYS = "torch/distributed/elastic/multiprocessing/api.py"
THREADS = "OMP_NUM_THREADS"
Stages = dict[str, dict[str, Any]]


def work(
    cell: Cell, config: StudyConfig, keys: Mapping[str, str], environment: Mapping[str, str], held: IO[str]
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Do what is left of a cell: yields each stage's name and process, and goes on when that has ended.

    `held` is the file that holds the cell's directory (structcot.rundir.hold); a command that outlives this process holds it still.

    Raises:
        StructcotError: if a stage fails, in the words of its last lines.
        OSError: if the directory cannot be read or written.
    """
    stages = take_up(cell, keys)
    try:
        for stage in cell.stages:
            # One that was begun and has all its results ended well, and only the note of it is missing.
            if not (stage.name in stages and is_whole(cell, stage)):
                _write_config(cell, stage, config, is_begun=stage.name in stages)
                stages[stage.name] = {"key": keys[stage.name], "done": False, "seconds": stages.get(stage.name, {}).get("seconds", 0.0)}
                write_record(cell, "running", stages, keys)
                start_seconds = time.perf_counter()
                process = _start(cell, stage, environment, held)
                yield stage.name, process
                stages[stage.name]["seconds"] += round(time.perf_counter() - start_seconds, 1)
                if process.returncode or not is_whole(cell, stage):
                    how = f"ended with {process.returncode}" if process.returncode else "left no results"
                    raise StructcotError(": ".join(filter(None, [stage.name, how, last_words(cell.directory / LOG)])))
            stages[stage.name]["done"] = True
            write_record(cell, "running", stages, keys)
        write_record(cell, "done", stages, keys)
    except (StructcotError, OSError) as error:
        write_record(cell, "failed", stages, keys, error=str(error))
        raise


def take_up(cell: Cell, keys: Mapping[str, str]) -> Stages:
    """What is kept of an earlier call: the stages of these keys, begun or done. All that others have written is removed.

    Raises:
        StructcotError: if the directory holds what no study has written.
        OSError: if it cannot be changed.
    """
    for leftover in cell.directory.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    need_own(cell)
    before, kept = read_record(cell)["stages"], {}
    is_kept = True
    for stage in cell.stages:
        found = before.get(stage.name, {})
        is_kept = is_kept and found.get("key") == keys[stage.name] and (not found["done"] or is_whole(cell, stage))
        if is_kept:
            kept[stage.name] = found
        elif found:
            remove_outputs(cell, stage)
    write_record(cell, "running", kept, keys)
    return kept


def program_of(stage: Stage) -> list[str]:
    """The process that runs a stage: this Python, whatever is called `structcot` elsewhere."""
    name, *arguments = stage.arguments
    launch = ("torch.distributed.run", *stage.rank_options) if stage.processes > 1 else ()
    return [sys.executable, "-m", *launch, f"structcot.{name}", *arguments]


def environment_of(stage: Stage, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a stage's process: its ranks share the threads of their slot, unless the user has set how many each has."""
    if stage.processes == 1 or THREADS in os.environ or THREADS not in environment:
        return dict(environment)
    return {**environment, THREADS: str(max(1, int(environment[THREADS]) // stage.processes))}


def last_words(path: Path) -> str:
    """What the last command of a log said last: its message if it ended with one, else its last lines."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LAST_BYTES))
        # A bar of progress draws many lines over each other.
        lines = [line.rpartition("\r")[2].strip() for line in file.read().decode("utf-8", "replace").splitlines()]
    start = next((number + 1 for number in reversed(range(len(lines))) if lines[number].startswith(PROMPTS)), 0)
    end = next((number for number in range(start + 1, len(lines)) if LAUNCHER_SAYS in lines[number]), len(lines))
    lines = [line for line in lines[start:end] if line][-LAST_LINES:]
    message = next((number for number in reversed(range(len(lines))) if lines[number].startswith(SAYS)), 0)
    return "\n".join(lines[message:]).removeprefix(SAYS)


def _start(cell: Cell, stage: Stage, environment: Mapping[str, str], held: IO[str]) -> subprocess.Popen[bytes]:
    """Start a command; what it says goes to the cell's log."""
    with (cell.directory / LOG).open("ab") as file:
        file.write(f"$ {stage.command}\n".encode())
        file.flush()
        return subprocess.Popen(
            program_of(stage),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment_of(stage, environment),
            pass_fds=(held.fileno(),),
        )


def _write_config(cell: Cell, stage: Stage, config: StudyConfig, *, is_begun: bool) -> None:
    """Write the config that a stage runs by; what it has begun by another one, which is no change of its result, cannot go on."""
    if stage.config is None:
        return
    path, resolved = cell.directory / f"{stage.name}.toml", _final(cell, stage, config)
    if is_begun and path.is_file() and not _goes_on(path, resolved):
        remove_outputs(cell, stage)
    write_text(path, resolved.to_toml())


def _goes_on(path: Path, resolved: Config | EvalConfig) -> bool:
    """Whether what was begun by the config at `path` may go on by another one: the same paths, and no key that decides the result."""
    if isinstance(resolved, EvalConfig):
        return path.read_text(encoding="utf-8") == resolved.to_toml()
    try:
        return load_config(path).identity() == resolved.identity()
    except ConfigError:  # written by an earlier version
        return False


def _final(cell: Cell, stage: Stage, config: StudyConfig) -> Config | EvalConfig:
    """The config of a stage with what only the data tells: the budget of a training, the system message of problems made from it."""
    resolved, places = stage.config, places_of(config)
    if isinstance(resolved, EvalConfig):
        own = [task.name for task in resolved.tasks] == [PROBLEMS] and not resolved.system_prompt
        return resolved.model_copy(update={"system_prompt": system_prompt_of(places.problems)}) if own else resolved
    if not isinstance(resolved, Config):
        raise TypeError(f"{stage.name}: has no config")
    if stage.name != "train" or cell.variant == BASE:
        return resolved
    if config.budget == "samples":
        return of_as_many_steps(resolved, count_lines(places.demonstrations))
    names = {one.name for one in cell.stages}
    return of_as_many_tokens(resolved, *(_tokens(cell, name) for name in ("count", "count_reference"))) if "count" in names else resolved


def _tokens(cell: Cell, name: str) -> int:
    tokens = json.loads((cell.directory / name / "data" / "plan.json").read_text(encoding="utf-8"))["tokens"]
    if not tokens:
        raise DataError(f"{cell.directory / name}: no tokens are left to train on; see data/rejected.jsonl there")
    return tokens
