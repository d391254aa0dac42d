"""Whether two formulas are equal by the last rules of the paper's harness, which are those of SymPy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from math import isclose
from typing import Any

import sympy

from structcot.grading.paper_expression import is_gigantic
from structcot.grading.paper_parse import parse

RELATIVE_TOLERANCE = 1e-4
_MATRIX_DECIMALS = 3


def why_equal(pred: str, gold: str) -> str:
    """The rule by which two formulas are equal, in words; "" where none says so.

    What SymPy fails on is unequal. Tuples, lists, sets and what nothing can read are equal only if they are written or built the same.
    """
    left, right = parse(pred), parse(gold)
    if _holds(_is_same, left, right):
        return "equal as parsed formulas"
    if any(isinstance(side, str | tuple | list | set) or not _holds(_is_workable, side, side) for side in (left, right)):
        return ""
    return next((reason for reason, rule in _RULES if _holds(rule, left, right)), "")


def _holds(rule: Callable[[Any, Any], Any], left: Any, right: Any) -> bool:
    # SymPy fails with anything, and the harness goes on to the next rule.
    with suppress(Exception):
        return bool(rule(left, right))
    return False


def _is_same(left: Any, right: Any) -> bool:
    return str(left) == str(right) or left == right


def _is_workable(formula: Any, _: Any) -> bool:
    """Whether SymPy can work with `formula` before the harness's three seconds are over."""
    return not is_gigantic(formula)


def _is_equivalent(left: Any, right: Any) -> bool:
    return left.equals(right) or sympy.simplify(left - right) == 0


def _are_same_equation(left: Any, right: Any) -> bool:
    return abs(left.lhs - left.rhs).equals(abs(right.lhs - right.rhs))


def _have_same_value(left: Any, right: Any) -> bool:
    return isclose(float(sympy.N(right)), float(sympy.N(left)), rel_tol=RELATIVE_TOLERANCE)


def _are_same_matrix(left: Any, right: Any) -> bool:
    if left.shape != right.shape:
        return False
    left, right = (side.applyfunc(lambda entry: round(entry, _MATRIX_DECIMALS)) for side in (left, right))
    return left.equals(right)


_RULES = (
    ("equal after simplification", _is_equivalent),
    ("equal as equations, whichever side is whichever", _are_same_equation),
    ("equal in value within 1e-4 of it", _have_same_value),
    ("equal as matrices to three decimals", _are_same_matrix),
)
