"""The stage that judges: an answer stays where all graders call it right, a program where it passes all tests in the sandbox.

Of an answer without tags of a thought nothing says which of its programs is the solution: one that ends in an example of use would be lost
if the last alone were tried. So those before it are, too, and a record that stays has the one that passes in `extracted`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from structcot.curate.config import CheckConfig
from structcot.curate.prompts import problem_of
from structcot.curate.reformat import has_thought
from structcot.curate.stages import Record, StageFiles
from structcot.eval.grading import grade_cases
from structcot.grading.case import Case, Grade
from structcot.grading.code import extract_program, fenced_blocks, grade_programs
from structcot.parallel import num_processes
from structcot.sandbox.backend import choose_backend
from structcot.sandbox.process import Limits

PROGRAM = "tests"
MOST_OTHERS = 3


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
    if said == {"wrong"}:
        return "the answer is wrong"
    return "there is no answer" if said == {"no_answer"} else "no grader calls it right"


def _grades(name: str, config: CheckConfig, files: StageFiles) -> Iterator[Grade]:
    """What a grader says of each answer to a problem of mathematics, in order."""
    cases = (
        Case(gold=one["gold"], response=one["answer"], tolerance=one["tolerance"], unit=one["unit"], is_multiple=one["is_multiple"])
        for one in files.look()
        if not one["tests"]
    )
    return grade_cases(name, cases, jobs=num_processes(), limit_seconds=config.limit_seconds)


def programs_of(answer: str) -> list[str]:
    """Texts whose last block may be the program: the answer, and if it has no tags some of its other blocks, the last first."""
    if has_thought(answer):
        return [answer]
    last = extract_program(answer)
    others = dict.fromkeys(block for block in reversed(fenced_blocks(answer)) if block.strip() and block != last)
    return [answer, *(f"```\n{block}\n```" for block in list(others)[:MOST_OTHERS])]


def _program_grades(config: CheckConfig, files: StageFiles) -> Iterator[Grade]:
    """What the tests say of the program of each answer, in order. No sandbox is sought before the first is asked for."""
    items = ((text, problem_of(one)) for one in files.look() if one["tests"] for text in programs_of(one["answer"]))
    limits = Limits(seconds=config.timeout_seconds, memory_bytes=int(config.memory_gib * 2**30))
    grades = grade_programs(items, choose_backend(config.sandbox), limits, num_processes())
    shown = iter(tqdm(grades, desc="sandbox", unit="program", mininterval=1.0, dynamic_ncols=True))
    for record in files.look():
        if record["tests"]:
            own = [next(shown) for _ in programs_of(record["answer"])]
            yield next((grade for grade in own if grade.correct), own[0])


def facts_of(config: CheckConfig) -> dict[str, Any]:
    """What decides the verdicts, for the key of the stage."""
    return config.model_dump(mode="json", exclude={"sandbox"})
