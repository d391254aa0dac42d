"""Which answers are wrong: two graders must say so, and a record on which they disagree is neither right nor wrong.

A grader is a field of the record that holds a judgement made elsewhere, or one of those of `structcot.grading`: `exact` compares the
answers as text after stripping what only typesets, `math` (or `math-verify`, its older name) compares them as mathematics. Each errs in its
own way: the first calls right ones wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from structcot.answers import answer_of
from structcot.grading.case import Case, Grade
from structcot.grading.graders import GRADERS
from structcot.grading.isolated import GraderPool
from structcot.perturb.spec import Spec
from structcot.tags import read_answer
from structcot.traces import GOLD_FIELDS, JUDGEMENT_FIELDS, Trace, question_of

# The names of built-in graders as `graders=A+B` may give them.
BUILT_IN = {"exact": "exact", "math": "math", "math-verify": "math"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The problem of a record and what the graders say: right, wrong, disputed, or unjudged for a `reason`."""

    problem: str
    verdict: str
    reason: str = ""


def judge(trace: Trace, spec: Spec) -> Judgement:
    """Judge one record by the graders that `spec` names.

    Raises:
        ConfigError: if a grader is needed whose package is not installed.
    """
    problem, gold = problem_of(trace, spec), _gold_of(trace, spec)
    found = answer_of(read_answer(trace.text))
    if not problem:
        return Judgement(problem="", verdict="unjudged", reason="no problem found; name its field with problem=FIELD")
    names = _graders(trace, spec, gold)
    needed = 2 if spec.graders == "two" else 1
    if len(names) < needed:
        return Judgement(problem=problem, verdict="unjudged", reason="too few graders: no reference answer; name its field with gold=FIELD")
    if not found and spec.select == "pair":
        return Judgement(problem=problem, verdict="unjudged", reason="no final answer in the text")
    grades = [_grade(name, trace, gold, found) for name in names]
    if failed := [grade.reason for grade in grades if grade.verdict in ("timeout", "error")]:
        return Judgement(problem=problem, verdict="unjudged", reason=f"a grader failed: {failed[0]}")
    said = {grade.correct for grade in grades}
    verdict = "disputed" if len(said) > 1 else "right" if said == {True} else "wrong"
    return Judgement(problem=problem, verdict=verdict)


def problem_of(trace: Trace, spec: Spec) -> str:
    """The text of the problem: the last user turn, or the first field that holds it; "" where none does."""
    if spec.problem:
        return _text_at(trace.record, spec.problem)
    return " ".join(question_of(trace.record).split())


def _graders(trace: Trace, spec: Spec, gold: str) -> list[str]:
    """The graders that can judge this record: its own judgement and one built in, or both of those."""
    if spec.graders not in ("one", "two"):
        names = spec.graders.split("+")
        return [name for name in names if isinstance(trace.record.get(name), bool) or (name in BUILT_IN and gold)]
    own = [name for name in JUDGEMENT_FIELDS if isinstance(trace.record.get(name), bool)][:1]
    built_in = ["math", "exact"] if gold else []
    names = [*own, *built_in] if spec.graders == "two" else [*own, *built_in[::-1]]
    return names[: 2 if spec.graders == "two" else 1]


def _grade(name: str, trace: Trace, gold: str, found: str) -> Grade:
    own = trace.record.get(name)
    if isinstance(own, bool):
        return Grade(extracted=found, verdict="correct" if own else "wrong", reason="as the record says")
    case = Case(gold=gold, pred=found.rstrip(" ."))
    return next(_pool().map([case])) if BUILT_IN[name] == "math" else GRADERS[BUILT_IN[name]](case)


@cache
def _pool() -> GraderPool:
    """A process that compares as mathematics, which can take for ever; it ends with this one."""
    return GraderPool(GRADERS["math"])


def _gold_of(trace: Trace, spec: Spec) -> str:
    return _text_at(trace.record, spec.gold) if spec.gold else _first_text(trace.record, GOLD_FIELDS)


def _first_text(record: dict[str, Any], names: tuple[str, ...]) -> str:
    """The first of the fields that holds a text or number, in the record or in an object `problem` inside it."""
    inside = record.get("problem")
    for holder in ([inside] if isinstance(inside, dict) else []) + [record]:
        for name in names:
            text = _text_at(holder, name)
            if text:
                return text
    return ""


def _text_at(record: Any, dotted: str) -> str:
    """The text under a name, or under names joined by dots for an object inside an object."""
    value = record
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    is_text = isinstance(value, str | int | float) and not isinstance(value, bool)
    return " ".join(str(value).split()) if is_text else ""
