"""Where a study stands, for a person: on a terminal a table that is drawn anew in its place, elsewhere a line for each change."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

from structcot.console import clock

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where one cell stands: its status, the stage that runs with its seconds so far, and the seconds that the whole cell has taken."""

    status: str = WAITING
    stage: str = ""
    seconds: float = 0.0


def headline(standings: Mapping[str, Standing], jobs: int) -> str:
    """How many cells are where, and how long the rest may take if they take as long as those that are done."""
    counts = Counter(standing.status for standing in standings.values())
    text = f"{counts[DONE]} of {len(standings)} cells done"
    text += "".join(f", {counts[status]} {status}" for status in (RUNNING, FAILED, WAITING) if counts[status])
    took = [standing.seconds for standing in standings.values() if standing.status == DONE and standing.seconds]
    left = sum(standing.status in (RUNNING, WAITING) for standing in standings.values())
    if took and left:
        begun = sum(standing.seconds for standing in standings.values() if standing.status == RUNNING)
        seconds = max(0.0, left * sum(took) / len(took) - begun) / min(jobs, left)
        text += f", about {clock(seconds)} left"
    return text


def table(standings: Mapping[str, Standing], jobs: int) -> list[str]:
    """The headline, and a line for each cell that runs or has failed."""
    width = max(map(len, standings), default=0)
    shown = [(name, one) for name, one in standings.items() if one.status in (RUNNING, FAILED)]
    return [headline(standings, jobs), *(f"  {name:{width}}  {one.stage:15} {clock(one.seconds)}  {one.status}" for name, one in shown)]


def show(before: Mapping[str, Standing], standings: Mapping[str, Standing], jobs: int, stream: TextIO) -> None:
    """Show what is new since `before`, the standings that were shown last; none were if it is empty."""
    if stream.isatty():
        # A line that wraps would count for two when the table is drawn over.
        columns = shutil.get_terminal_size().columns - 1
        up = f"\x1b[{len(table(before, jobs))}A" if before else ""
        stream.write(up + "\x1b[J" + "".join(f"{line[:columns]}\n" for line in table(standings, jobs)))
    else:
        for name, one in standings.items():
            old = before.get(name, Standing())
            if (one.status, one.stage) != (old.status, old.stage):
                stream.write(f"{name}: {one.stage or one.status} ({headline(standings, jobs)})\n")
    stream.flush()
