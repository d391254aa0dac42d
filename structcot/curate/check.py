"""The stage that judges: an answer stays where all graders call it right, a program where it passes all tests in the sandbox."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tqdm import tqdm

from structcot.curate.config import CheckConfig
from structcot.curate.prompts import problem_of
from structcot.curate.stages import Record, StageFiles
from structcot.eval.grading import grade_cases
from structcot.grading.case import Case, Grade
from structcot.grading.code import grade_programs
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
    cases = (
        Case(gold=one["gold"], response=one["answer"], tolerance=one["tolerance"], unit=one["unit"], is_multiple=one["is_multiple"])
        for one in files.look()
        if not one["tests"]
    )
    return grade_cases(name, cases, jobs=num_processes(), limit_seconds=config.limit_seconds)


def _program_grades(config: CheckConfig, files: StageFiles) -> Iterator[Grade]:
    """What the tests say of each program, in order. No sandbox is sought before the first is asked for."""
    items = ((one["answer"], problem_of(one)) for one in files.look() if one["tests"])
    limits = Limits(seconds=config.timeout_seconds, memory_bytes=int(config.memory_gib * 2**30))
    grades = grade_programs(items, choose_backend(config.sandbox), limits, num_processes())
    yield from tqdm(grades, desc="sandbox", unit="program", mininterval=1.0, dynamic_ncols=True)


def facts_of(config: CheckConfig) -> dict[str, Sequence[str] | float]:
    """What decides the verdicts, for the key of the stage."""
    return {"graders": config.graders, "limit_seconds": config.limit_seconds, "timeout_seconds": config.timeout_seconds}
