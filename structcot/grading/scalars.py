r"""Whether two expressions have one value: as written numbers, then as formulas, and as the package math-verify reads them at last."""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from typing import Any

from mpmath import mp, mpc

from structcot.grading.answer_text import bare, plain
from structcot.grading.formula import Node, read_formula
from structcot.grading.formula_tokens import NotAFormula
from structcot.grading.formula_value import NoValue, constant_of, ratio_of, same_value
from structcot.grading.numbers import DECIMAL_DIGITS, DOUBLE_DIGITS, ROUNDED_DIGITS, Literal, based, read_literal
from structcot.grading.units import Measured, factor, split_unit

# Longer expressions, and those whose exponents or factorials could run for hours, are never given to math-verify.
MAX_LENGTH = 400
_RELATION = re.compile(r"[=<>,;:]|\\(?:le|ge|ne|in|approx|equiv|sim|to|pm|cup|cap|ldots)(?![a-z])")
_TOWER = re.compile(r"\^\s*\{?[^{}]*\^|\d{4,}\s*!|!\s*!|\d[eE][-+]?\d{4,}|\^\s*\{?\s*-?\d{4,}")


def same_scalar(gold: str, pred: str, tolerance: float | None, unit: str) -> str:
    """Compare two expressions, each with a unit or without."""
    ours, theirs = split_unit(gold, unit), split_unit(pred, unit)
    if not ours.body or not theirs.body:
        return ""
    if (first := based(ours.body)) and (second := based(theirs.body)):
        return "the same digits in the same base" if first == second else ""
    scale = factor(theirs.unit, ours.unit or unit)
    if scale is None:
        return ""
    if ours.is_percent == theirs.is_percent:
        return _same_measured(ours.body, theirs.body, scale, tolerance)
    return _same_measured(ours.body, theirs.body, Fraction(1), tolerance) or _same_percent(ours, theirs, tolerance)


def multiple_of(one: str, other: str) -> int:
    """The sign of the constant by which one expression is a multiple of the other, 0 where it is none."""
    try:
        return ratio_of(read_formula(one), read_formula(other))
    except (NotAFormula, NoValue):
        return 0


def _same_percent(ours: Measured, theirs: Measured, tolerance: float | None) -> str:
    """60 % is 0.6: a percent sign on one side alone is worth a hundredth."""
    scale = Fraction(1, 100) if theirs.is_percent else Fraction(100)
    return _same_measured(ours.body, theirs.body, scale, tolerance) and "equal, by the percent sign"


def _same_measured(gold: str, pred: str, scale: Fraction, tolerance: float | None) -> str:
    """Compare two bodies, the second times `scale`."""
    if scale == 1 and bare(gold) == bare(pred):
        return "the same text"
    ours, theirs = read_literal(gold), read_literal(pred)
    if ours and theirs and not tolerance:
        return _same_literals(ours, _scaled(theirs, scale))
    if _is_words(gold) or _is_words(pred):
        return ""
    first, second = _based_or_formula(gold), _based_or_formula(pred)
    if isinstance(first, str) or isinstance(second, str):
        return _by_package(gold, pred) if scale == 1 and not tolerance else ""
    if scale != 1:
        second = Node("*", (second, Node("number", value=scale)))
    try:
        if tolerance is not None and _within(first, second, tolerance):
            return f"within {tolerance:g}"
        if same_value(first, second):
            return "equal values"
        return _rounded(ours, theirs, first, second)
    except NoValue:
        return ""


def _scaled(literal: Literal, scale: Fraction) -> Literal:
    if scale == 1:
        return literal
    return Literal(value=literal.value * scale)


def _same_literals(gold: Literal, pred: Literal) -> str:
    if gold.value == pred.value:
        return "equal numbers"
    if gold.is_decimal and pred.is_decimal and min(gold.digits, pred.digits) >= DOUBLE_DIGITS:
        is_close = abs(gold.value - pred.value) <= abs(gold.value) / 10**DOUBLE_DIGITS
        return "equal to the digits of a double" if is_close else ""
    is_finer = not pred.is_decimal or pred.places > gold.places
    if is_finer and pred.value.denominator != 1 and gold.is_rounded(ROUNDED_DIGITS) and gold.rounds(pred.value):
        return f"equal, rounded to the {gold.digits} digits of the reference"
    if not gold.is_decimal and gold.value.denominator != 1 and pred.is_rounded(DECIMAL_DIGITS) and pred.rounds(gold.value):
        return f"equal, rounded to {pred.digits} digits"
    return ""


def _rounded(gold: Literal | None, pred: Literal | None, first: Node, second: Node) -> str:
    """Compare a decimal with an exact value that is no written number, such as 1.41421 with the root of 2."""
    decimal, other, needed = (gold, second, ROUNDED_DIGITS) if gold else (pred, first, DECIMAL_DIGITS)
    if decimal is None or (gold and pred) or not decimal.is_rounded(needed):
        return ""
    value = constant_of(other)
    if isinstance(value, mpc):
        return ""
    exact = value if isinstance(value, Fraction) else _fraction(value)
    if exact.denominator != 1 and decimal.rounds(exact):
        return f"equal, rounded to {decimal.digits} digits"
    return ""


def _fraction(value: Any) -> Fraction:
    """A real number of mpmath as a fraction, to the digits that it has."""
    if not mp.isfinite(value):
        raise NoValue("infinite")
    return Fraction(str(value)) if abs(value) < 10**50 else Fraction(int(value))


def _within(first: Node, second: Node, tolerance: float) -> bool:
    one, other = constant_of(first), constant_of(second)
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return abs(one - other) <= Fraction(str(tolerance))  # the bound is decimal, and itself allowed
    return bool(abs(_number(one) - _number(other)) <= tolerance)


def _number(value: Any) -> Any:
    """A number of mpmath."""
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _is_words(text: str) -> bool:
    """Whether an expression is words, which have no value, and not letters that stand for numbers."""
    letters = plain(text)
    is_row = re.fullmatch(r"[^\W\d_]{3,}|[^\W\d_]{2,}(?:\s+[^\W\d_]+)+", letters)
    return letters.casefold() == "no" or bool(is_row and re.search(r"[aeiou]|[^\x00-\x7f]", letters, re.IGNORECASE))


def _based_or_formula(text: str) -> Node | str:
    """A formula, or why it is none. Of a number with its base alone, the digits."""
    number = based(text)
    try:
        return read_formula(number[0] if number and number[0].isdigit() else text)
    except NotAFormula as error:
        return str(error)


def _by_package(gold: str, pred: str) -> str:
    """Ask math-verify, where it can be asked safely."""
    if max(len(gold), len(pred)) > MAX_LENGTH or any(_TOWER.search(text) for text in (gold, pred)):
        return ""
    if any(_RELATION.search(text) or not re.search(r"\\|\d", text) for text in (gold, pred)):
        return ""
    return "equal by math-verify" if _verified(gold, pred) else ""


def _verified(gold: str, pred: str) -> bool:
    """What math-verify says of two expressions, without its own time limits, which are signals."""
    from math_verify import LatexExtractionConfig, parse, verify  # takes a second, and few answers need it

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no limit of time
    texts = [re.sub(r"(?<=\})\s*(?=\\begin)", r" \\cdot ", text) for text in (gold, pred)]
    parsed = [parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=0) for text in texts]
    return all(parsed) and bool(verify(*parsed, strict=True, float_rounding=30, numeric_precision=40, timeout_seconds=0))
