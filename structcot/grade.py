"""`structcot grade`: records in, the same records out with what was found as their answers and whether it is right.

A record holds the reference in `gold` and an answer in `pred`, or a whole output in `response` or where `structcot.traces` finds one. It
gets `extracted`, `correct`, `verdict` and `reason`. A line that cannot be graded goes through as it is and is reported.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from structcot.errors import ConfigError
from structcot.files import write_lines_whole
from structcot.grading.case import VERDICTS, Case, Grade
from structcot.grading.graders import GRADERS
from structcot.grading.isolated import LIMIT_SECONDS, GraderPool
from structcot.parallel import jobs_of
from structcot.traces import UnusableTrace, line_of, read_lines, read_record, read_trace

RESPONSE_FIELDS = ("response", "completion", "output")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A line as it was read, its record, and the case to be graded; without a case the line goes through as it is."""

    line: bytes
    record: dict[str, Any] = field(default_factory=dict)
    case: Case | None = None


@dataclass(slots=True)
class _Counts:
    """Counts of verdicts, of unusable lines by reason, and of records that held a `correct` of their own: how many, and how many agree."""

    verdicts: Counter[str] = field(default_factory=Counter)
    unusable: Counter[str] = field(default_factory=Counter)
    judged_before: int = 0
    agreeing: int = 0


def grade(source: str, to: str, grader: str = "math", settings: Sequence[str] = ()) -> dict[str, Any]:
    """Grade the records of `source` into `to` ("-" is standard input or output) and return the counts.

    Raises:
        ConfigError: naming the argument, setting or file that is wrong.
    """
    values = dict(_setting(text) for text in settings)
    if grader not in GRADERS:
        raise ConfigError(f'--grader: got "{grader}"; use one of {", ".join(GRADERS)}')
    jobs, limit_seconds = jobs_of(values), _limit_of(values)
    counts = _Counts()
    entries: deque[_Entry] = deque()
    with ExitStack() as stack:
        output = stack.enter_context(write_lines_whole(source, to))
        pool = stack.enter_context(GraderPool(GRADERS[grader], jobs=jobs, limit_seconds=limit_seconds))
        for given in pool.map(_cases(source, entries, counts)):
            output.write(_ungraded(entries))
            output.write(_graded(entries.popleft(), given, counts))
        output.write(_ungraded(entries))
    return {"input": source, "output": to, "grader": grader, **_facts(counts)}


def summary_of(facts: Mapping[str, Any]) -> str:
    """What a person wants to know first, a line each."""
    lines = [f"{facts['graded']:,} records graded by {facts['grader']}"]
    if facts["graded"]:
        lines[0] += f": {100 * facts['accuracy']:.2f} % correct"
    lines += [f"{verdict.replace('_', ' '):10} {count:,}" for verdict, count in facts["verdicts"].items() if count]
    lines += [f"{count:,} left as they are: {reason}" for reason, count in facts["unusable"].items()]
    if facts["judged_before"]:
        lines.append(f"{facts['agreeing']:,} of {facts['judged_before']:,} agree with the `correct` that they held")
    return "\n".join(lines)


def case_of(record: dict[str, Any], source: str, line: bytes) -> Case:
    """What a record gives to a grader.

    Raises:
        UnusableTrace: if it has no reference or no answer, or a field of another type.
    """
    gold, pred = _text(record, "gold"), _text(record, "pred")
    if not gold:
        raise UnusableTrace('no reference answer in the field "gold"')
    response = ""
    if pred is None:
        response = next((record[name] for name in RESPONSE_FIELDS if isinstance(record.get(name), str)), None)
        if response is None and "pred" in record:  # an answer that is null: none was found
            pred = ""
        response = response if response is not None or pred is not None else read_trace(source, line).text
    return Case(
        gold=gold,
        response=response or "",
        pred=pred,
        tolerance=_typed(record, "tolerance", (int, float), None),
        unit=_typed(record, "unit", (str,), ""),
        is_multiple=_typed(record, "is_multiple", (bool,), False),
        benchmark=_typed(record, "benchmark", (str,), ""),
    )


def _cases(source: str, entries: deque[_Entry], counts: _Counts) -> Iterator[Case]:
    """Read cases, and leave each line in `entries` on the way."""
    for place, line in read_lines(source):
        try:
            record = read_record(line)
            case = case_of(record, place, line)
        except UnusableTrace as error:
            counts.unusable[str(error)] += 1
            entries.append(_Entry(line=line))
            continue
        entries.append(_Entry(line=line, record=record, case=case))
        yield case


def _ungraded(entries: deque[_Entry]) -> bytes:
    """The lines up to the next that has a case, as they were read."""
    lines = []
    while entries and entries[0].case is None:
        lines.append(line_of(None, entries.popleft().line))
    return b"".join(lines)


def _graded(entry: _Entry, given: Grade, counts: _Counts) -> bytes:
    counts.verdicts[given.verdict] += 1
    own = entry.record.get("correct")
    if isinstance(own, bool):
        counts.judged_before += 1
        counts.agreeing += own is given.correct
    grades = {"extracted": given.extracted, "correct": given.correct, "verdict": given.verdict, "reason": given.reason}
    return line_of({**entry.record, **grades}, entry.line)


def _facts(counts: _Counts) -> dict[str, Any]:
    graded = counts.verdicts.total()
    return {
        "graded": graded,
        "accuracy": counts.verdicts["correct"] / graded if graded else None,
        "verdicts": {verdict: counts.verdicts[verdict] for verdict in VERDICTS},
        "unusable": dict(counts.unusable),
        "judged_before": counts.judged_before,
        "agreeing": counts.agreeing,
    }


def _text(record: Mapping[str, Any], name: str) -> str | None:
    """A text, or a number as it is written; None where there is none."""
    value = record.get(name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnusableTrace(f'"{name}" is a {type(value).__name__}; give a text or a number')
    return str(value)


def _typed(record: Mapping[str, Any], name: str, types: tuple[type, ...], default: Any) -> Any:
    value = record.get(name)
    if value is None:
        return default
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise UnusableTrace(f'"{name}" is a {type(value).__name__}; give a {" or ".join(one.__name__ for one in types)}')
    return value


def _limit_of(values: Mapping[str, str]) -> float:
    text = values.get("limit", str(LIMIT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f'limit: got "{text}"; use seconds for one record, above 0')
    return seconds


def _setting(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or name.strip() not in ("jobs", "limit"):
        raise ConfigError(f'"{text}": is no setting; use jobs=N or limit=SECONDS')
    return name.strip(), value.strip()


if __name__ == "__main__":
    from structcot.cli import run_command

    run_command("grade")
