r"""Numbers as they are written: exact values of integers, decimals, fractions and powers of ten, with the digits that were given.

How many digits were written matters: 3.1416 is a rounded number and says so, 3 is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# A rounded answer is right if it is given to this many digits: a reference that was rounded itself, and a decimal for an exact reference.
ROUNDED_DIGITS, DECIMAL_DIGITS = 4, 5
# Two decimals with more digits than a double holds are compared to as many.
DOUBLE_DIGITS = 14
# Python converts no longer number from text; those are compared as texts.
MAX_DIGITS = 4_000

_PLAIN = r"(?P<sign>[-+]?)\s*(?P<digits>\d+(?:\.\d*)?|\.\d+)"
_LITERAL = re.compile(
    _PLAIN + r"(?:[eE](?P<e>[-+]?\d{1,6})|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*\{?\s*(?P<ten>[-+]?\d{1,6})\s*\}?)?"
)
_FRACTION = re.compile(r"([-+]?)\s*(?:(\d+)\s*/\s*(\d+)|\\frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|\\frac\s*(\d)\s*(\d))")
_MIXED = re.compile(r"([-+]?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)")
_BASED = re.compile(r"([0-9A-Fa-f]+)\s*_\s*\{?\s*(?:\\text\{\s*)?(\d+|two|three|four|five|six|seven|eight|nine|ten)\s*\}*")
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\d{3})+)(?!\d|,\d)")
_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)")
_COMMA = re.compile(r"([-+]?\d+),(\d+)")
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Literal:
    """A written number: its exact value; for a decimal, the place of its last digit (10^-places) and how many digits count."""

    value: Fraction
    is_decimal: bool = False
    places: int = 0
    digits: int = 0

    def is_rounded(self, digits: int) -> bool:
        """Whether it is a decimal with a fractional part, given to so many digits at least."""
        return self.is_decimal and self.places > 0 and self.digits >= digits

    def rounds(self, exact: Fraction) -> bool:
        """Whether `exact`, rounded to the last digit of this number, gives it."""
        return abs(exact - self.value) * 2 <= Fraction(10) ** -self.places


def read_literal(text: str) -> Literal | None:
    """Read a text that is one number and nothing else."""
    text = text.strip()
    if match := _LITERAL.fullmatch(text):
        exponent = int(match["e"] or match["ten"] or 0)
        if abs(exponent) > MAX_DIGITS or len(match["digits"]) > MAX_DIGITS:
            return None
        digits = match["digits"]
        value = Fraction(digits.rstrip(".") or "0") * Fraction(10) ** exponent * (-1 if match["sign"] == "-" else 1)
        places = len(digits.partition(".")[2])
        has_point = places > 0 or bool(match["e"] or match["ten"])
        return Literal(value=value, is_decimal=has_point, places=places - exponent, digits=len(digits.replace(".", "").lstrip("0")))
    if match := _FRACTION.fullmatch(text):
        above, below = next((a, b) for a, b in ((match[2], match[3]), (match[4], match[5]), (match[6], match[7])) if a)
        if max(len(above), len(below)) > MAX_DIGITS or not int(below):
            return None
        return Literal(value=Fraction(int(above), int(below)) * (-1 if match[1] == "-" else 1))
    if (match := _MIXED.fullmatch(text)) and len(text) < MAX_DIGITS and int(match[4]):
        value = int(match[2]) + Fraction(int(match[3]), int(match[4]))
        return Literal(value=-value if match[1] == "-" else value)
    return None


def based(text: str) -> tuple[str, str] | None:
    """The digits and the base of a number such as 1012_3; None of anything else."""
    match = _BASED.fullmatch(text.strip())
    return (match[1].lstrip("0") or "0", _BASES.get(match[2], match[2])) if match else None


def without_thousands(text: str) -> str:
    """A text without the separators of thousands: 1,234,567 and 1 234 567 are 1234567."""
    joined = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return _SPACED.sub(lambda match: match[0].replace(" ", ""), joined)


def with_point(text: str) -> str:
    """A number with a decimal comma, such as 1,5, with a point; any other text as it is."""
    match = _COMMA.fullmatch(text.strip())
    return f"{match[1]}.{match[2]}" if match else text
