"""Whether an answer equals the reference by the rules of the paper's harness, in its order, with its mistakes.

Known mistakes, kept on purpose:

- Commas are taken out of numbers: "1,5" is 15, so that a list of numbers is one number.
- A number is also right if it is a hundred times too large or too small: a percent sign may be missing, or be too much.
- Numbers within 1e-4 of each other are equal, also whole ones: 102018 and 102019. All that overflow a float are equal.
- Round and curly brackets are ignored, and square ones that only one side has, or that face round ones: "(2,3]" is "2,3]".
- Lists are compared in order, so that the same answers in another order are wrong (but see `paper_strings` for integers).
- Of a list that is not in brackets, often only the first part counts (see `paper_parse`).
- The name left of an equals sign is dropped if it is at most two characters long.
- An equation is also equal to another one with the sides' difference negated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isclose

from structcot.grading.paper_answers import last_choice
from structcot.grading.paper_symbolic import RELATIVE_TOLERANCE, why_equal

_CHOICES = frozenset("ABCDE")
_IGNORED_BRACKETS = str.maketrans("", "", "{}()")
_MATRICES = ("pmatrix", "bmatrix")
_ROW_END = "\\\\"
_LONGEST_NAME = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Whether two answers are equal, and the rule that said so."""

    equal: bool
    reason: str


Rule = Callable[[str, str], Comparison | None]


def compare(pred: str, gold: str) -> Comparison:
    """Compare an answer with the reference, both in the plain form.

    Raises:
        RecursionError: if brackets or equations are nested too deeply.
    """
    for rule in _RULES_AS_WRITTEN:
        if decided := rule(pred, gold):
            return decided
    pred, gold = pred.strip(), gold.strip()
    if "pmatrix" in pred and "pmatrix" not in gold:
        gold = _as_matrix(gold)
    for rule in _RULES_OF_MATHEMATICS:
        if decided := rule(pred, gold):
            return decided
    return Comparison(equal=False, reason="no rule says that they are equal")


def _same_text(pred: str, gold: str) -> Comparison | None:
    if pred.strip().lower() == gold.strip().lower():
        return Comparison(equal=True, reason="equal as text")
    return None


def _same_choice(pred: str, gold: str) -> Comparison | None:
    if gold in _CHOICES and last_choice(pred) == gold:
        return Comparison(equal=True, reason="its last letter from A to E is the choice")
    return None


def _same_number(pred: str, gold: str) -> Comparison | None:
    """Decide on two numbers for good; None where one of them is no number."""
    found, wanted = _number(pred), _number(gold)
    if found is None or wanted is None:
        return None
    if isclose(wanted, found, rel_tol=RELATIVE_TOLERANCE):
        return Comparison(equal=True, reason="equal as numbers within 1e-4 of the reference")
    if any(isclose(scaled, found, rel_tol=RELATIVE_TOLERANCE) for scaled in (wanted / 100, wanted * 100)):
        return Comparison(equal=True, reason="equal up to a factor of 100 (percent)")
    return Comparison(equal=False, reason="another number")


def _number(text: str) -> float | None:
    """What Python reads as a number when all commas are gone; a percentage as its hundredth."""
    text = text.replace(",", "")
    for number, divisor in ((text, 1), (text.removesuffix("%").removesuffix("\\"), 100)):
        try:
            return float(number) / divisor
        except ValueError:
            if not text.endswith("%"):
                return None
    return None


def _nothing(pred: str, gold: str) -> Comparison | None:
    return None if pred else Comparison(equal=False, reason="no answer")


def _same_without_brackets(pred: str, gold: str) -> Comparison | None:
    left, right = pred, gold
    square = pred.startswith("[") and pred.endswith("]") and not gold.startswith("(")
    round_ = pred.startswith("(") and pred.endswith(")") and not gold.startswith("[")
    if square or round_:
        left, right = left.strip("[]()"), right.strip("[]()")
    if left.translate(_IGNORED_BRACKETS).lower() == right.translate(_IGNORED_BRACKETS).lower():
        return Comparison(equal=True, reason="equal as text without brackets")
    return None


def _same_parts(pred: str, gold: str) -> Comparison | None:
    """Two rows in brackets are equal if they are at each comma; whatever the brackets are, and what ends the row may be none."""
    if not (_starts_as_row(pred) and _starts_as_row(gold)):
        return None
    if _all_equal(pred[1:-1].split(","), gold[1:-1].split(",")):
        return Comparison(equal=True, reason="equal part by part, in order")
    return None


def _starts_as_row(text: str) -> bool:
    """Whether a bracket opens `text`, and one closes after at least one character on the same line."""
    line = text.partition("\n")[0]
    return text[:1] in ("(", "[") and max(line.rfind(")"), line.rfind("]")) > 1


def _same_matrix(pred: str, gold: str) -> Comparison | None:
    rows = [_rows(side) for side in (pred, gold)]
    if rows[0] is None or rows[1] is None or len(rows[0]) != len(rows[1]):
        return None
    if all(_all_equal(left.split("&"), right.split("&")) for left, right in zip(*rows, strict=True)):
        return Comparison(equal=True, reason="equal as matrices, entry by entry")
    return None


def _rows(text: str) -> list[str] | None:
    """The rows of a matrix, without empty ones; None where `text` is none."""
    starts = any(text.startswith(rf"\begin{{{name}}}") for name in _MATRICES)
    if not starts or not any(text.endswith(rf"\end{{{name}}}") for name in _MATRICES):
        return None
    inner = text[len(r"\begin{pmatrix}") : -len(r"\end{pmatrix}")]
    return [row.strip() for row in inner.split(_ROW_END) if row.strip()]


def _all_equal(preds: list[str], golds: list[str]) -> bool:
    return len(preds) == len(golds) and all(compare(pred, gold).equal for pred, gold in zip(preds, golds, strict=True))


def _same_equation(pred: str, gold: str) -> Comparison | None:
    """Compare two equations as differences of their sides, or one with a value where its left side is a short name."""
    left, right = pred.split("="), gold.split("=")
    if len(left) == len(right) == 2:
        difference, wanted = (f"{sides[0].strip()} - ({sides[1].strip()})" for sides in (left, right))
        if why_equal(difference, wanted) or why_equal(f"-({difference})", wanted):
            return Comparison(equal=True, reason="equal as equations, perhaps with the sides exchanged")
        return None
    for sides, others in ((left, right), (right, left)):
        if len(sides) == 2 and len(sides[0].strip()) <= _LONGEST_NAME and len(others) == 1:
            inner = compare(left[-1], right[-1])
            return Comparison(equal=True, reason=f"after the equals sign {inner.reason}") if inner.equal else None
    return None


def _same_formula(pred: str, gold: str) -> Comparison | None:
    reason = why_equal(pred, gold)
    return Comparison(equal=True, reason=reason) if reason else None


def _as_matrix(text: str) -> str:
    """Write each pair of curly brackets with a comma between as a matrix; "" where there is none."""
    matrices = []
    for line in text.split("\n"):
        start, end = line.find("{"), line.rfind("}")
        if start >= 0 and "," in line[start + 1 : end]:
            matrices.append(r"\begin{pmatrix}" + line[start : end + 1].strip("{}").replace(",", "\\") + r"\end{pmatrix}")
    return ", ".join(matrices)


_RULES_AS_WRITTEN: tuple[Rule, ...] = (_same_text, _same_choice, _same_number, _nothing)
_RULES_OF_MATHEMATICS: tuple[Rule, ...] = (_same_without_brackets, _same_parts, _same_matrix, _same_equation, _same_formula)
