"""What a study is made of: OUTPUT/data with the demonstrations that are trained on, those held out, and the problems made of some."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from structcot.answers import answer_of
from structcot.errors import ConfigError, DataError
from structcot.files import replacing
from structcot.study.config import StudyConfig
from structcot.tags import read_answer
from structcot.traces import GOLD_FIELDS, UnusableTrace, question_of, read_lines, read_record, read_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the files of a study's data lie."""

    directory: Path

    @property
    def demonstrations(self) -> Path:
        """The demonstrations that are trained on, as they came."""
        return self.directory / "demonstrations.jsonl"

    @property
    def held_out(self) -> Path:
        """Those that no cell is trained on, for losses."""
        return self.directory / "held_out.jsonl"

    @property
    def problems(self) -> Path:
        """Those that no cell is trained on, as questions with reference answers."""
        return self.directory / "problems.jsonl"

    @property
    def base(self) -> Path:
        """What the base is trained on."""
        return self.directory / "base.jsonl"

    def of_variant(self, label: str) -> Path:
        """The demonstrations of a variant with a file of its own."""
        return self.directory / "variants" / f"{label}.jsonl"

    def held_out_of_variant(self, label: str) -> Path:
        """Those of them that answer the questions of the held-out ones."""
        return self.directory / "variants" / f"{label}.held_out.jsonl"


def places_of(config: StudyConfig) -> Places:
    """Where the files of this study's data lie."""
    return Places(directory=Path(config.output_dir) / "data")


def write_sources(config: StudyConfig) -> None:
    """Write OUTPUT/data; what is there already, byte for byte, stays untouched.

    Of what is trained on, no question is asked by a problem or answered by a held-out demonstration: such records are left out. A file of a
    variant's own keeps the records that answer what the demonstrations answer.

    Raises:
        ConfigError: if a file cannot be read, or too few demonstrations are left.
        DataError: if a problem has no question or no reference answer.
    """
    places, data = places_of(config), config.data
    lines = list(islice(_lines(data.train), data.limit or None))
    end = len(lines) - data.held_out
    start = end - data.problems
    if start < 1:
        raise ConfigError(
            f"data: {data.train} has {len(lines)} records to use, of which held_out = {data.held_out} and problems = {data.problems}"
            " leave none to train on; lower them, or give more demonstrations"
        )
    problems, held_out = lines[start:end], lines[end:]
    kept_apart = {_question(line) for _, line in (*problems, *held_out)} - {""}
    demonstrations = [line for _, line in lines[:start] if _question(line) not in kept_apart]
    if not demonstrations:
        raise ConfigError(f"data: {data.train}: every record asks what a problem or a held-out demonstration asks; give more of others")
    _write(places.demonstrations, demonstrations)
    if held_out:
        _write(places.held_out, (line for _, line in held_out))
    if problems:
        _write(places.problems, (_problem(source, line) for source, line in problems))
    if config.base is not None:
        _write(places.base, (line for _, line in _lines(config.base.train) if _question(line) not in kept_apart))
    asked, apart = {_question(line) for line in demonstrations}, {_question(line) for _, line in held_out}
    for variant in config.variants:
        if variant.train:
            own = [line for _, line in _lines(variant.train)]
            same = [line for line in own if _question(line) in asked]
            if not same:
                raise ConfigError(f"variants.{variant.label}.train: {variant.train} has no answer to a question of {data.train}")
            _write(places.of_variant(variant.label), same)
            _write(places.held_out_of_variant(variant.label), (line for line in own if _question(line) in apart))


def system_prompt_of(path: Path) -> str:
    """The system message that all problems of a file share, else ""."""
    systems = {json.loads(line)["system"] for line in path.read_text(encoding="utf-8").splitlines()}
    return systems.pop() if len(systems) == 1 else ""


def count_lines(path: Path) -> int:
    """How many records a file of JSON lines has."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _lines(path: str) -> Iterator[tuple[str, bytes]]:
    """The lines of a file that are not blank, each with an end, and their places."""
    yield from ((source, line.rstrip(b"\r\n") + b"\n") for source, line in read_lines(path) if line.strip())


def _question(line: bytes) -> str:
    """What a record asks; "" of a line that cannot be read, of which `structcot train` says why."""
    try:
        return question_of(read_record(line)).strip()
    except UnusableTrace:
        return ""


def _problem(source: str, line: bytes) -> bytes:
    """A demonstration as a problem: its question, system message and reference answer, a field or else what its solution ends in."""
    try:
        trace = read_trace(source, line)
    except UnusableTrace as error:
        raise DataError(f"{source}: cannot become a problem: {error}; mend it, or lower data.problems") from error
    golds = (trace.record.get(name) for name in GOLD_FIELDS)
    gold = next((str(value) for value in golds if isinstance(value, str | int | float) and str(value).strip()), "")
    question, answer = question_of(trace.record), gold or answer_of(read_answer(trace.text))
    if not (question and answer):
        missing = "no question" if not question else f"no reference answer: none of {', '.join(GOLD_FIELDS)}, and no box in its solution"
        raise DataError(f"{source}: cannot become a problem: it has {missing}; mend it, or lower data.problems")
    # The number of the line is an id that no two of them share.
    problem = {"id": source.rpartition(":")[2], "question": question, "answer": answer, "system": _system(trace.record)}
    return json.dumps(problem, ensure_ascii=False).encode() + b"\n"


def _system(record: Mapping[str, Any]) -> str:
    if isinstance(record.get("system"), str):
        return record["system"]
    for turns, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        listed = record.get(turns)
        if isinstance(listed, list) and listed and isinstance(listed[0], dict) and listed[0].get(role) == "system":
            return str(listed[0].get(content, ""))
    return ""


def _write(path: Path, lines: Iterable[bytes]) -> None:
    """Write a file that holds something; what holds just that already stays untouched."""
    content = b"".join(lines)
    if not content:
        path.unlink(missing_ok=True)
        return
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        file.write(content)
