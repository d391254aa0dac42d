"""Whether two formulas have the same value: exactly where both are rational, else to 40 digits and more, at chosen points for the symbols.

Two different formulas of the kind that answers have agree at a random point only by their own identity, so a few points decide. Symbols
are real numbers of both signs, and whole numbers too where a formula counts something. Points where both formulas are real decide; where
there are none, complex ones do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from mpmath import mp, mpc, mpf, workdps

from structcot.grading.formula import Node

POINTS = 8
NEEDED_POINTS = 2
MIN_DIGITS, MAX_DIGITS = 50, 20_000
MAX_FACTORIAL = 5_000
# Digits by which two values may differ at the end, from rounding on the way.
_SLACK = 15

Value = Any  # a Fraction where exact, else an mpf or mpc


class NoValue(ArithmeticError):
    """Why a formula has no value here: division by zero, or a number out of reach."""


@dataclass(slots=True)
class Point:
    """Where symbols are evaluated: values by name, made from the number of the point; `digits` is the longest whole number met."""

    number: int
    is_whole: bool = False
    digits: int = 0
    values: dict[str, Value] = field(default_factory=dict)

    def value_of(self, name: str) -> Value:
        """The value of a symbol: e and i are what they are, the others depend on their names alone."""
        if name not in self.values:
            self.values[name] = self._fresh(name)
        return self.values[name]

    def _fresh(self, name: str) -> Value:
        if name == "e":
            return mp.e + 0
        if name == "i":
            return mpc(0, 1)
        if name == "\\pi":
            return mp.pi + 0
        if name == "\\infty":
            return mpf("inf")
        chance = random.Random(f"{self.number} {name}")
        if self.is_whole:
            return Fraction(chance.randrange(2, 40))
        size = Fraction(chance.randrange(10**8, 3 * 10**8), 10**8)
        return -size if self.number >= POINTS // 2 and chance.random() < 0.5 else size


def symbols_of(node: Node) -> frozenset[str]:
    """The names of the free symbols of a formula."""
    if node.operation == "symbol":
        return frozenset() if node.name in ("e", "i", "\\pi", "\\infty") else frozenset((node.name,))
    return frozenset().union(*(symbols_of(argument) for argument in node.arguments))


def constant_of(node: Node) -> Value:
    """The value of a formula without symbols, a Fraction where it is rational by exact steps.

    Raises:
        NoValue: if it has symbols, or no value.
    """
    if symbols_of(node):
        raise NoValue("it has symbols")
    with workdps(MIN_DIGITS):
        return _value(node, Point(number=0))


def same_value(one: Node, other: Node) -> bool:
    """Whether two formulas are equal wherever both are defined.

    Raises:
        NoValue: if that cannot be told, since one of them has no value that can be computed.
    """
    symbols = symbols_of(one) | symbols_of(other)
    if not symbols:
        return _agree(one, other, 0, False)[0]
    real, complex_ = [], []
    whole = bool(_operations(one) & _COUNTING or _operations(other) & _COUNTING)
    for number in range(POINTS):
        try:
            is_same, is_real = _agree(one, other, number, whole)
        except NoValue:
            continue
        (real if is_real else complex_).append(is_same)
    decisive = real if len(real) >= NEEDED_POINTS else real + complex_
    if len(decisive) < NEEDED_POINTS:
        raise NoValue("no point at which both have values")
    return all(decisive)


def ratio_of(one: Node, other: Node) -> int:
    """The sign of the constant by which one formula is a multiple of the other; 0 where it is none. Raises NoValue as `same_value`."""
    ratios = []
    with workdps(MIN_DIGITS):
        for number in range(POINTS):
            try:
                ratios.append(_real(_divide(_value(one, Point(number)), _value(other, Point(number)))))
            except NoValue:
                continue
        usable = [ratio for ratio in ratios if ratio is not None]
        if len(usable) < NEEDED_POINTS:
            raise NoValue("no point at which both have real values")
        if not usable[0] or not all(close(usable[0], ratio) for ratio in usable):
            return 0
        return 1 if usable[0] > 0 else -1


def close(one: Value, other: Value) -> bool:
    """Whether two values are equal: exactly for fractions, else to all digits that the working precision bears."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    one, other = _float(one), _float(other)
    if mp.isinf(one) or mp.isinf(other):
        return bool(one == other)
    largest = max(abs(one), abs(other))
    return bool(abs(one - other) <= largest * mpf(10) ** (_SLACK - mp.dps))


def _agree(one: Node, other: Node, number: int, is_whole: bool) -> tuple[bool, bool]:
    """Whether two formulas agree at a point, and whether both are real there; asked with more digits if long whole numbers were met."""
    digits = MIN_DIGITS
    while True:
        with workdps(digits):
            point = Point(number, is_whole)
            values = _value(one, point), _value(other, point)
            is_same = close(*values)
            is_real = all(_real(value) is not None for value in values)
        if not is_same or digits >= point.digits + MIN_DIGITS:
            return is_same, is_real
        digits = point.digits + MIN_DIGITS


def _value(node: Node, point: Point) -> Value:
    if node.operation == "number":
        return _counted(node.value, point)
    if node.operation == "symbol":
        return point.value_of(node.name)
    arguments = [_value(argument, point) for argument in node.arguments]
    try:
        return _counted(_OPERATIONS[node.operation](*arguments), point)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError, MemoryError) as error:
        raise NoValue(f"{node.operation}: {error}") from error


