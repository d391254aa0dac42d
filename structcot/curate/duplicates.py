"""The stage that lets near duplicates fall: of problems that are the same but for some words, the first stays."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import Any

from structcot.curate.config import DuplicatesConfig, ScaleConfig
from structcot.curate.stages import Done, Record, StageFiles
from structcot.errors import ConfigError, StructcotError
from structcot.files import json_sha256, write_json
from structcot.parallel import num_processes

WORK, LAST_LINES = "work", 5
# Of at least so many bytes each, tasks of a pass are worth their start.
BYTES_PER_TASK = 4 << 20


def need_datatrove() -> None:
    """Make sure that near duplicates can be sought.

    Raises:
        ConfigError: if datatrove is not installed.
    """
    if find_spec("datatrove") is None:
        raise ConfigError("duplicates: the package datatrove is not installed; pip install structcot[eval], or set duplicates.buckets = 0")


def deduplicate(config: DuplicatesConfig, scale: ScaleConfig, records: Iterator[Record], files: StageFiles) -> None:
    """Let every problem fall that is near one before it.

    Raises:
        StructcotError: if the search for duplicates fails.
    """
    if files.before is None:
        raise RuntimeError("duplicates are sought among the records of a stage before")
    job = job_of(config, scale, files.before, files.directory)
    _run(job, files.directory)
    from structcot.curate.near_duplicates import lines_of_share, read_clusters

    first: dict[int, str] = {}
    for task, clusters in enumerate(read_clusters(Path(job["directory"]), job["tasks"])):
        for place, _ in enumerate(lines_of_share(files.before.kept, task, job["tasks"])):
            record = next(records)
            cluster = clusters.get(place)
            kept = record["id"] if cluster is None else first.setdefault(cluster, record["id"])
            if kept == record["id"]:
                files.keep(record)
            else:
                files.reject(record, "nearly the same problem was there before", kept)
    rmtree(files.directory / WORK)  # signatures are larger than what they are of


def job_of(config: DuplicatesConfig, scale: ScaleConfig, before: Done, directory: Path) -> dict[str, Any]:
    """What the search is told, as JSON values; its directory has the hash of the rest as its name, so that no pass meets other files."""
    tasks = scale.tasks or max(1, min(64, before.kept.stat().st_size // BYTES_PER_TASK))
    how = {"executor": scale.executor, "workers": scale.workers or (num_processes() if scale.executor == "local" else 0)}
    what = {**config.model_dump(mode="json"), "sha256": before.sha256, "tasks": tasks}
    return {
        **what,
        **how,
        "source": str(before.kept.resolve()),
        "slurm": scale.slurm,
        "directory": str(directory.resolve() / WORK / json_sha256(what)[:12]),
    }


def _run(job: dict[str, Any], directory: Path) -> None:
    path, log_path = directory / "job.json", directory / "log.txt"
    write_json(path, job)
    with log_path.open("wb") as log:
        status = subprocess.run(
            [sys.executable, "-m", "structcot.curate.near_duplicates", str(path)], stdout=log, stderr=log, check=False
        ).returncode
    if status:
        last = [line for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-LAST_LINES:]
        said = " | ".join(last) or json.dumps(status)
        raise StructcotError(f"duplicates: the search ended with status {status}: {said}; the whole log is {log_path}")
