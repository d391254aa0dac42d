"""A study from its config to its report: data, cells, facts.

Every stage of a cell is a command in a process of its own; this process starts them, waits, and notes what is done in cell.json. Whatever
ends it, the same command goes on: finished stages are kept, a training goes on from its checkpoint, an evaluation from its samples.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from structcot.errors import ConfigError, StoppedWithCheckpoint, StructcotError
from structcot.files import write_json, write_text
from structcot.parallel import num_processes
from structcot.rundir import hold
from structcot.signals import StopFlag
from structcot.study.cells import Cell, is_finished, read_record, stage_keys, write_record
from structcot.study.config import StudyConfig
from structcot.study.grid import find_cell, make_grid
from structcot.study.progress import DONE, FAILED, RUNNING, Standing, show
from structcot.study.sources import places_of, write_sources
from structcot.study.work import work

POLL_SECONDS, REDRAW_SECONDS = 0.05, 1.0
Finish = Callable[[StudyConfig, Sequence[Cell]], dict[str, Any]]
Keys = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a study ended: the facts of its report, empty where only one cell was asked for, and by cell why it is not done."""

    facts: dict[str, Any]
    missing: dict[str, str]


@dataclass(slots=True, kw_only=True)
class Running:
    """A cell at work: what is left of it, the file that holds its directory, when it was taken up, and the process it waits for."""

    cell: Cell
    steps: Iterator[tuple[str, subprocess.Popen[bytes]]]
    held: IO[str]
    start_seconds: float
    process: subprocess.Popen[bytes] | None = None


