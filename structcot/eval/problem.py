"""One problem of a benchmark, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramTest:
    """One test of a program: text on standard input and output, or arguments and result of a call, each a JSON value a line.

    A result of several lines is any of them.
    """

    input: str
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question and what is needed to judge an answer to it.

    Mathematics has a `gold` answer (see structcot.grading.case); code has `tests`, of which all must pass, and `entry_point`, the name of
    the function that they call: "" for programs that read standard input. `starter_code` is shown with the question. `group` is the split
    that results are also given by: a difficulty, a level, a subject. `grader` beats the one of the evaluation.
    """

    id: str
    question: str
    gold: str = ""
    tolerance: float | None = None
    unit: str = ""
    is_multiple: bool = False
    tests: tuple[ProgramTest, ...] = ()
    entry_point: str = ""
    starter_code: str = ""
    group: str = ""
    grader: str = ""
