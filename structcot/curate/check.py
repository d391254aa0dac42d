"""The stage that judges: an answer stays where all graders call it right, a program where it passes all tests in the sandbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from structcot.curate.config import CheckConfig
from structcot.curate.prompts import problem_of
from structcot.curate.stages import Record, StageFiles, read_records
from structcot.grading.case import Case, Grade
from structcot.grading.code import grade_programs
from structcot.grading.graders import GRADERS
from structcot.grading.isolated import GraderPool
from structcot.parallel import num_processes
from structcot.sandbox.backend import choose_backend
from structcot.sandbox.process import Limits

PROGRAM = "tests"


def check(config: CheckConfig, records: Iterator[Record], files: StageFiles) -> None:
    """Judge every answer. A record that stays has the verdict of each grader in `verdicts`.

    Raises:
        ConfigError: if a grader or a sandbox is needed that is not there.
    """
    judged = [(name, _grades(name, config, files)) for name in config.graders]
    programs = _program_grades(config, files)
    for record in records:
        names = [(PROGRAM, programs)] if record["tests"] else judged
        grades = {name: next(grades) for name, grades in names}
        verdicts = {name: grade.verdict for name, grade in grades.items()}
        whole = {**record, "extracted": next(iter(grades.values())).extracted, "verdicts": verdicts}
        if all(grade.correct for grade in grades.values()):
            files.keep(whole)
        else:
            files.reject(whole, _reason(verdicts), "; ".join(f"{name}: {grade.reason}" for name, grade in grades.items()))


def _reason(verdicts: dict[str, str]) -> str:
    """Why an answer falls, by all graders that do not call it right."""
    said = set(verdicts.values())
    if "correct" in said:
        return "the graders disagree"
    return {"wrong": "the answer is wrong", "no_answer": "there is no answer"}.get(said.pop() if len(said) == 1 else "", "not right")


def _grades(name: str, config: CheckConfig, files: StageFiles) -> Iterator[Grade]:
    """What a grader says of each answer to a problem of mathematics, in order."""
    cases = (Case(gold=one["gold"], response=one["answer"], **_case_facts(one)) for one in _of_kind(files, lambda one: not one["tests"]))
    with GraderPool(GRADERS[name], jobs=num_processes(), limit_seconds=config.limit_seconds) as pool:
        yield from tqdm(pool.map(cases), desc=f"grader {name}", unit="answer", mininterval=1.0, dynamic_ncols=True)


def _case_facts(record: Record) -> dict[str, Any]:
    return {"tolerance": record["tolerance"], "unit": record["unit"], "is_multiple": record["is_multiple"]}


def _program_grades(config: CheckConfig, files: StageFiles) -> Iterator[Grade]:
    """What the tests say of each program, in order."""
    items = ((one["answer"], replace(problem_of(one), id=one["id"])) for one in _of_kind(files, lambda one: bool(one["tests"])))
    first = next(items, None)
    if first is None:
        return
    limits = Limits(seconds=config.timeout_seconds, memory_bytes=int(config.memory_gib * 2**30))
    grades = grade_programs(_again(first, items), choose_backend(config.sandbox), limits, num_processes())
    yield from tqdm(grades, desc="sandbox", unit="program", mininterval=1.0, dynamic_ncols=True)


def _again(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _of_kind(files: StageFiles, is_wanted: Callable[[Record], bool]) -> Iterator[Record]:
    return (record for record in (read_records(files.before.kept) if files.before else ()) if is_wanted(record))


def facts_of(config: CheckConfig) -> dict[str, Sequence[str] | float]:
    """What decides the verdicts, for the key of the stage."""
    return {"graders": config.graders, "limit_seconds": config.limit_seconds, "timeout_seconds": config.timeout_seconds}
