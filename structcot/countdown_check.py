"""Proof that a Countdown demonstration is right, from its text alone.

Nothing here is shared with the search that wrote the record: the answer and every equation are parsed and computed anew, in fractions.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from structcot.countdown_words import BEGIN_SOLUTION, END_SOLUTION, TAGS
from structcot.errors import DataError

# An equation is an expression that starts with a digit or "(", and the whole number after its equals sign.
EQUATION = re.compile(r"([0-9(][0-9()+*/ -]*?) = ([0-9]+)")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
INTEGER = re.compile(r"[0-9]+")


def verify(record: dict[str, Any]) -> None:
    """Check a record's form, its tags, every equation in it, and its answer.

    Raises:
        DataError: naming the record and what is wrong with it.
    """
    where = f"countdown record {record.get('id', 'without id')}"
    question, reply = _turns(record, where)
    numbers, target, answer = record.get("numbers"), record.get("target"), record.get("answer")
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers) or type(target) is not int or not isinstance(answer, str):
        got = f"{numbers!r}, {target!r} and {answer!r}"
        raise DataError(f"{where}: numbers must be whole, target whole and answer a text, got {got}; write it anew")
    asked = sorted(map(int, INTEGER.findall(question)))
    if asked != sorted([*numbers, target]):
        raise DataError(f"{where}: the question speaks of {asked}, the fields of {numbers} and {target}; write it anew")
    solution = _solution(reply, where)
    if BOXED.findall(solution) != [answer]:
        raise DataError(f"{where}: the solution boxes {BOXED.findall(solution)}, the answer is {answer!r}; box it exactly once")
    for left, right in EQUATION.findall(reply):
        if evaluate(left)[0] != int(right):
            raise DataError(f"{where}: states {left} = {right}, which is false; write it anew")
    _check_answer(answer, numbers, target, where)


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """Return the exact value of an expression of whole numbers, + - * / and parentheses, and the numbers it uses, in order.

    Raises:
        DataError: if it is anything else, or divides by zero.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        numbers: list[int] = []
        return _value(tree.body, numbers), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise DataError(f"{expression!r} is no arithmetic expression: {error}; use whole numbers, + - * / and parentheses") from error


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            numbers.append(number)
            return Fraction(number)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left, numbers) + _value(right, numbers)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left, numbers) - _value(right, numbers)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left, numbers) * _value(right, numbers)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _value(left, numbers) / _value(right, numbers)
        case _:
            raise ValueError(f"found {type(node).__name__}")


def _turns(record: dict[str, Any], where: str) -> tuple[str, str]:
    match record:
        case {
            "system": str(),
            "conversations": [{"from": "user", "value": str(question)}, {"from": "assistant", "value": str(reply)}],
        }:
            return question, reply
        case _:
            raise DataError(f"{where}: needs a system prompt and one user and one assistant turn; write it anew")


def _solution(reply: str, where: str) -> str:
    places = [reply.find(tag) for tag in TAGS]
    if any(reply.count(tag) != 1 for tag in TAGS) or places != sorted(places):
        raise DataError(f"{where}: needs the tags {' '.join(TAGS)} once each and in this order; write it anew")
    return reply[places[2] + len(BEGIN_SOLUTION) : reply.index(END_SOLUTION)]


def _check_answer(answer: str, numbers: Sequence[int], target: int, where: str) -> None:
    value, used = evaluate(answer)
    if value != target:
        raise DataError(f"{where}: the answer {answer} is {value}, not the target {target}; write it anew")
    if sorted(used) != sorted(numbers):
        raise DataError(f"{where}: the answer {answer} uses {sorted(used)}, should use each of {sorted(numbers)} once; write it anew")
