"""The units that the paper's harness takes out of an answer, and how.

A unit goes wherever it stands as a word of its own, not only behind a number, so that single letters go too: "a+b" becomes "+b".
"""

from __future__ import annotations

import re
from functools import cache

# In the order in which they are taken out, which matters where one is part of another. Each is a pattern: a dot is any one character.
# The list is the harness's own, with its misspellings, its broken characters and its repetitions.
_UNITS = (
    "east|degree|mph|kmph|ft|m sqaure| m east|sq m|deg|mile|q .|monkey|prime|ratio|profit of rs|rd|o|gm|p . m|lb|tile|per|dm|"
    "lt|gain|ab|way|west|a .|b .|c .|d .|e .|f .|g .|h .|t|a|h|no change|men|soldier|pie|bc|excess|st|inches|noon|percent|by|"
    "gal|kmh|c|acre|rise|a . m|th|π r 2|sq|mark|l|toy|coin|sq . m|gallon|° f|profit|minw|yr|women|feet|am|pm|hr|cu cm|square|"
    "v â € ™|are|rupee|rounds|cubic|cc|mtr|s|ohm|number|kmph|day|hour|minute|min|second|man|woman|sec|cube|mt|sq inch|mp|"
    "∏ cm ³|hectare|more|sec|unit|cu . m|cm 2|rs .|rs|kg|g|month|km|m|cm|mm|apple|liter|loss|yard|pure|year|increase|"
    "decrease|d|less|Surface|litre|pi sq m|s .|metre|meter|inch"
)
_WORD = re.compile(r"\w+")
# One pass takes out one of two neighbours that share a space, so there are two.
_PASSES = 2


def without_units(text: str) -> str:
    """Take the units out of `text`, but never all of it."""
    words = set(_WORD.findall(text))
    present = [pattern for needed, pattern in _patterns() if needed <= words]
    for _ in range(_PASSES):
        for pattern in present:
            text = pattern.sub(r"\1\2", text) or text
    return text


@cache
def _patterns() -> tuple[tuple[frozenset[str], re.Pattern[str]], ...]:
    """Each unit, then each with a plural s, as a pattern, with the words without which it cannot match."""
    units = _UNITS.split("|")
    units += [unit + "s" for unit in units]
    return tuple((frozenset(_WORD.findall(unit)), re.compile(rf"(^|\W){unit}($|\W)")) for unit in units)
