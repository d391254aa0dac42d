r"""What a number is counted in: units behind (or before) an answer, told apart from symbols, and what one is in terms of another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from structcot.grading.answer_text import FUNCTIONS, GREEK, plain

# Kind of quantity -> spellings of each unit, with what one is worth.
_KINDS: Mapping[str, Mapping[str, Fraction]] = {
    "length": {
        "mm millimeter millimetre": Fraction(1, 1000),
        "cm centimeter centimetre": Fraction(1, 100),
        "m meter metre": Fraction(1),
        "km kilometer kilometre": Fraction(1000),
        "in inch inches": Fraction(254, 10000),
        "ft foot feet": Fraction(3048, 10000),
        "yd yard": Fraction(9144, 10000),
        "mi mile": Fraction(1609344, 1000),
    },
    "mass": {"mg milligram": Fraction(1, 1000), "g gram": Fraction(1), "kg kilogram": Fraction(1000)},
    "time": {
        "s sec second": Fraction(1),
        "min minute": Fraction(60),
        "h hr hour": Fraction(3600),
        "day": Fraction(86400),
        "week": Fraction(604800),
    },
    "money": {"dollar usd $": Fraction(1), "cent": Fraction(1, 100)},
    "euro": {"euro eur €": Fraction(1)},
    "pound": {"£ gbp": Fraction(1)},
    "angle": {"degree deg °": Fraction(1)},
    "arc": {"radian rad": Fraction(1)},
    "energy": {"j joule": Fraction(1), "kj kilojoule": Fraction(1000)},
    "particle energy": {"ev electronvolt": Fraction(1), "kev": Fraction(1000), "mev": Fraction(10**6), "gev": Fraction(10**9)},
    "force": {"n newton": Fraction(1), "kn kilonewton": Fraction(1000)},
    "power": {"w watt": Fraction(1), "kw kilowatt": Fraction(1000)},
    "voltage": {"v volt": Fraction(1)},
    "current": {"a amp ampere": Fraction(1)},
    "frequency": {"hz hertz": Fraction(1), "khz kilohertz": Fraction(1000)},
    "pressure": {"pa pascal": Fraction(1), "kpa kilopascal": Fraction(1000)},
    "temperature": {"k kelvin": Fraction(1)},
    "amount": {"mol mole": Fraction(1)},
    "volume": {"l liter litre": Fraction(1), "ml milliliter millilitre": Fraction(1, 1000)},
}
_UNITS = {name: (kind, size) for kind, units in _KINDS.items() for names, size in units.items() for name in names.split()}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}

_CURRENCY = re.compile(r"^([-+]?)\s*(\\?\$|€|£|¥|USD)\s*(?=[-+.\d\\(])")
_HUNDREDTHS = r"(?:percent(?:age)?|per cent|pct)\.?"
_PERCENT = re.compile(rf"\s*(?:\\?%|\\text\{{\s*(?:\\?%|{_HUNDREDTHS})\s*\}}|\b{_HUNDREDTHS})\s*$", re.IGNORECASE)
_POWER = r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
_TEXT_UNIT = rf"\\text\{{[^{{}}]*\}}{_POWER}"
_SET = re.compile(rf"(?<=[\w)}}\]!.])\s*(?P<unit>{_TEXT_UNIT}(?:\s*(?:/|\\cdot)?\s*(?:{_TEXT_UNIT}|[a-z]{_POWER}))*)\s*$")
_COMPOUND = rf"(?<=\s)[A-Za-z]+{_POWER}\s*/\s*[A-Za-z]+{_POWER}"
_WORDS = re.compile(rf"(?<=[\d)}}.])\s*(?P<unit>(?:[A-Za-z]{{2,}}\.?\s*/?\s*)+{_POWER}|{_COMPOUND})\s*$")
_SIGN = re.compile(r"(?<=[\d)}])\s*(?P<unit>\\?\$|€|£|¥|\^\s*\\circ\s*(?:\\text\{)?[CF]?\}?)\s*$")
_FOREIGN = re.compile(r"(?<=[\d)}%])\s*(?P<unit>[\u0400-\u04ff\u0600-\u06ff\u0900-\u097f\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]+)\s*$")
_VOWEL = re.compile(r"[aeiou]")
_UNIT_START = re.compile(r"(?:\\text\s*\{?|[,~ ]|\{)+$")
_FORMULA_WORDS = FUNCTIONS | GREEK | {"sqrt", "infty", "infinity", "and", "or"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """An answer without its unit; `unit` is as it was written, "" for none; `is_percent` where it counts hundredths."""

    body: str
    unit: str = ""
    is_percent: bool = False


def split_unit(text: str, known: str = "") -> Measured:
    """Take the unit off a tidied answer; `known` is a unit that may stand there in any form."""
    unit = ""
    if match := _CURRENCY.match(text):
        text, unit = match[1] + text[match.end() :], match[2].lstrip("\\")
    if known and (bare := _without_known(text, known)):
        return Measured(body=bare, unit="")
    if match := _PERCENT.search(text):
        return Measured(body=text[: match.start()].strip(), is_percent=True)
    for pattern in (_SET, _WORDS, _SIGN, _FOREIGN):
        match = pattern.search(text)
        if match and _is_unit(match[0], text[: match.start()]):
            return Measured(body=text[: match.start()].strip(), unit=match["unit"].strip() or unit)
    return Measured(body=text.strip(), unit=unit)


def factor(one: str, other: str) -> Fraction | None:
    """How many of `other` one of `one` is. 1 where either is unknown, or no unit; None where they measure different things."""
    first, second = _measure(one), _measure(other)
    if first is None or second is None:
        return Fraction(1)
    return first[2] / second[2] if first[:2] == second[:2] else None


def _measure(unit: str) -> tuple[str, int, Fraction] | None:
    """Kind, power and size of a simple unit; None of a compound or unknown one."""
    power = 1
    text = plain(unit).replace("^\\circ", "°").strip(" .\\")
    if match := re.search(r"\^\s*\{?\s*(\d)\s*\}?$", text):
        power, text = int(match[1]), text[: match.start()]
    names = []
    for word in text.split():
        low = word.lower()
        if low in _POWERS:
            power = _POWERS[low]
        else:
            names.append(low)
    if len(names) != 1:
        return None
    known = _UNITS.get(names[0]) or _UNITS.get(names[0].removesuffix("s"))
    return (known[0], power, known[1] ** power) if known else None


def _is_unit(behind: str, body: str) -> bool:
    """Whether what stands behind a body is a unit, and not a part of its formula, as in 2 sin, 3ab or the degrees of cos 36."""
    if "\\circ" in behind:
        return not any(f"\\{name}" in body for name in FUNCTIONS)
    if "\\" in behind or not behind.isascii():
        return True
    words = re.findall(r"[a-z]+", behind.lower())
    if _FORMULA_WORDS & set(words):
        return False
    is_apart = behind[:1].isspace()
    return not words or "/" in behind or any(_is_known(word) or (_VOWEL.search(word) and len(word) > 3 - is_apart) for word in words)


def _is_known(word: str) -> bool:
    return word in _UNITS or word.removesuffix("s") in _UNITS


def _without_known(text: str, known: str) -> str:
    """The text without the known unit at its end, "" if it does not stand there."""
    unit = _letters(known)
    for position in range(len(text) - 1, 0, -1):
        tail = _letters(text[position:])
        if unit and tail == unit:
            return _UNIT_START.sub("", text[:position]).strip()
        if len(tail) > len(unit):
            break
    return ""


def _letters(text: str) -> str:
    """A text without what sets it, to compare units."""
    return re.sub(r"\\text|\\[,;! ]|[\s{}~$\\]", "", text)
