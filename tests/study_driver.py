"""`structcot study` as a process of its own: the real one, or on request with stand-ins for its commands and for its end.

Imports nothing heavy, so that a test may start many of them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from structcot.errors import StructcotError
from structcot.study import command, runner, work
from structcot.study.cells import Cell, Stage
from structcot.study.config import StudyConfig

POLL_SECONDS = 0.002  # stand-ins are over in a moment


def stand_in_of(stage: Stage) -> list[str]:
    """The process that takes the place of a stage's."""
    return [sys.executable, "-S", "-E", os.environ["STAND_IN"], *stage.arguments]


def gather(config: StudyConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """The end of a study of stand-ins: the results of the cells that have any, as study.json."""
    paths = {cell.name: cell.directory / "eval" / "results.json" for cell in cells}
    facts = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    (Path(config.output_dir) / "study.json").write_text(json.dumps(facts))
    return facts


if __name__ == "__main__":
    finish = runner.finish_study
    if "STAND_IN" in os.environ:
        work.program_of, runner.POLL_SECONDS, finish = stand_in_of, POLL_SECONDS, gather
    print("ready", flush=True)
    try:
        sys.exit(1 if command.study(Path(sys.argv[1]), sys.argv[2:], finish=finish).missing else 0)
    except StructcotError as error:
        print(f"structcot: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
