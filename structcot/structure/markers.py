"""What a sentence does in a thought, told by its words.

The words lie in `markers.toml`, for English and Chinese. A sentence that no entry fits carries the thought on, and has no marker.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

STEP_TYPES = ("initializing", "deduction", "verification", "backtracking", "uncertainty-estimation", "new-approach", "conclusion")
# What Li et al., 2025 (arXiv 2502.07374) call reflection: turning back, checking, doubting.
REFLECTION = frozenset(("backtracking", "verification", "uncertainty-estimation"))
# What may stand before the first word of a sentence: white space, quotes, list bullets and marks of emphasis.
_LEAD = r"[\s\"'“‘(\[*_>#-]*+"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """An entry for words anywhere in a sentence: its place in the file, a quick test, and the test."""

    place: int
    needs: tuple[str, ...]
    pattern: re.Pattern[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Markers:
    """All entries: the type of each, one pattern for all that open sentences (its group number is the place), and those held."""

    types: tuple[str, ...]
    opens: re.Pattern[str]
    held: tuple[_Held, ...]


def marker(sentence: str) -> str:
    """Name the type of step that `sentence` opens, "" where it opens none."""
    markers = _markers()
    lowered = sentence.lower()  # a third faster than patterns that ignore case
    match = markers.opens.match(lowered)
    place = match.lastindex - 1 if match and match.lastindex else len(markers.types)
    for held in markers.held:
        if held.place < place and any(map(lowered.__contains__, held.needs)) and held.pattern.search(lowered):
            return markers.types[held.place]
    return markers.types[place] if match else ""


@cache
def _markers() -> _Markers:
    listed = tomllib.loads(files("structcot.structure").joinpath("markers.toml").read_text(encoding="utf-8"))
    entries = listed["marker"]
    before = f"{_LEAD}(?:(?:{'|'.join(listed['before'])})\\s*)*"
    # An entry without words to open with keeps its group, which matches nothing.
    opens = "|".join(f"({'|'.join(entry['opens'])})" if "opens" in entry else "((?!))" for entry in entries)
    held = [
        _Held(place=place, needs=tuple(entry["needs"]), pattern=re.compile("|".join(entry["holds"])))
        for place, entry in enumerate(entries)
        if "holds" in entry
    ]
    return _Markers(types=tuple(entry["type"] for entry in entries), opens=re.compile(f"{before}(?:{opens})"), held=tuple(held))
