r"""The words of formulas: numbers, commands, letters and marks, with `sqrt`, `sin` or `pi` read as commands where no backslash says so."""

from __future__ import annotations

import re
from fractions import Fraction

from structcot.grading.answer_text import FUNCTIONS, GREEK
from structcot.grading.numbers import MAX_DIGITS

_TOKEN = re.compile(
    r"""(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:\\overline\{\d+\})?(?:[eE][+-]?\d+(?![\d.]))?)
    |(?P<command>\\[A-Za-z]+|\\[|{}])|(?P<word>[A-Za-z]+)|(?P<mark>'+|\*\*|[-+*/^_!(){}\[\]|])|(?P<other>\S)""",
    re.VERBOSE,
)
_WORDS = {name: f"\\{name}" for name in (*FUNCTIONS, *GREEK, "sqrt", "infty") if len(name) > 2 or name in ("ln", "lg", "pi")}
_WORDS |= {"arctg": "\\arctan", "tg": "\\tan", "ctg": "\\cot", "infinity": "\\infty", "asin": "\\arcsin", "acos": "\\arccos"}
_WORD_PART = re.compile("|".join(sorted(map(re.escape, _WORDS), key=len, reverse=True)) + "|[A-Za-z]")


class NotAFormula(ValueError):
    """Why a text cannot be read as a formula."""


def number_of(text: str) -> Fraction:
    """The exact value of a number as it is written, with exponent or a repeating end. Raises NotAFormula where it is out of reach."""
    head, _, exponent = text.lower().partition("e") if "\\" not in text else (text, "", "")
    if len(exponent) > 5 or len(head) > MAX_DIGITS:
        raise NotAFormula("a number out of reach")
    digits, _, repeating = head.partition("\\overline{")
    if not repeating:
        return Fraction(digits.rstrip(".") or "0") * Fraction(10) ** int(exponent or 0)
    period = repeating.rstrip("}")
    decimals = len(digits.partition(".")[2])
    return Fraction(digits.rstrip(".") or "0") + Fraction(int(period), (10 ** len(period) - 1) * 10**decimals)


def tokens_of(text: str) -> list[str]:
    """Cut a tidied text into tokens, and rows of letters into the names in them and single letters. Raises NotAFormula for other signs."""
    tokens: list[str] = []
    for match in _TOKEN.finditer(text):
        if match["other"]:
            raise NotAFormula(f'"{match["other"]}" is no part of a formula')
        if match["word"]:
            tokens += [_WORDS.get(part[0], part[0]) for part in _WORD_PART.finditer(match["word"])]
        else:
            tokens.append(match[0])
    return tokens
