"""What a sentence does in a thought, told by the words that open it.

The words lie in `markers.toml`, for English and Chinese. A sentence that no entry fits carries the thought on, and has no marker.
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.resources import files

STEP_TYPES = ("initializing", "deduction", "verification", "backtracking", "uncertainty-estimation", "new-approach", "conclusion")
# What may stand before the first word of a sentence: white space, quotes, list bullets and marks of emphasis.
_LEAD = r"[\s\"'“‘(\[*_>#-]*"


def marker(sentence: str) -> str:
    """Name the type of step that `sentence` opens, "" where it opens none."""
    match = _pattern().match(sentence)
    return _types()[match.lastindex - 1] if match and match.lastindex else ""


@cache
def _entries() -> tuple[tuple[str, str], ...]:
    """The entries of the file in order: a type and one regular expression for sentences of it."""
    listed = tomllib.loads(files("structcot.structure").joinpath("markers.toml").read_text(encoding="utf-8"))
    before = f"{_LEAD}(?:(?:{'|'.join(listed['before'])})\\s*)*"
    entries = []
    for entry in listed["marker"]:
        ways = []
        if "opens" in entry:
            ways.append(f"{before}(?:{'|'.join(entry['opens'])})")
        if "holds" in entry:
            ways.append(f"[^\\n]*?(?:{'|'.join(entry['holds'])})")
        entries.append((entry["type"], "|".join(ways)))
    return tuple(entries)


@cache
def _types() -> tuple[str, ...]:
    return tuple(kind for kind, _ in _entries())


@cache
def _pattern() -> re.Pattern[str]:
    return re.compile("|".join(f"({pattern})" for _, pattern in _entries()), re.IGNORECASE)
