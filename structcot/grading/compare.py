"""Whether two answers are the same: structure against structure, element by element, and in the end value against value.

Each comparison says how the two are the same, in a few words, or "" where they are not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from structcot.grading.answer_parts import Part, is_name, items_of, reversed_relation
from structcot.grading.answer_text import bare, plain
from structcot.grading.ranges import ranges_of
from structcot.grading.scalars import multiple_of, same_scalar

# Words, with digits and hyphens perhaps, but without any sign of a formula.
_WORDY = re.compile(r"(?:[^\W_]|[\s.,;:'\"!?()]|(?<=[^\W\d_]{2})-(?=[^\W\d_]{2}))*")
_WORDS = re.compile(r"[^\w]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What is allowed: the largest absolute error of a number, its unit, and whether a list of answers may come in any order."""

    tolerance: float | None = None
    unit: str = ""
    is_multiple: bool = False


def same_answer(gold: Part, pred: Part, rules: Rules) -> str:
    """Compare two answers of any structure."""
    if bare(gold.text) == bare(pred.text):
        return "the same text"
    gold, pred = _values_of(gold, pred)
    if "relation" in (gold.kind, pred.kind):
        return _same_relation(gold, pred, rules)
    kinds = {gold.kind, pred.kind}
    if kinds == {"scalar"}:
        return _same_words(gold, pred) or same_scalar(gold.text, pred.text, rules.tolerance, rules.unit)
    if kinds == {"ratio"} or kinds == {"ratio", "scalar"}:
        return _same_ratio(gold, pred, rules)
    if "matrix" in kinds:
        return _same_matrix(gold, pred, rules)
    if "union" in kinds:
        return _same_union(gold, pred, rules)
    return _same_items(gold, pred, rules)


def _values_of(gold: Part, pred: Part) -> tuple[Part, Part]:
    """Where one gives a value to a name and the other does not, the values alone."""
    if gold.is_assignment and not pred.is_assignment and (pred.kind != "relation" or gold.signs == ("in",)):
        gold = gold.items[1]
    elif pred.is_assignment and not gold.is_assignment and (gold.kind != "relation" or pred.signs == ("in",)):
        pred = pred.items[1]
    elif gold.is_assignment and pred.is_assignment and bare(gold.items[0].text) == bare(pred.items[0].text):
        gold, pred = gold.items[1], pred.items[1]
    return gold, pred


def _same_words(gold: Part, pred: Part) -> str:
    """Words are compared as words, whatever their case."""
    texts = [plain(part.text) for part in (gold, pred)]
    if not all(_WORDY.fullmatch(text) for text in texts):
        return ""
    words = [_WORDS.sub(" ", text).strip().casefold() for text in texts]
    return "the same words" if words[0] == words[1] and re.search(r"[^\W\d_]{2}", words[0]) else ""


# Lists, tuples, sets, intervals


def _same_items(gold: Part, pred: Part, rules: Rules) -> str:
    ours, theirs = items_of(gold), items_of(pred)
    if gold.kind == "tuple" == pred.kind:
        is_same_kind = gold.brackets == pred.brackets and (gold.brackets == "()" or len(gold.items) == len(pred.items) == 2)
        return "the same, element by element" if is_same_kind and _in_order(gold.items, pred.items, rules) else ""
    if "tuple" in (gold.kind, pred.kind):
        return _list_and_tuple(gold, pred, rules)
    if len(ours) < len(theirs) and not rules.is_multiple:
        theirs = _unlike(theirs)
    if len(ours) != len(theirs):
        return ""
    if _named_once(gold) != _named_once(pred) and not rules.is_multiple and gold.kind == pred.kind == "list":
        return "the same, element by element" if _in_order(ours, theirs, rules) else ""
    return "the same elements" if _any_order(ours, theirs, rules) else ""


