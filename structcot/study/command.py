"""`structcot study`: what its options do, and how a person is told what came of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from structcot.errors import ConfigError
from structcot.files import write_text
from structcot.study.cells import Cell
from structcot.study.config import read_study
from structcot.study.grid import make_grid
from structcot.study.runner import Finish, Outcome, finish_study, run_study
from structcot.study.slurm import slurm_script


def study(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    jobs: int = 1,
    cell: str = "",
    dry_run: bool = False,
    slurm: Path | None = None,
    finish: Finish = finish_study,
) -> Outcome:
    """Do what `structcot study` is asked for: run a study or one of its cells, print the cells, or write an array job.

    Raises:
        ConfigError: naming the file, key or option that is wrong.
        StoppedWithCheckpoint: if a signal stopped it; the same call goes on.
    """
    config = read_study(path, overrides)
    if cell and (slurm or dry_run):
        raise ConfigError("--cell: runs one cell; leave out --slurm and --dry-run")
    cells = make_grid(config)
    if slurm is not None:
        write_text(slurm, slurm_script(cells, [str(path), *overrides], config.title))
        print(slurm)
    if dry_run:
        print(listing(cells))
    if slurm is not None or dry_run:
        return Outcome(facts=grid_facts(cells), missing={})
    outcome = run_study(config, jobs=jobs, cell=cell, finish=finish)
    for name, error in outcome.missing.items():
        print(f"{name}: {error}", file=sys.stderr)
    if outcome.facts:
        print("\n".join([*outcome.facts.get("conclusions", ()), str(Path(config.output_dir) / "report.html")]))
    return outcome


def listing(cells: Sequence[Cell]) -> str:
    """Every cell with its number and its commands, as a person would type them."""
    lines = ([f"{number}  {cell.name}", *(f"   {command}" for command in cell.commands)] for number, cell in enumerate(cells))
    return "\n".join(chain.from_iterable(lines))


def grid_facts(cells: Sequence[Cell]) -> dict[str, Any]:
    """The cells and their commands, as JSON values."""
    return {"cells": [{"name": cell.name, "commands": [shlex.split(command) for command in cell.commands]} for cell in cells]}
