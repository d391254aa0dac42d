"""Chains of thought in files: a JSON object a line, the answer wherever its format keeps it.

The answer is the last assistant turn of `messages` or `conversations`, else the completion, or the first text field of those in `FIELDS`.
A line is read and written as bytes, so one that is not changed comes out as it went in; one that cannot be read goes with the reason.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structcot.errors import ConfigError
from structcot.tags import THOUGHT_TAGS

FIELDS = ("response", "output", "completion", "solution")
# What `structcot segment` adds: it describes the thought as it was, and of a changed one it would be false.
DERIVED_FIELDS = ("steps", "metrics")
# What data sets call the problem, its reference answer, and a judgement of the answer made elsewhere.
PROBLEM_FIELDS = ("problem", "question", "question_content", "prompt", "instruction", "input", "query")
GOLD_FIELDS = ("gold", "gt_answer", "answer", "final_answer", "target")
JUDGEMENT_FIELDS = ("correct", "is_correct", "score", "correctness")
_TURNS = (("messages", "role", "content"), ("conversations", "from", "value"), ("prompt", "role", "content"))
SHOWN_FIELDS = 12
Place = tuple[str | int, ...]


class UnusableTrace(ValueError):
    """Why a line holds no answer; becomes a line of the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One record with an answer: `text` lies in `record` at `place`; `source` is "path:line"."""

    source: str
    record: dict[str, Any]
    place: Place
    text: str

    @property
    def identity(self) -> str:
        """The record's own `id`, or else all that it holds beside the answer and what is derived from it: the same after a perturbation."""
        own = self.record.get("id")
        if isinstance(own, str | int):
            return str(own)
        rest = _with(self.record, self.place, "")
        return json.dumps({name: value for name, value in rest.items() if name not in DERIVED_FIELDS}, sort_keys=True)

    def with_text(self, text: str) -> dict[str, Any]:
        """The record with another answer; nothing else changes, and this one stays as it is."""
        return _with(self.record, self.place, text)


def read_lines(path: str, name: str = "") -> Iterator[tuple[str, bytes]]:
    """Stream the lines of a file, or of standard input for "-", with their places "name:line"; the name is the path if none is given.

    Raises:
        ConfigError: if the file cannot be opened, or is a JSON array. Raised by the first line.
    """
    name = name or path
    if path == "-":
        yield from ((f"{name}:{number}", line) for number, line in enumerate(sys.stdin.buffer, 1))
        return
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and path.endswith(".json") and line.lstrip().startswith(b"["):
                    raise ConfigError(f"{path}: is one JSON array; write an object a line, for instance by jq -c '.[]' {path}")
                yield f"{name}:{number}", line
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give a file of JSON lines, or - for standard input") from error


def read_record(line: bytes) -> dict[str, Any]:
    """Read one line as a JSON object.

    Raises:
        UnusableTrace: if it is none.
    """
    if not line.strip():
        raise UnusableTrace("a blank line")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UnusableTrace(f"not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8, a number of thousands of digits, brackets thousands deep
        raise UnusableTrace(f"not JSON that can be read: {type(error).__name__}") from error
    if not isinstance(record, dict):
        raise UnusableTrace("not a JSON object")
    return record


def read_trace(source: str, line: bytes, field: str = "") -> Trace:
    """Read one line; `field` names the field of the answer where the format is none of the known.

    Raises:
        UnusableTrace: if it is no JSON object, or holds no answer.
    """
    record = read_record(line)
    place = (field,) if field else _find(record)
    text: Any = record
    for key in place:
        text = text.get(key) if isinstance(text, dict) else text[key]
    if not isinstance(text, str):
        raise UnusableTrace(f'no text in the field "{field}"')
    if not text:
        raise UnusableTrace("the answer is empty")
    return Trace(source=source, record=record, place=place, text=text)


def question_of(record: Mapping[str, Any]) -> str:
    """The last turn of the user, or the first field that is called like a problem, in the record or in an object `problem`; else ""."""
    for turns, role, content in _TURNS:
        listed = record.get(turns)
        for turn in reversed(listed) if isinstance(listed, list) else ():
            if isinstance(turn, dict) and turn.get(role) in ("user", "human") and isinstance(turn.get(content), str):
                return turn[content]
    inside = record.get("problem")
    for holder in (inside, record) if isinstance(inside, dict) else (record,):
        for name in PROBLEM_FIELDS:
            value = holder.get(name)
            if isinstance(value, str) and value.strip():
                return value
    return ""


def line_of(record: dict[str, Any] | None, line: bytes) -> bytes:
    """A record as a line of JSON; without one, the line as it was read."""
    if record is None:
        return line if line.endswith(b"\n") else line + b"\n"
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can write
        return json.dumps(record).encode() + b"\n"


def _find(record: dict[str, Any]) -> Place:
    for turns, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        if isinstance(record.get(turns), list):
            return (turns, _last_answer(record[turns], turns, role, content), content)
    if isinstance(record.get("completion"), list):
        return ("completion", _last_answer(record["completion"], "completion", "role", "content"), "content")
    texts = [field for field in FIELDS if isinstance(record.get(field), str)]
    tagged = [field for field in texts if any(tag in record[field] for pair in THOUGHT_TAGS for tag in pair)]
    if not texts:
        raise UnusableTrace(f"no answer: found {_names(record)}; name its field")
    return ((tagged or texts)[0],)


def _names(record: dict[str, Any]) -> str:
    """The first fields of a record, as a message can hold them."""
    return ", ".join(name.encode("ascii", "backslashreplace").decode() for name in list(record)[:SHOWN_FIELDS]) or "no fields"


def _last_answer(turns: list[Any], name: str, role: str, content: str) -> int:
    for number in reversed(range(len(turns))):
        turn = turns[number]
        if isinstance(turn, dict) and turn.get(role) in ("assistant", "gpt") and isinstance(turn.get(content), str):
            return number
    raise UnusableTrace(f'no assistant turn with text in "{name}"')


def _with(record: dict[str, Any], place: Place, text: str) -> dict[str, Any]:
    """Copy `record` along `place` and put `text` there."""
    copy: dict[str, Any] = dict(record)
    inside: Any = copy
    for key in place[:-1]:
        inside[key] = inside[key].copy()
        inside = inside[key]
    inside[place[-1]] = text
    return copy
