"""Outputs become graded lines: mathematics by two graders in processes of their own, code by running it in a sandbox."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm

from structcot.console import say
from structcot.errors import ConfigError
from structcot.eval.config import EvalConfig
from structcot.eval.forcing import forced_response
from structcot.eval.problem import Problem
from structcot.eval.samples import Sample
from structcot.grading.case import Case, Grade
from structcot.grading.code import grade_programs
from structcot.grading.graders import GRADERS
from structcot.grading.isolated import GraderPool
from structcot.parallel import num_processes
from structcot.sandbox.backend import choose_backend
from structcot.sandbox.process import Limits

PAPER = "paper"


def need_graders(problems: Iterable[Problem], config: EvalConfig) -> None:
    """Make sure, before anything is generated, that all of it can be judged.

    Raises:
        ConfigError: if a package is not installed, or programs cannot be kept in on this machine.
    """
    kinds = {bool(problem.tests) for problem in problems}
    if True in kinds:
        choose_backend(config.code.sandbox)
    missing = [name for name in ("math_verify", "mpmath") if False in kinds and find_spec(name) is None]
    if missing:
        raise ConfigError(f"grading: the package {missing[0]} is not installed; pip install structcot[eval]")


def grade_samples(samples: Sequence[Sample], problems: Mapping[str, Problem], config: EvalConfig) -> list[dict[str, Any]]:
    """Grade every output, whatever was said of it before, and return the lines of samples.jsonl in the order of `samples`.

    `problems` are by the key of a sample. What was refused has no answer; mathematics is judged by the grader of its task, or by
    `grading.math`, and by the paper's grader beside it, code by its tests. Answers that were forced out of a thought which did not end are
    judged apart.

    Raises:
        ConfigError: if a grader or a sandbox is needed that is not there.
    """
    written = [sample for sample in samples if sample.finish_reason != "refused"]
    maths = [sample for sample in written if not problems[sample.key].tests]
    programs = [sample for sample in written if problems[sample.key].tests]
    grades = dict(zip([sample.key for sample in programs], _grades_of_programs(programs, problems, config), strict=True))
    grades |= _grades_by_task(maths, problems, config)
    papers = _grades_of_answers(PAPER, maths, problems, config)
    lines = [sample.graded(grades.get(sample.key) or _nothing(sample), papers.get(sample.key)) for sample in samples]
    if not config.sampling.forced_answer_tokens:
        return lines
    forced = [replace(sample, output=forced_response(sample)) for sample in maths if sample.forced_output is not None]
    judged = _grades_by_task(forced, problems, config)
    return [
        {**line, "forced_correct": judged[sample.key].correct if sample.key in judged else line["correct"]}
        for sample, line in zip(samples, lines, strict=True)
    ]


def case_of(sample: Sample, problem: Problem) -> Case:
    """What a grader of mathematics is given."""
    return Case(
        gold=problem.gold,
        response=sample.output,
        tolerance=problem.tolerance,
        unit=problem.unit,
        is_multiple=problem.is_multiple,
        benchmark=sample.task,
    )


def grade_cases(name: str, cases: Iterable[Case], *, jobs: int, limit_seconds: float, total: int | None = None) -> Iterator[Grade]:
    """What the grader `name` says of each case, in order, with a line of progress; of `total` cases, where their number is known."""
    with GraderPool(GRADERS[name], jobs=jobs, limit_seconds=limit_seconds) as pool:
        yield from tqdm(pool.map(cases), total=total, desc=f"grader {name}", unit="answer", mininterval=1.0, dynamic_ncols=True)


def _nothing(sample: Sample) -> Grade:
    return Grade(extracted="", verdict="no_answer", reason=f"nothing was generated: {sample.finish_detail}")


def _grades_by_task(samples: Sequence[Sample], problems: Mapping[str, Problem], config: EvalConfig) -> dict[str, Grade]:
    """Grade each answer by the grader of its task, or else of the evaluation; by the key of its sample."""
    graders = {sample.key: problems[sample.key].grader or config.grading.math for sample in samples}
    grades: dict[str, Grade] = {}
    for name in sorted(set(graders.values())):
        grades |= _grades_of_answers(name, [sample for sample in samples if graders[sample.key] == name], problems, config)
    return grades


def _grades_of_answers(name: str, samples: Sequence[Sample], problems: Mapping[str, Problem], config: EvalConfig) -> dict[str, Grade]:
    if not samples:
        return {}
    cases = (case_of(sample, problems[sample.key]) for sample in samples)
    jobs = min(config.grading.jobs or num_processes(), len(samples))
    grades = grade_cases(name, cases, jobs=jobs, limit_seconds=config.grading.limit_seconds, total=len(samples))
    return dict(zip([sample.key for sample in samples], grades, strict=True))


def _grades_of_programs(samples: Sequence[Sample], problems: Mapping[str, Problem], config: EvalConfig) -> Iterator[Grade]:
    if not samples:
        return
    backend = choose_backend(config.code.sandbox)
    say(f"programs are run under {backend.kind}" if backend.kind != "none" else "programs are run unprotected, as code.sandbox says")
    limits = Limits(seconds=config.code.timeout_seconds, memory_bytes=int(config.code.memory_gib * 2**30))
    items = ((sample.output, problems[sample.key]) for sample in samples)
    grades = grade_programs(items, backend, limits, config.grading.jobs or num_processes())
    yield from tqdm(grades, total=len(samples), desc="sandbox", unit="program", mininterval=1.0, dynamic_ncols=True)
