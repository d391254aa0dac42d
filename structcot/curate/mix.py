"""The last stage: how much of which source and difficulty, in a seeded order, as the records that a training reads."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import accumulate
from random import Random
from typing import Any

from structcot.curate.config import CurateConfig, MixConfig
from structcot.curate.stages import Record, StageFiles
from structcot.curate.teacher import system_message

Cell = tuple[str, str]
# What of a record says where it came from and how it was made and checked.
PROVENANCE = ("origin", "sample", "finish_reason", "prompt_tokens", "completion_tokens", "extracted", "verdicts", "reformatted", "fidelity")


def mix(config: CurateConfig, records: Iterator[Record], files: StageFiles) -> None:
    """Choose and order the records; those that are left over fall. In memory are places of records, not records."""
    if files.before is None:
        raise RuntimeError("what is mixed comes from a stage before")
    cells: dict[Cell, list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        cells[cell_of(record, config.mix)].append(number)
    rng = Random(f"mix/{config.seed}")
    wanted = counts_of({cell: len(own) for cell, own in cells.items()}, config.mix)
    chosen = [number for cell, own in sorted(cells.items()) for number in rng.sample(own, wanted[cell])]
    rng.shuffle(chosen)
    left = sorted({number for own in cells.values() for number in own} - set(chosen))
    with files.before.kept.open("rb") as file:
        places = list(accumulate((len(line) for line in file), initial=0))
        for number in chosen:
            file.seek(places[number])
            files.keep(demonstration(json.loads(file.readline()), config))
        for number in left:
            file.seek(places[number])
            files.reject(json.loads(file.readline()), "beyond what the mix takes")


def cell_of(record: Mapping[str, Any], config: MixConfig) -> Cell:
    """The source of a record and the lower bound of its difficulty, "" where the mix has no bounds or the record no difficulty."""
    bounds = sorted(config.difficulty, key=float)
    label = record["difficulty"]
    place = bisect_right([float(bound) for bound in bounds], label) if label is not None else 0
    return record["source"], bounds[place - 1] if place else ""


def counts_of(available: Mapping[Cell, int], config: MixConfig) -> dict[Cell, int]:
    """How many are taken of each cell: by the shares, as many as there are at most; without a total the most at which all shares hold."""
    weights = {cell: _weight(cell, number, config) for cell, number in available.items()}
    whole = sum(weights.values())
    if not whole:
        return dict.fromkeys(available, 0)
    # Without shares the weights are the numbers themselves, and this is all that there is.
    most = min(number * whole / weights[cell] for cell, number in available.items() if weights[cell])
    total = config.total or int(most + 1e-9)
    exact = {cell: total * weight / whole for cell, weight in weights.items()}
    counts = {cell: int(share) for cell, share in exact.items()}
    by_rest = sorted(exact, key=lambda cell: (counts[cell] - exact[cell], cell))
    for cell in by_rest[: total - sum(counts.values())]:
        counts[cell] += 1
    return {cell: min(count, available[cell]) for cell, count in counts.items()}


def demonstration(record: Mapping[str, Any], config: CurateConfig) -> Record:
    """A record as it is trained on, with all that it came from."""
    system = system_message(config.output.system_prompt)
    turns = [("system", system)] if system else []
    turns += [("user", record["asked"]), ("assistant", record["text"])]
    return {
        "id": f"{record['id']}/{record['sample']}",
        "messages": [{"role": role, "content": content} for role, content in turns],
        "source": record["source"],
        "gold": record["gold"],
        "difficulty": record["difficulty"],
        "metrics": record["metrics"],
        "provenance": {"teacher": config.teacher.model, **{name: record[name] for name in PROVENANCE if name in record}},
    }


def _weight(cell: Cell, number: int, config: MixConfig) -> float:
    source, bound = cell
    by_source = config.sources.get(source, 0.0) if config.sources else 1.0
    by_difficulty = config.difficulty.get(bound, 0.0) if config.difficulty else 1.0
    return by_source * by_difficulty * (1.0 if config.sources or config.difficulty else number)
