"""Inequalities as intervals: -2 <= x < 7 is [-2, 7), |x| > 2 and x < -2 or x > 2 are the same union, and x != 3 leaves two rays."""

from __future__ import annotations

from structcot.grading.answer_parts import Part, is_name, read_part, reversed_relation

_INFINITE = "\\infty"
_LOW = {"<": "(", "<=": "["}
_HIGH = {"<": ")", "<=": "]"}
_MIRRORED = {"(": ")", ")": "(", "[": "]", "]": "["}


def ranges_of(part: Part) -> Part | None:
    """The interval, or the union of intervals, that inequalities of one name stand for; None of anything else."""
    if part.kind == "list":
        ranges = [ranges_of(item) for item in part.items]
        intervals = [one for one in ranges if one and one.kind == "tuple"]
        return _union(*intervals) if len(intervals) == len(ranges) else None
    if part.kind == "tuple":
        return part
    if part.kind != "relation":
        return None
    if part.signs == ("!=",):
        return _all_but(part)
    if part.signs[0] in (">", ">="):
        part = reversed_relation(part)
    if any(sign not in _LOW for sign in part.signs):
        return None
    return _ray(part) if len(part.items) == 2 else _between(part)


def _ray(part: Part) -> Part | None:
    """The range of the name in an inequality of two sides."""
    first, second = (item.text for item in part.items)
    if _is_named(first):
        if _is_absolute(first):
            return _interval(_LOW[part.signs[0]], f"-({second})", second, _HIGH[part.signs[0]])
        return _interval("(", f"-{_INFINITE}", second, _HIGH[part.signs[0]])
    if not _is_named(second):
        return None
    upper = _interval(_LOW[part.signs[0]], first, _INFINITE, ")")
    return _union(_mirror(upper), upper) if _is_absolute(second) else upper


def _between(part: Part) -> Part | None:
    """The range of the name in the middle of an inequality of three sides."""
    if len(part.items) != 3 or not _is_named(part.items[1].text):
        return None
    low, name, high = (item.text for item in part.items)
    interval = _interval(_LOW[part.signs[0]], low, high, _HIGH[part.signs[1]])
    return _union(_mirror(interval), interval) if _is_absolute(name) else interval


def _mirror(interval: Part) -> Part:
    """The interval of the negative numbers."""
    low, high = (item.text for item in interval.items)
    left, right = (_MIRRORED[mark] for mark in reversed(interval.brackets))
    return _interval(left, f"-{_INFINITE}" if high == _INFINITE else f"-({high})", f"-({low})", right)


def _all_but(part: Part) -> Part | None:
    """The range of a name that is not one value."""
    if not is_name(part.items[0].text):
        return None
    value = part.items[1].text
    return _union(_interval("(", f"-{_INFINITE}", value, ")"), _interval("(", value, _INFINITE, ")"))


def _is_named(text: str) -> bool:
    return is_name(text) and _INFINITE not in text


def _is_absolute(text: str) -> bool:
    return text.strip().startswith("|") and text.strip().endswith("|")


def _interval(left: str, low: str, high: str, right: str) -> Part:
    return Part(kind="tuple", text=f"{left}{low},{high}{right}", items=(read_part(low), read_part(high)), brackets=left + right)


def _union(*intervals: Part) -> Part:
    return Part(kind="union", text=" \\cup ".join(one.text for one in intervals), items=intervals)