def _unlike(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The elements of a list, each text once."""
    return tuple({bare(part.text): part for part in parts}.values())


def _list_and_tuple(gold: Part, pred: Part, rules: Rules) -> str:
    """A list without brackets is a tuple if the order is the same, or in any order where several answers are asked for."""
    enclosed, other = (gold, pred) if gold.kind == "tuple" else (pred, gold)
    if other.kind != "list" or len(other.items) != len(enclosed.items):
        return ""
    if enclosed.brackets not in ("()", "[]") or (enclosed.brackets == "[]" and enclosed is gold):
        return ""
    ordered = _in_order(gold.items, pred.items, rules)
    if ordered or (rules.is_multiple and _any_order(gold.items, pred.items, rules)):
        return "the same, element by element"
    return ""


def _named_once(part: Part) -> bool:
    """Whether the elements of a list are named, each by a letter of its own: AB = 4, CD = 5."""
    names = {re.split(r"[_^]", bare(item.items[0].text))[0] for item in part.items if item.is_assignment}
    return len(names) > 1


def _in_order(gold: Sequence[Part], pred: Sequence[Part], rules: Rules) -> bool:
    inner = replace(rules, is_multiple=False)
    return len(gold) == len(pred) and all(same_answer(ours, theirs, inner) for ours, theirs in zip(gold, pred, strict=True))


def _any_order(gold: Sequence[Part], pred: Sequence[Part], rules: Rules) -> bool:
    """Whether each element has a partner of its own; equality is transitive enough for the first partner to do."""
    inner = replace(rules, is_multiple=False)
    left = list(pred)
    for ours in gold:
        partner = next((theirs for theirs in left if same_answer(ours, theirs, inner)), None)
        if partner is None:
            return False
        left.remove(partner)
    return not left


def _same_union(gold: Part, pred: Part, rules: Rules) -> str:
    if gold.kind == "list" and (ranges := ranges_of(gold)):
        gold = ranges
    if pred.kind == "list" and (ranges := ranges_of(pred)):
        pred = ranges
    if gold.kind != "union" or pred.kind != "union":
        return ""
    return "the same sets" if len(gold.items) == len(pred.items) and _any_order(gold.items, pred.items, rules) else ""


def _same_matrix(gold: Part, pred: Part, rules: Rules) -> str:
    if gold.kind == pred.kind and (gold.width, gold.brackets) != (pred.width, pred.brackets):
        return ""
    if gold.kind == pred.kind == "matrix":
        return "the same matrix" if _in_order(gold.items, pred.items, rules) else ""
    matrix, other = (gold, pred) if gold.kind == "matrix" else (pred, gold)
    if (
        other.kind == "tuple"
        and other.brackets == "()"
        and len(other.items) == len(matrix.items)
        and matrix.width in (1, len(matrix.items))
    ):
        return "the same vector" if _in_order(gold.items, pred.items, rules) else ""
    return same_scalar(gold.text, pred.text, None, "") if other.kind == "scalar" else ""


def _same_ratio(gold: Part, pred: Part, rules: Rules) -> str:
    """Ratios are equal if each quotient of two of their terms is; a ratio of two terms is their quotient too."""
    if gold.kind == pred.kind:
        if len(gold.items) != len(pred.items):
            return ""
        pairs = zip(gold.items[1:], pred.items[1:], strict=True)
        if all(same_scalar(_quotient(gold.items[0], g), _quotient(pred.items[0], p), None, "") for g, p in pairs):
            return "the same ratio"
        return ""
    ratio, other = (gold, pred) if gold.kind == "ratio" else (pred, gold)
    if len(ratio.items) != 2:
        return ""
    quotient = Part(kind="scalar", text=_quotient(*ratio.items))
    return same_answer(quotient, other, rules) and "the same ratio"


def _quotient(above: Part, below: Part) -> str:
    return f"\\frac{{{above.text}}}{{{below.text}}}"


# Relations


def _same_relation(gold: Part, pred: Part, rules: Rules) -> str:
    if gold.kind == pred.kind:
        for theirs in (pred, reversed_relation(pred)):
            if gold.signs == theirs.signs and _in_order(gold.items, theirs.items, rules):
                return "the same relation"
        return _same_solutions(gold, pred) or _same_ranges(gold, pred, rules)
    relation, other = (gold, pred) if gold.kind == "relation" else (pred, gold)
    ranges = ranges_of(relation)
    if ranges is None or other.kind not in ("tuple", "union"):
        return ""
    if other.kind == "union" or ranges.kind == "union":
        return _same_union(ranges, other, rules)
    return _same_items(ranges, other, rules) and "the same range"


def _same_ranges(gold: Part, pred: Part, rules: Rules) -> str:
    """Whether two inequalities of one name leave it the same range: |x| < 3 and -3 < x < 3."""
    ours, theirs = ranges_of(gold), ranges_of(pred)
    if ours is None or theirs is None or ours.kind != theirs.kind or _named(gold) != _named(pred):
        return ""
    return (_same_union if ours.kind == "union" else _same_items)(ours, theirs, rules) and "the same range"


def _named(relation: Part) -> set[str]:
    return {bare(item.text).strip("|") for item in relation.items if is_name(item.text)}


def _same_solutions(gold: Part, pred: Part) -> str:
    """Whether two equations, or two inequalities, are multiples of each other."""
    if len(gold.items) != 2 or len(pred.items) != 2:
        return ""
    theirs = pred if gold.signs == pred.signs else reversed_relation(pred)
    if gold.signs != theirs.signs or any(item.kind != "scalar" for item in (*gold.items, *pred.items)):
        return ""
    sides = [f"({one.items[0].text})-({one.items[1].text})" for one in (gold, theirs)]
    sign = multiple_of(*sides)
    if sign > 0 or (sign < 0 and gold.signs[0] in ("=", "!=")):
        return "an equivalent equation" if gold.signs[0] == "=" else "an equivalent relation"
    return ""
