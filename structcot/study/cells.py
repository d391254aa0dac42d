"""A cell of a study: one variant under one setting with one seed, its stages, and what is written of how far it has come.

A stage is one command. Its key is the hash of all that decides its result, those before it included: a result of another key is made anew,
one of the same key is kept, and one that is begun goes on.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from structcot.config import Config
from structcot.errors import StructcotError
from structcot.eval.config import EvalConfig
from structcot.files import json_sha256, write_json
from structcot.rundir import LOCK

RECORD = "cell.json"
LOG = "log.txt"
# Files up to this size are hashed whole; of larger ones, which are weights, spots that tell two trainings apart.
MAX_WHOLE_BYTES, SPOTS, SPOT_BYTES = 1 << 28, 256, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One command of a cell; paths are relative to the cell's directory.

    `results` are the files that are all there when it has ended well, `outputs` what it may write. `config` goes to NAME.toml before it
    runs. `facts` are JSON values and `files` (paths from the current directory) those whose content decides its result; in how many
    `processes` it runs decides nothing.
    """

    name: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    outputs: tuple[str, ...]
    config: Config | EvalConfig | None = None
    facts: Mapping[str, Any]
    files: tuple[Path, ...] = ()
    processes: int = 1

    @property
    def command(self) -> str:
        """The command as a person types it: ranks of a training are started by torchrun."""
        name, *arguments = self.arguments
        program = ("torchrun", *self.rank_options, f"structcot.{name}") if self.processes > 1 else ("structcot", name)
        return shlex.join((*program, *arguments))

    @property
    def rank_options(self) -> tuple[str, ...]:
        """What torchrun is told before the name of the module."""
        return ("--standalone", "--nproc-per-node", str(self.processes), "-m")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One variant under one setting with one seed. `kind` is that of the perturbation, "" without one; then `fraction` is 0.

    `setting` is "" where there is but one, and for the base that settings share. `needs` names the cell whose model this one starts from,
    "" where none is trained for it. `held_out` is the file of the held-out demonstrations of a variant with a file of its own, which is
    there if that has any.
    """

    name: str
    variant: str
    kind: str
    fraction: float
    setting: str
    seed: int
    directory: Path
    stages: tuple[Stage, ...]
    needs: str = ""
    held_out: Path | None = None

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands of its stages as a person types them."""
        return tuple(stage.command for stage in self.stages)


def stage_keys(cells: Iterable[Cell]) -> dict[str, dict[str, str]]:
    """The key of each stage of each cell, by their names; a cell comes after the one that it needs.

    Raises:
        OSError: if a file cannot be read.
    """
    keys: dict[str, dict[str, str]] = {}
    for cell in cells:
        # What is evaluated of the base decides nothing of what starts from it.
        before = [key for name, key in keys[cell.needs].items() if name != "eval"][-1] if cell.needs else ""
        keys[cell.name] = {}
        for stage in cell.stages:
            before = json_sha256([before, stage.name, dict(stage.facts), [content_hash(path) for path in stage.files]])
            keys[cell.name][stage.name] = before
    return keys


def content_hash(path: Path) -> str:
    """Hash of a file's content; of one of more than 256 MiB its size and 256 spots."""
    status = path.stat()
    return _content_hash(path, status.st_size, status.st_mtime_ns)


@cache
def _content_hash(path: Path, num_bytes: int, changed_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if num_bytes <= MAX_WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(str(num_bytes).encode())
        for spot in range(SPOTS):
            file.seek(num_bytes * spot // SPOTS)
            digest.update(file.read(SPOT_BYTES))
    return digest.hexdigest()


def read_record(cell: Cell) -> dict[str, Any]:
    """What is written of a cell; of one that was never begun, nothing done.

    Raises:
        StructcotError: if it cannot be read.
    """
    path = cell.directory / RECORD
    if not path.is_file():
        return {"status": "waiting", "error": "", "stages": {}}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {**record, "stages": dict(record["stages"])}
    except (ValueError, KeyError, TypeError) as error:
        raise StructcotError(f"{path}: cannot be read: {error!r}; remove {cell.directory}") from error


def need_own(cell: Cell) -> None:
    """Make sure that what lies in the directory of a cell was written by a study.

    Raises:
        StructcotError: naming what was not.
    """
    own = (RECORD, LOCK, LOG)
    if not (cell.directory / RECORD).is_file() and (others := [one.name for one in cell.directory.glob("*") if one.name not in own]):
        raise StructcotError(f"{cell.directory}: holds {min(others)}, which no study has written; move it, or name another output_dir")


def write_record(cell: Cell, status: str, stages: Mapping[str, Mapping[str, Any]], keys: Mapping[str, str], error: str = "") -> None:
    """Write how far a cell has come: `status` is running, done or failed; `stages` hold key, done and seconds of those begun."""
    own = {stage.name: stages[stage.name] for stage in cell.stages if stage.name in stages}
    key = keys[cell.stages[-1].name]
    facts = {"cell": cell.name, "key": key, "status": status, "error": error, "stages": own, "commands": cell.commands}
    write_json(cell.directory / RECORD, facts)


def is_finished(cell: Cell, keys: Mapping[str, str]) -> bool:
    """Whether every stage has been done with these keys, and its results are there."""
    record = read_record(cell)
    stages = record["stages"]
    return record["status"] == "done" and all(
        is_whole(cell, stage) and stages.get(stage.name, {}).get("key") == keys[stage.name] for stage in cell.stages
    )


def is_whole(cell: Cell, stage: Stage) -> bool:
    """Whether all results of a stage are there, and the certificate of what was trained has passed."""
    paths = [cell.directory / name for name in stage.results]
    if not all(path.is_file() for path in paths):
        return False
    return all(json.loads(path.read_text(encoding="utf-8"))["passed"] for path in paths if path.name == "certificate.json")


def remove_outputs(cell: Cell, stage: Stage) -> None:
    """Take away what a stage has written, and nothing else."""
    for name in stage.outputs:
        path = cell.directory / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
