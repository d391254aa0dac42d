"""The stage that chooses: of the right answers to a problem those that end, do not loop, and are the shortest, or reflect the most.

A server that leaves out the seed or the temperature gives the same answer again: it counts once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from structcot.curate.config import SelectConfig
from structcot.curate.stages import Record, StageFiles
from structcot.eval.endings import ending_of, is_looping
from structcot.structure.markers import REFLECTION
from structcot.structure.metrics import measure
from structcot.structure.segmenters import by_marker, whole_steps
from structcot.tags import read_answer

# What of `structcot.structure.metrics.measure` a record keeps.
METRICS = ("steps", "step_types", "words", "keywords", "branches")


def select(config: SelectConfig, records: Iterator[Record], files: StageFiles) -> None:
    """Keep `per_problem` answers of each problem; those of a problem follow one another. Each that stays has `metrics` of its thought."""
    for _, group in groupby(records, key=lambda record: record["id"]):
        usable: list[Record] = []
        seen: set[str] = set()
        for record in group:
            words = " ".join(record["text"].split())
            if fault := fault_of(record, config):
                files.reject(record, fault)
            elif words in seen:
                files.reject(record, "the same answer was there before")
            else:
                seen.add(words)
                usable.append({**record, "metrics": metrics_of(record["text"])})
        chosen = sorted(usable, key=lambda record: _rank(record, config))[: config.per_problem]
        numbers = {record["sample"] for record in chosen}
        for record in usable:
            if record["sample"] in numbers:
                files.keep(record)
            else:
                files.reject(record, "another answer to the problem was preferred")


def fault_of(record: Record, config: SelectConfig) -> str:
    """Why an answer can be no demonstration; "" if it can."""
    if ending_of(record["answer"], record["finish_reason"]) != "finished":
        return "the answer was cut off"
    if is_looping(read_answer(record["text"]).thought):
        return "the thought loops"
    if config.max_tokens and record["completion_tokens"] > config.max_tokens:
        return "the answer is longer than select.max_tokens"
    return ""


def metrics_of(text: str) -> dict[str, Any]:
    """The structure of a thought in a few numbers."""
    answer = read_answer(text)
    found = measure(answer, whole_steps(by_marker(answer.thought)))
    return {name: found[name] for name in METRICS}


def _rank(record: Record, config: SelectConfig) -> tuple[float, int, int]:
    """Where an answer stands among those to its problem, the lowest first; the length settles what the structure leaves open."""
    metrics = record["metrics"]
    reflecting = sum(metrics["step_types"][kind] for kind in REFLECTION) / max(1, metrics["words"])
    return -reflecting if config.prefer == "most-structured" else 0.0, len(record["text"]), record["sample"]
