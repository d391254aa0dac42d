"""Rows of benchmark files become problems. One reader serves them all: it knows the names that benchmarks give to the same things."""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from structcot.answers import box_spans
from structcot.eval.problem import Problem, ProgramTest
from structcot.traces import GOLD_FIELDS, PROBLEM_FIELDS

# A worked solution that ends in a box stands in for an answer.
ANSWER_FIELDS = (*GOLD_FIELDS, "solution")
GROUP_FIELDS = ("difficulty", "level", "subfield", "subject")
ID_FIELDS = ("unique_id", "question_id", "id", "idx")
# GSM8K writes its answers after this sign, below the reasoning that leads there.
GSM8K_ANSWER = "####"
MAX_TESTS_BYTES = 1 << 30
_FUNCTION = re.compile(r"\bdef\s+(\w+)\s*\(\s*self\b|\bdef\s+(\w+)\s*\(")


class BadRow(ValueError):
    """Why a row is no problem that can be asked and judged."""


def read_problem(row: Any, number: int, question_field: str = "", answer_field: str = "") -> Problem:
    """Read one row; `number` makes the id of a row without one. The two fields are found by themselves where they are not named.

    Raises:
        BadRow: saying what is missing.
    """
    if not isinstance(row, Mapping):
        raise BadRow("is no JSON object")
    question = _text(row, (question_field,) if question_field else PROBLEM_FIELDS)
    if not question.strip():
        raise BadRow(f"has no question: found {', '.join(map(str, row))}; name its field with question=")
    context = row.get("context")
    found = next((row[name] for name in ID_FIELDS if isinstance(row.get(name), str | int)), number)
    problem = Problem(
        id=str(found), question=f"{context}\n{question}" if isinstance(context, str) and context else question, group=_group(row)
    )
    pairs = _paired(row)
    tests = _tests(row, pairs)
    if tests:
        starter_code = row.get("starter_code") or ""
        return replace(problem, tests=tests, starter_code=starter_code, entry_point=_entry_point(row, pairs, starter_code))
    gold = _gold(row, (answer_field,) if answer_field else ANSWER_FIELDS)
    if not gold:
        raise BadRow(f"has neither an answer nor tests: found {', '.join(map(str, row))}; name the field of the answer with answer=")
    return replace(
        problem,
        gold=gold,
        tolerance=_tolerance(row),
        unit=str(row.get("unit") or ""),
        is_multiple=bool(row.get("is_multiple_answer") or row.get("is_multiple")),
    )


def _text(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((row[name] for name in names if isinstance(row.get(name), str) and row[name].strip()), "")


def _group(row: Mapping[str, Any]) -> str:
    name = next((name for name in GROUP_FIELDS if isinstance(row.get(name), str | int)), "")
    return f"level {row[name]}" if name == "level" else str(row.get(name, ""))


def _gold(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The reference answer as text: of a list its entries, of a float its shortest form, of a worked solution what it ends in."""
    for name in names:
        value = row.get(name)
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or isinstance(value, bool | dict) or not str(value).strip():
            continue
        text = str(value)
        if GSM8K_ANSWER in text:
            return text.rpartition(GSM8K_ANSWER)[2].strip()
        boxes = box_spans(text) if name in ("solution", "answer") else []
        return text[slice(*boxes[-1])].strip() if boxes else text.strip()
    return ""


def _tolerance(row: Mapping[str, Any]) -> float | None:
    value = row.get("error", row.get("tolerance"))
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise BadRow(f'has the tolerance {value!r}, which is no number; mend the field "error"') from error


def _tests(row: Mapping[str, Any], pairs: Mapping[str, Any]) -> tuple[ProgramTest, ...]:
    """The tests of a program: `tests`, the public and the hidden ones of LiveCodeBench, or the `input_output` of APPS and TACO."""
    listed = [*_listed(row.get("tests")), *_listed(row.get("public_test_cases")), *_listed(row.get("private_test_cases"))]
    listed += _tests_beside(pairs)
    try:
        return tuple(ProgramTest(input=str(test["input"]), output=str(test["output"])) for test in listed)
    except (KeyError, TypeError) as error:
        raise BadRow("has a test without input or output; give {input, output} objects") from error


def _listed(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    if isinstance(value, str):
        value = _decoded(value)
    if not isinstance(value, list):
        raise BadRow(f"has tests that are no list but {type(value).__name__}; give {{input, output}} objects")
    return value


def _paired(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """What APPS and TACO have as tests: lists of inputs and outputs side by side, and the function that is called, if one is; else {}."""
    value = row.get("input_output")
    try:
        pairs = json.loads(value or "{}") if isinstance(value, str | None) else value
    except ValueError as error:
        raise BadRow(f"has an input_output that is no JSON: {error}; fetch the file again") from error
    if not pairs:
        return {}
    found = [pairs.get(name) for name in ("inputs", "outputs")] if isinstance(pairs, Mapping) else []
    lengths = [len(one) for one in found if isinstance(one, list)]
    if len(lengths) != 2 or lengths[0] != lengths[1]:
        raise BadRow('has an input_output without "inputs" and "outputs" of the same length; fetch the file again')
    return pairs


def _tests_beside(pairs: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Text in and out for programs that read, arguments and result as JSON for functions that are called.

    Some of these files write a result as a list with nothing else in it, others as it is, and none says which: with or without the list
    it is right, as for the graders that came with them.
    """
    for given, result in zip(pairs.get("inputs", ()), pairs.get("outputs", ()), strict=True):
        if pairs.get("fn_name"):
            right = [result, *result] if isinstance(result, list) and len(result) == 1 else [result]
            yield {
                "input": "\n".join(map(json.dumps, given if isinstance(given, list) else [given])),
                "output": "\n".join(map(json.dumps, right)),
            }
        else:
            yield {"input": _lines(given), "output": _lines(result)}


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _decoded(text: str) -> Any:
    """JSON, or JSON pickled as one string, compressed, in base64, as LiveCodeBench ships its hidden tests."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        unpacked = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), MAX_TESTS_BYTES)
        return json.loads(_PlainUnpickler(io.BytesIO(unpacked)).load())
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, IndexError, TypeError, ValueError) as error:
        raise BadRow(f"has tests that cannot be decoded: {error}; fetch the file again") from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads text and numbers. Whatever would import a name, and so could run code, is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which could run code")


def _entry_point(row: Mapping[str, Any], pairs: Mapping[str, Any], starter_code: str) -> str:
    """The function that the tests call: named by the row or its metadata, else the one that the starter code defines."""
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        metadata = _decoded(metadata or "{}")
    inside = metadata.get("func_name") if isinstance(metadata, dict) else ""
    named = row.get("fn_name") or row.get("entry_point") or inside or pairs.get("fn_name")
    if named:
        return str(named)
    found = _FUNCTION.search(starter_code)
    return (found[1] or found[2]) if found else ""
