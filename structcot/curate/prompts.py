"""The first stage: rows of all sources become problems that can be asked and checked.

A problem is kept once, whichever of its wordings comes first: exact duplicates, by their words, fall here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from structcot.config import DataSource
from structcot.curate.config import SourceConfig
from structcot.curate.normal import words_of
from structcot.curate.stages import Record, StageFiles
from structcot.data.rows import Rejected, Row, read_rows
from structcot.eval.problem import Problem, ProgramTest
from structcot.eval.rows import BadRow, read_problem

# A longer reference "answer" is a worked solution whose answer could not be told.
LONGEST_ANSWER = 300
MISSING = object()


def collect(sources: Sequence[SourceConfig], files: StageFiles) -> None:
    """Read the problems of all sources in their order.

    Raises:
        ConfigError, DataError, FetchError: if a source cannot be read.
    """
    first: dict[bytes, str] = {}
    for source in sources:
        num_kept = 0
        for row in _rows_of(source):
            files.num_read += 1
            record = _record_of(row, source, files)
            if record is None:
                continue
            digest = hashlib.blake2b(" ".join(words_of(record["question"])).encode(), digest_size=16).digest()
            if first.setdefault(digest, record["id"]) != record["id"]:
                files.reject(record, "the same problem was there before", first[digest])
                continue
            files.keep(record)
            num_kept += 1
            if num_kept == source.limit:
                break


def problem_of(record: Mapping[str, Any]) -> Problem:
    """The problem of a record of any stage, as engines and graders take it."""
    values = {field.name: record[field.name] for field in fields(Problem)}
    return Problem(**{**values, "tests": tuple(ProgramTest(**test) for test in record["tests"])})


def _rows_of(source: SourceConfig) -> Iterator[Row | Rejected]:
    return read_rows(DataSource(path=source.path, split=source.split), key=f"sources.{source.name}.path", fields=())


def _record_of(row: Row | Rejected, source: SourceConfig, files: StageFiles) -> Record | None:
    """The problem of a row as a record; None of one that falls."""
    place = {"source": source.name, "origin": row.source}
    if isinstance(row, Rejected):
        files.reject(place, "the row cannot be read", row.reason)
        return None
    if isinstance(row.value, Mapping) and (other := _left_out(row.value, source)):
        files.reject(place, "another value than where= asks for", other)
        return None
    try:
        problem = read_problem(row.value, 0, source.question, source.answer)
    except BadRow as error:
        files.reject(place, "the row has no question, or nothing to check an answer with", str(error))
        return None
    if len(problem.gold) > LONGEST_ANSWER:
        files.reject(place, "the reference answer cannot be told from the reference solution", problem.gold[:LONGEST_ANSWER])
        return None
    label, says = (_difficulty(row.value, source), source.difficulty)
    if source.difficulty_field and says and not (label is not None and says[0] <= label <= says[1]):
        files.reject({**place, "question": problem.question}, "the difficulty is not asked for", str(label))
        return None
    digest = hashlib.sha256(f"{problem.question}\n{problem.gold}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return {**asdict(problem), "id": f"{source.name}-{digest}", **place, "difficulty": label}


def _left_out(row: Mapping[str, Any], source: SourceConfig) -> str:
    """The field for which a row is left out, with its value; "" if it is not."""
    for name, wanted in source.where.items():
        value = row.get(name, MISSING)
        if value is MISSING or value not in wanted:
            return f"{name}: {'is missing' if value is MISSING else value}"
    return ""


def _difficulty(row: Any, source: SourceConfig) -> float | None:
    value = row.get(source.difficulty_field) if source.difficulty_field else None
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