def _counted(value: Value, point: Point) -> Value:
    """Note how long an exact number is; an undefined one is refused."""
    if isinstance(value, Fraction):
        digits = int(max(value.numerator.bit_length(), value.denominator.bit_length()) * 0.302)
        if digits > MAX_DIGITS:
            raise NoValue("a number too long")
        point.digits = max(point.digits, digits)
    elif mp.isnan(value):
        raise NoValue("no number")
    return value


def _float(value: Value) -> Value:
    return mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _real(value: Value) -> Value | None:
    """A value as a real number, None if it has an imaginary part that is not rounding."""
    if isinstance(value, mpc):
        return value.real if abs(value.imag) <= abs(value.real) * mpf(10) ** (_SLACK - mp.dps) else None
    return value


def _add(one: Value, other: Value) -> Value:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one + other
    one, other = _float(one), _float(other)
    total = one + other
    # What remains of terms that cancel is rounding.
    return mpf(0) if abs(total) <= max(abs(one), abs(other)) * mpf(10) ** (_SLACK - 3 - mp.dps) else total


def _multiply(one: Value, other: Value) -> Value:
    return one * other if isinstance(one, Fraction) and isinstance(other, Fraction) else _float(one) * _float(other)


def _divide(one: Value, other: Value) -> Value:
    if not other:
        raise NoValue("division by zero")
    return one / other if isinstance(one, Fraction) and isinstance(other, Fraction) else _float(one) / _float(other)


def _raise(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if not base and exponent <= 0:
            raise NoValue("zero to the power of zero or less")
        length = max(base.numerator.bit_length(), base.denominator.bit_length()) - (abs(base) == 1)
        if (length > 1 and length * abs(exponent) * 0.302 > MAX_DIGITS) or abs(exponent) > 10**9:
            raise NoValue("a power too large")
        return base ** int(exponent)
    base, exponent = _float(base), _float(exponent)
    if not base:
        return mpf(0)
    if mp.isfinite(base) and mp.isfinite(exponent) and abs(mp.log(abs(base)) * exponent) > MAX_DIGITS * 10:
        raise NoValue("a power too large")
    return base**exponent


def _root(base: Value, degree: Value) -> Value:
    exact = _exact_root(base, degree)
    if exact is not None:
        return exact
    real = _real(_float(base))
    if isinstance(degree, Fraction) and degree.denominator == 1 and degree % 2 and real is not None and real < 0:
        return -((-real) ** (mpf(1) / int(degree)))
    return _raise(_float(base), _divide(Fraction(1), degree))


def _exact_root(base: Value, degree: Value) -> Fraction | None:
    """The root of a fraction of squares."""
    if isinstance(base, Fraction) and degree == 2 and base >= 0:
        above, below = math.isqrt(base.numerator), math.isqrt(base.denominator)
        if above * above == base.numerator and below * below == base.denominator:
            return Fraction(above, below)
    return None


def _factorial(value: Value) -> Value:
    if isinstance(value, Fraction) and value.denominator == 1 and value >= 0:
        if value > MAX_FACTORIAL:
            raise NoValue("a factorial too large")
        return Fraction(math.factorial(int(value)))
    return mp.factorial(_bounded(value))


def _bounded(value: Value) -> Value:
    value = _float(value)
    if abs(value) > 10**6:
        raise NoValue("an argument too large")
    return value


def _binomial(above: Value, below: Value) -> Value:
    if all(isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= MAX_FACTORIAL for value in (above, below)):
        return Fraction(math.comb(int(above), int(below)))
    if isinstance(above, Fraction) and isinstance(below, Fraction) and max(abs(above), abs(below)) > MAX_FACTORIAL:
        raise NoValue("a binomial too large")
    return mp.binomial(_bounded(above), _bounded(below))


def _rounded(function: Callable[[Value], Value], exact: Callable[[Fraction], int]) -> Callable[[Value], Value]:
    def _exactly(value: Value) -> Value:
        if isinstance(value, Fraction):
            return Fraction(exact(value))
        real = _real(value)
        if real is None or not mp.isfinite(real):
            raise NoValue("not real")
        nearest = mp.nint(real)
        return nearest if close(real, nearest) else function(real)

    return _exactly


def _of_float(function: Callable[[Value], Value]) -> Callable[[Value], Value]:
    return lambda value: function(_bounded(value))


def _operations(node: Node) -> frozenset[str]:
    return frozenset((node.operation,)).union(*(_operations(argument) for argument in node.arguments))


_COUNTING = frozenset(("floor", "ceil", "factorial", "binom"))
_OPERATIONS: dict[str, Callable[..., Value]] = {
    "+": _add,
    "neg": lambda value: -value,
    "*": _multiply,
    "/": _divide,
    "frac": _divide,
    "^": _raise,
    "root": _root,
    "abs": abs,
    "factorial": _factorial,
    "binom": _binomial,
    "floor": _rounded(mp.floor, math.floor),
    "ceil": _rounded(mp.ceil, math.ceil),
    "degree": lambda value: _multiply(value, mp.pi / 180),
    "lg": _of_float(lambda value: mp.log(value) / mp.log(10)),
    "log": _of_float(mp.log),
    **{name: _of_float(getattr(mp, name)) for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "ln", "exp")},
    **{f"arc{name}": _of_float(getattr(mp, f"a{name}")) for name in ("sin", "cos", "tan")},
}