@dataclass(slots=True, kw_only=True)
class Schedule:
    """Cells on their way: those that wait, those at work by slot, where each stands, and why some are not done."""

    config: StudyConfig
    keys: Keys
    jobs: int
    waiting: list[Cell]
    standings: dict[str, Standing]
    running: dict[int, Running] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def finish_study(config: StudyConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """The facts of a study, written as study.json and as a report."""
    from structcot.study.analysis import analyse
    from structcot.study.report import write_report

    facts = analyse(config, cells)
    write_json(Path(config.output_dir) / "study.json", facts)
    write_report(Path(config.output_dir), facts)
    return facts


def run_study(config: StudyConfig, *, jobs: int = 1, cell: str = "", finish: Finish = finish_study) -> Outcome:
    """Run what is left of a study, `jobs` cells at once, and end with `finish`; or run one cell, by its name or number.

    Raises:
        ConfigError: if the config or the data is wrong, another process runs this study, or a cell starts from one that is not done.
        StoppedWithCheckpoint: if a signal stopped it; the same call goes on.
        OSError: if the output directory cannot be written.
    """
    cells, output_dir = make_grid(config), Path(config.output_dir)
    asked = [find_cell(cells, cell)] if cell else list(cells)
    held = None if cell else _hold_study(output_dir)
    try:
        with StopFlag() as stop:
            _need_gpus(asked, jobs)
            _prepare(config)
            keys = stage_keys(cells)
            for one in asked if cell else ():
                _need_base(one, cells, keys)
            schedule = make_schedule(asked, config, keys, jobs)
            run_cells(schedule, stop)
        if any(one.status not in (DONE, FAILED) for one in schedule.standings.values()):
            done = sum(one.status == DONE for one in schedule.standings.values())
            raise StoppedWithCheckpoint(f"stopped by {stop.signal_name}; {done} of {len(asked)} cells are done, the same command goes on")
        return Outcome(facts={} if cell else _finished(finish, config, cells), missing=schedule.missing)
    finally:
        if held is not None:
            held.close()


def _finished(finish: Finish, config: StudyConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """Call `finish`; Ctrl-C during it loses nothing but the report."""
    try:
        return finish(config, cells)
    except KeyboardInterrupt as error:
        raise StoppedWithCheckpoint("stopped by SIGINT; no cell is left to run, the same command writes the report") from error


def make_schedule(cells: Sequence[Cell], config: StudyConfig, keys: Keys, jobs: int) -> Schedule:
    """What is to do of some cells; those that are done stay as they are."""
    standings, waiting = {}, []
    for cell in cells:
        if is_finished(cell, keys[cell.name]):
            standings[cell.name] = Standing(status=DONE, seconds=_seconds_of(cell))
        else:
            standings[cell.name] = Standing()
            waiting.append(cell)
    return Schedule(config=config, keys=keys, jobs=jobs, waiting=waiting, standings=standings)


def run_cells(schedule: Schedule, stop: StopFlag) -> None:
    """Run the cells that wait until none is left, or until a signal asks to stop: then what runs is told so and waited for."""
    shown: dict[str, Standing] = {}
    shown_seconds, is_told = 0.0, False
    try:
        while schedule.running or (schedule.waiting and not stop.is_set()):
            if stop.is_set():
                if not is_told:
                    _tell_to_stop(schedule)
                is_told = True
            else:
                _start_ready(schedule)
            for slot, running in list(schedule.running.items()):
                if running.process is None or running.process.poll() is not None:
                    _advance(schedule, slot, may_start=not stop.is_set())
            is_new = {name: (one.status, one.stage) for name, one in schedule.standings.items()} != {
                name: (one.status, one.stage) for name, one in shown.items()
            }
            if is_new or time.monotonic() - shown_seconds > REDRAW_SECONDS:
                _tick(schedule)
                show(shown, schedule.standings, schedule.jobs, sys.stderr)
                shown, shown_seconds = dict(schedule.standings), time.monotonic()
            time.sleep(POLL_SECONDS)
    finally:
        _tell_to_stop(schedule)


def slot_environment(slot: int, jobs: int) -> dict[str, str]:
    """The environment of the commands in one of `jobs` slots: its share of the cores and of the GPUs, unless the number of threads is set.

    With more slots than GPUs, slots share them in turn.
    """
    environment = {"OMP_NUM_THREADS": str(max(1, num_processes() // jobs)), **os.environ}
    if gpus := visible_gpus():
        own = gpus[slot::jobs] or [gpus[slot % len(gpus)]]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return environment


def visible_gpus() -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, else those that the driver lists."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def _start_ready(schedule: Schedule) -> None:
    """Take up cells that wait while slots are free; a cell that another process works on is left for later.

    One that nothing can run beside, as a base that all others start from, has the whole machine.
    """
    ready = [cell for cell in schedule.waiting if _is_ready(cell, schedule)]
    shares = 1 if len(ready) == 1 and not schedule.running else schedule.jobs
    for cell in list(schedule.waiting):
        slot = next((number for number in range(schedule.jobs) if number not in schedule.running), None)
        base = schedule.standings.get(cell.needs)
        if base is not None and base.status == FAILED:
            schedule.waiting.remove(cell)
            _leave_out(schedule, cell, f"not run: it starts from {cell.needs}, which failed")
        elif slot is not None and _is_ready(cell, schedule):
            try:
                held = hold(cell.directory)
            except OSError as error:
                schedule.waiting.remove(cell)
                _fail(schedule, cell, f"{cell.directory}: cannot be written: {error.strerror}")
                continue
            if held is None:
                schedule.standings[cell.name] = Standing(stage="held elsewhere")
                continue
            schedule.waiting.remove(cell)
            steps = work(cell, schedule.config, schedule.keys[cell.name], slot_environment(slot, shares), held)
            schedule.running[slot] = Running(cell=cell, steps=steps, held=held, start_seconds=time.monotonic())
            schedule.standings[cell.name] = Standing(status=RUNNING)


def _is_ready(cell: Cell, schedule: Schedule) -> bool:
    """Whether a cell starts from none of this call, or from one that is done."""
    base = schedule.standings.get(cell.needs)
    return base is None or base.status == DONE


def _advance(schedule: Schedule, slot: int, *, may_start: bool) -> None:
    """Go on with a cell whose process has ended, or let go of it."""
    running = schedule.running[slot]
    cell = running.cell
    try:
        if may_start:
            stage, running.process = next(running.steps)
            schedule.standings[cell.name] = replace(schedule.standings[cell.name], stage=stage)
            return
    except StopIteration:
        schedule.standings[cell.name] = Standing(status=DONE, seconds=_seconds_of(cell))
    except (StructcotError, OSError) as error:
        _fail(schedule, cell, str(error))
    running.held.close()
    del schedule.running[slot]


def _fail(schedule: Schedule, cell: Cell, error: str) -> None:
    schedule.missing[cell.name] = error
    schedule.standings[cell.name] = Standing(status=FAILED, stage=schedule.standings[cell.name].stage)


def _leave_out(schedule: Schedule, cell: Cell, error: str) -> None:
    """Note of a cell that cannot be run why not; what is there of it stays."""
    held = hold(cell.directory)
    if held is not None:
        with held:
            write_record(cell, "failed", read_record(cell)["stages"], schedule.keys[cell.name], error)
    _fail(schedule, cell, error)


def _tell_to_stop(schedule: Schedule) -> None:
    """Ask the commands to leave what they have done in order: a checkpoint, samples."""
    for running in schedule.running.values():
        if running.process is not None and running.process.poll() is None:
            running.process.terminate()


def _tick(schedule: Schedule) -> None:
    for running in schedule.running.values():
        standing = schedule.standings[running.cell.name]
        schedule.standings[running.cell.name] = replace(standing, seconds=time.monotonic() - running.start_seconds)


def _hold_study(output_dir: Path) -> IO[str]:
    try:
        held = hold(output_dir)
    except OSError as error:
        raise ConfigError(f"output_dir: {output_dir} cannot be written: {error.strerror}; name a directory that can") from error
    if held is None:
        raise ConfigError(f"output_dir: {output_dir} is in use by another call of this study; wait for it, or name another directory")
    return held


def _prepare(config: StudyConfig) -> None:
    """Write study.toml and the data; of several processes, one after the other."""
    places = places_of(config)
    while (held := hold(places.directory)) is None:
        time.sleep(POLL_SECONDS)
    with held:
        for leftover in places.directory.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        write_sources(config)
        path, text = Path(config.output_dir) / "study.toml", config.to_toml()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def _need_gpus(cells: Sequence[Cell], jobs: int) -> None:
    """Refuse cells at once that would have fewer GPUs each than they have processes. What others wait for has all of them."""
    needed = {cell.needs for cell in cells}
    most = max((stage.processes for cell in cells if cell.name not in needed for stage in cell.stages), default=1)
    if jobs > 1 and most > 1 and (gpus := visible_gpus()) and most > len(gpus) // jobs:
        raise ConfigError(
            f"--jobs: {jobs} cells at once share {len(gpus)} GPUs, and each needs {most}; use --jobs {max(1, len(gpus) // most)}"
        )


def _need_base(cell: Cell, cells: Sequence[Cell], keys: Keys) -> None:
    base = next((one for one in cells if one.name == cell.needs), None)
    if base is not None and not is_finished(base, keys[base.name]):
        raise ConfigError(f"--cell: {cell.name} starts from {base.name}, which is not done; run --cell {base.name} first")


def _seconds_of(cell: Cell) -> float:
    return sum(stage["seconds"] for stage in read_record(cell)["stages"].values())
