"""One record through a chain of perturbations, and what became of it."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from structcot.perturb.change import Change, measure_change
from structcot.perturb.choose import stream
from structcot.perturb.content import corrupt_digits, remove_keywords
from structcot.perturb.donors import Donors, domain_of
from structcot.perturb.edit import Edit, NotApplied
from structcot.perturb.spec import CONTENT_KINDS, Spec
from structcot.perturb.structure import delete_steps, insert_steps, pieces_of, shuffle_steps
from structcot.perturb.wrong_answer import NO_WRONG_ANSWER, WrongAnswers, with_prompt_prefix
from structcot.tags import read_answer
from structcot.traces import DERIVED_FIELDS, Trace, UnusableTrace, read_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What one perturbation of a chain did to one record; `reason` says why it did nothing."""

    kind: str
    units: int = 0
    chosen: int = 0
    changed: int = 0
    order: tuple[int, ...] | None = None
    num_steps: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One line of the input after all perturbations: `record` is None where the line stays as it is, or is left out."""

    source: str
    record: dict[str, Any] | None = None
    is_left_out: bool = False
    stages: tuple[Stage, ...] = ()
    change: Change | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that decides what becomes of a record beside the record itself."""

    specs: tuple[Spec, ...]
    seed: int
    answer_field: str = ""
    donors: tuple[Donors, ...] = ()
    wrong: WrongAnswers | None = None


def perturb_line(source: str, line: bytes, plan: Plan) -> Outcome:
    """Read, perturb and measure one line; never fails, an unusable line is an outcome with a reason."""
    try:
        trace = read_trace(source, line, plan.answer_field)
    except UnusableTrace as error:
        return Outcome(source=source, reason=str(error))
    number = int(source.rpartition(":")[2])
    if plan.wrong and number in plan.wrong.left_out:
        return Outcome(source=source, is_left_out=True, reason=plan.wrong.left_out[number])
    text, stages = trace.text, []
    for index, spec in enumerate(plan.specs):
        if spec.kind == "wrong-answer":
            text, stage = _answer_wrongly(text, number, plan.wrong)
        else:
            donors = plan.donors[index] if plan.donors else Donors()
            text, stage = _run_stage(trace, text, spec, stream(plan.seed, index, spec.kind, trace.identity), donors)
        stages.append(stage)
    record = _changed_record(trace, text, plan.specs[0].prompt_prefix if plan.wrong else "")
    change = measure_change(trace.text, text)
    return Outcome(source=source, record=record, stages=tuple(stages), change=change)


def gather_donors(lines: Iterable[tuple[str, bytes]], spec: Spec, answer_field: str) -> Donors:
    """Cut the thoughts of sampled lines into steps that may be inserted elsewhere; lines that hold none give none."""
    steps: list[str] = []
    owners: list[tuple[str, str]] = []
    for source, line in lines:
        try:
            trace = read_trace(source, line, answer_field)
            contents = pieces_of(read_answer(trace.text), spec, trace.record.get("steps")).contents
        except (UnusableTrace, NotApplied):
            continue  # reported when the line itself is perturbed
        owner = (trace.identity, domain_of(trace, spec))
        steps += contents
        owners += [owner] * len(contents)
    return Donors(steps=tuple(steps), owners=tuple(owners))


def _changed_record(trace: Trace, text: str, prompt_prefix: str) -> dict[str, Any] | None:
    if text == trace.text and not prompt_prefix:
        return None
    record = trace.with_text(text)
    if text != trace.text:
        for name in DERIVED_FIELDS:
            record.pop(name, None)
    return with_prompt_prefix(record, prompt_prefix) if prompt_prefix else record


def _answer_wrongly(text: str, number: int, wrong: WrongAnswers | None) -> tuple[str, Stage]:
    """Put the wrong answer that is meant for line `number` in place of its answer."""
    if wrong is None:  # a fraction of 0: nothing was judged
        return text, Stage(kind="wrong-answer")
    answer = wrong.answer_for(number)
    if answer is None:
        reason = wrong.kept.get(number, "")
        return text, Stage(kind="wrong-answer", units=reason in ("", NO_WRONG_ANSWER), reason=reason)
    return answer, Stage(kind="wrong-answer", units=1, chosen=1, changed=1)


def _run_stage(trace: Trace, text: str, spec: Spec, rng: random.Random, donors: Donors) -> tuple[str, Stage]:
    """Apply one perturbation to a text of `trace`; at a fraction of 0 nothing is even looked at."""
    if not spec.fraction * spec.record_fraction:
        return text, Stage(kind=spec.kind)
    if rng.random() >= spec.record_fraction:
        return text, Stage(kind=spec.kind)
    try:
        edit, num_steps = _edit(trace, text, spec, rng, donors)
    except NotApplied as error:
        return text, Stage(kind=spec.kind, reason=str(error))
    stage = Stage(kind=spec.kind, units=edit.units, chosen=edit.chosen, changed=edit.changed, order=edit.order, num_steps=num_steps)
    return edit.text, stage


def _edit(trace: Trace, text: str, spec: Spec, rng: random.Random, donors: Donors) -> tuple[Edit, int]:
    """The edit of one perturbation, and the number of steps before it (0 where steps are not looked at)."""
    answer = read_answer(text)
    if spec.kind in CONTENT_KINDS:
        return (corrupt_digits if spec.kind == "digits" else remove_keywords)(answer, spec, rng), 0
    pieces = pieces_of(answer, spec, trace.record.get("steps") if text == trace.text else None)
    if spec.kind == "delete":
        edit = delete_steps(answer, pieces, spec, rng)
    elif spec.kind == "shuffle":
        edit = shuffle_steps(answer, pieces, spec, rng)
    else:
        edit = insert_steps(answer, pieces, spec, rng, donors, (trace.identity, domain_of(trace, spec)))
    return edit, len(pieces.contents)
