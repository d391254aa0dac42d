"""What a finished cell has to say: right answers problem by problem, how its outputs look, what was done to its data, and its losses.

Everything is read from what the cell's own commands have written; nothing of it depends on how long they took or how often they were
stopped. Shape legend: P problems.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from structcot.errors import StructcotError
from structcot.structure.keywords import count_keywords
from structcot.structure.metrics import starts_with_reflection
from structcot.structure.segmenters import by_marker
from structcot.study.cells import Cell
from structcot.study.config import BASE
from structcot.tags import read_answer

Line = Mapping[str, Any]
NUM_EXAMPLES = 3
FAMILY = "paper"
LAST_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Of one task: the share of right samples of each problem, also where thoughts were forced to end (None: not asked for)."""

    problem_ids: tuple[str, ...]
    right_P: np.ndarray
    forced_P: np.ndarray | None
    outputs: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One finished cell. `manipulation` is the report of its perturbation, `trained` its training; each is None without one."""

    cell: Cell
    tasks: Mapping[str, Answers]
    examples: tuple[Mapping[str, Any], ...]
    manipulation: Mapping[str, Any] | None
    trained: Mapping[str, Any] | None


def read_finished(cell: Cell) -> Finished:
    """Read a cell whose every stage has ended.

    Raises:
        StructcotError: if a file is not what its command writes.
    """
    try:
        with (cell.directory / "eval" / "samples.jsonl").open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        by_task: dict[str, list[Line]] = {}
        for line in lines:
            by_task.setdefault(line["task"], []).append(line)
        return Finished(
            cell=cell,
            tasks={task: answers_of(own) for task, own in by_task.items()},
            examples=tuple(map(_example, lines[:NUM_EXAMPLES])),
            manipulation=_manipulation(cell.directory / "data.report.json"),
            trained=_trained(cell),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise StructcotError(f"{cell.directory}: cannot be read: {error!r}; remove it and run the study again") from error


def answers_of(lines: Sequence[Line]) -> Answers:
    """Sum the graded lines of one task up; problems are in the order in which they come."""
    ids = {problem: number for number, problem in enumerate(dict.fromkeys(line["problem_id"] for line in lines))}
    problem_S = np.array([ids[line["problem_id"]] for line in lines])
    count_P = np.bincount(problem_S)
    forced = [line.get("forced_correct") for line in lines]

    def share_P(right: Sequence[Any]) -> np.ndarray:
        return np.bincount(problem_S, weights=np.array(right, dtype=float)) / count_P

    return Answers(
        problem_ids=tuple(ids),
        right_P=share_P([line["correct"] for line in lines]),
        forced_P=None if None in forced else share_P(forced),
        outputs=_outputs(lines),
    )


def _outputs(lines: Sequence[Line]) -> dict[str, float]:
    """How outputs look: their length, how they end, how many words of reflection they hold, and whether they begin with one."""
    tokens = np.array([line["completion_tokens"] for line in lines])
    texts = [line["output"] for line in lines]
    endings = [line["ending"] for line in lines]
    thoughts = [read_answer(text).thought for text in texts]
    return {
        "tokens_mean": float(tokens.mean()),
        "tokens_median": float(np.median(tokens)),
        **{ending: endings.count(ending) / len(lines) for ending in ("finished", "truncated", "looping")},
        "keywords": sum(sum(count_keywords(text)[FAMILY].values()) for text in texts) / len(lines),
        "first_reflects": sum(bool(thought) and starts_with_reflection(thought, by_marker(thought)) for thought in thoughts) / len(lines),
    }


def _example(line: Line) -> dict[str, Any]:
    question = next((turn["content"] for turn in reversed(line["prompt"]) if turn["role"] == "user"), "")
    kept = ("task", "problem_id", "gold", "output", "correct", "ending")
    return {**{key: line[key] for key in kept}, "question": question}


def _manipulation(path: Path) -> dict[str, Any] | None:
    """What the report of `structcot perturb` says was really done."""
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    return {
        "realised_fraction": report.get("realised_fraction"),
        "edit_distance": report["edit_distance_per_word"],
        "changed_records": report["changed"],
        **{key: report[key] for key in ("tokens_before", "tokens_after", "keywords_before", "keywords_after")},
        "order_tau": report["stages"][-1]["kendall_tau"] if report["stages"] else None,
    }


def _trained(cell: Cell) -> dict[str, Any] | None:
    """What a cell's run was trained on. `held_out_loss` is that of the demonstrations as they are, None where none are held out.

    A base is trained on data of its own, and holds out nothing that can be compared.
    """
    run = cell.directory / "run"
    if cell.variant == BASE and not run.is_dir():
        return None
    plan = json.loads((run / "data" / "plan.json").read_text(encoding="utf-8"))
    with (run / "metrics.jsonl").open(encoding="utf-8") as file:
        steps = [json.loads(line) for line in file]
    losses = [step["train/loss"] for step in steps if "train/loss" in step][-LAST_STEPS:]
    return {
        "records": plan["samples"],
        "tokens": steps[-1]["train/num_tokens"],
        "steps": plan["steps"],
        "final_loss": sum(losses) / len(losses),
        "held_out_loss": None if cell.variant == BASE else steps[-1].get("eval/loss"),
    }
