"""What the page shows of one trace: its text once, where its parts and steps lie, and what it is about.

Offsets in the rows count UTF-16 units, which is how a browser counts the characters of a string; everywhere else in the package they count
code points. A row is a list and not a dictionary because there are thousands; `ROW_FIELDS` names its places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from structcot.structure.markers import STEP_TYPES
from structcot.structure.segmenters import Step, by_marker
from structcot.tags import Answer, read_answer
from structcot.traces import JUDGEMENT_FIELDS, Trace, question_of

ROW_FIELDS = ("source", "name", "question", "text", "bounds", "is_closed", "defect", "is_correct", "steps", "note", "side")


@dataclass(frozen=True, slots=True)
class TypeNames:
    """The types of steps by number: the known ones, then those that records bring along, in the order in which they come."""

    names: list[str] = field(default_factory=lambda: list(STEP_TYPES))
    numbers: dict[str, int] = field(default_factory=lambda: {name: number for number, name in enumerate(STEP_TYPES)})

    def number(self, name: str) -> int:
        """The number of a type, a new one for a new name."""
        if name not in self.numbers:
            self.numbers[name] = len(self.names)
            self.names.append(name)
        return self.numbers[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A trace with its steps; `note` says why the record's own steps are not the ones shown, "" where they are or it has none."""

    trace: Trace
    answer: Answer
    steps: list[Step]
    note: str

    @property
    def step_texts(self) -> list[str]:
        """The texts of the steps, in order."""
        thought = self.answer.thought
        return [thought[step.start : step.end] for step in self.steps]


def read_shown(trace: Trace) -> Shown:
    """Cut the thought of a trace into steps: those of the field `steps` where they fit it, else those that the markers tell."""
    answer = read_answer(trace.text)
    steps, note = None, ""
    if trace.record.get("steps") is not None:
        steps = _own_steps(trace.record["steps"], len(answer.thought))
        note = "" if steps is not None else 'the "steps" of the record do not fit its thought; these are told by markers'
    return Shown(trace=trace, answer=answer, steps=by_marker(answer.thought) if steps is None else steps, note=note)


def _own_steps(listed: Any, num_characters: int) -> list[Step] | None:
    """Read the steps of a record; None where they are not in order, overlap, leave the thought or are no steps at all."""
    if not isinstance(listed, list):
        return None
    steps, last = [], 0
    for item in listed:
        values = (item.get("start"), item.get("end"), item.get("type")) if isinstance(item, dict) else (None, None, None)
        start, end, kind = values
        if type(start) is not int or type(end) is not int or not isinstance(kind, str) or not last <= start <= end <= num_characters:
            return None
        steps.append(Step(start, end, kind))
        last = end
    return steps


def page_row(shown: Shown, types: TypeNames, side: int = 0) -> list[Any]:
    """Lay out a row of the page in the order of `ROW_FIELDS`.

    `bounds` are the start and end of the thought and of the solution in the text; `steps` three numbers a step: how far it starts behind
    the end of the one before it, its length, the number of its type; `is_correct` is 1, 0 or -1 for unknown; `side` is 1 for a record
    that only the other file has.
    """
    answer, record = shown.answer, shown.trace.record
    offset = answer.thought_start
    places = [answer.thought_start, answer.thought_end, answer.solution_start, answer.solution_end]
    places += [offset + place for step in shown.steps for place in (step.start, step.end)]
    units = _utf16(answer.text, places)
    edges = [units[0], *units[4:]]
    gaps = [right - left for left, right in pairwise(edges)]
    steps = []
    for number, step in enumerate(shown.steps):
        steps += [gaps[2 * number], gaps[2 * number + 1], types.number(step.type)]
    correct = next((record[name] for name in JUDGEMENT_FIELDS if isinstance(record.get(name), bool)), None)
    return [
        shown.trace.source,
        _name(record),
        question_of(record),
        answer.text,
        units[:4],
        int(answer.is_closed),
        answer.defect,
        -1 if correct is None else int(correct),
        steps,
        shown.note,
        side,
    ]


def _utf16(text: str, places: Sequence[int]) -> list[int]:
    """Turn places in code points into places in UTF-16 units."""
    if text.isascii() or max(text, default="") <= "\uffff":
        return list(places)
    units = list(accumulate((1 + (character > "\uffff") for character in text), initial=0))
    return [units[place] for place in places]


def _name(record: Mapping[str, Any]) -> str:
    """What the record calls itself: its id or path, or else its model and number."""
    for name in ("id", "path"):
        if isinstance(record.get(name), str | int):
            return str(record[name])
    return " ".join(str(record[name]) for name in ("model", "dataset", "idx") if isinstance(record.get(name), str | int))
