"""Python expressions of numbers, names, functions and collections, worked out as SymPy's `parse_expr` would, without running any code."""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import sympy

MAX_CHARACTERS = 10_000
# Numbers with more decimal digits are not worked out: the paper's harness runs out of its three seconds on them.
MAX_DIGITS = 1e6

_PLAIN_FUNCTIONS = ("sqrt", "cbrt", "root", "real_root")
_COMBINATORIAL = "sympy.functions.combinatorial"
_EXPONENT_CAP = 300.0
_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = MappingProxyType(
    {
        ast.UAdd: operator.pos,
        ast.USub: operator.neg,
        ast.Invert: operator.invert,
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
        ast.Pow: operator.pow,
        ast.BitXor: operator.xor,
        ast.BitAnd: operator.and_,
        ast.BitOr: operator.or_,
        ast.Eq: operator.eq,
        ast.NotEq: operator.ne,
        ast.Lt: operator.lt,
        ast.LtE: operator.le,
        ast.Gt: operator.gt,
        ast.GtE: operator.ge,
    }
)


def read_expression(text: str) -> Any:
    """Work out a Python expression: SymPy numbers, symbols and functions, alone or in tuples, lists and sets.

    Raises:
        SyntaxError: if it is none.
        ValueError: if it is too long, names a gigantic number, or does anything else than build a value.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError("too long")
    with warnings.catch_warnings():
        # Python warns of what a model wrote, such as "2or", as if it were a program of the user's.
        warnings.simplefilter("ignore", SyntaxWarning)
        body = ast.parse(text.strip(), mode="eval").body
    with sympy.evaluate(False):
        if is_gigantic(_value(body)):
            raise ValueError("a gigantic number")
    return _value(body)


def is_gigantic(formula: Any) -> bool:
    """Whether working out `formula` would make a number of more than `MAX_DIGITS` digits."""
    return any(_log10(part) > MAX_DIGITS for part in sympy.preorder_traversal(formula) if isinstance(part, sympy.Pow | sympy.Function))


def _value(node: ast.AST) -> Any:
    match node:
        case ast.Constant(value=bool() | None as value):
            return value
        case ast.Constant(value=int() | float() as value):
            return sympy.Integer(value) if isinstance(value, int) else sympy.Float(value)
        case ast.Name(id=name):
            return _names().get(name, sympy.Symbol(name))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _names().get(name, sympy.Function(name))(*map(_value, arguments))
        case ast.UnaryOp(op=sign, operand=operand):
            return _OPERATORS[type(sign)](_value(operand))
        case ast.BinOp(op=sign, left=left, right=right) | ast.Compare(ops=[sign], left=left, comparators=[right]):
            return _OPERATORS[type(sign)](_value(left), _value(right))
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
            kind = {ast.Tuple: tuple, ast.List: list, ast.Set: set}[type(node)]
            return kind(map(_value, elements))
    raise ValueError(f"{type(node).__name__} has no place in a formula")


@cache
def _names() -> Mapping[str, Any]:
    """SymPy's constants and functions. What else SymPy exports can run code or write files, and is taken for a symbol."""
    exported = {name: getattr(sympy, name) for name in sympy.__all__}
    functions = {name: thing for name, thing in exported.items() if isinstance(thing, type) and issubclass(thing, sympy.Function)}
    constants = {name: thing for name, thing in exported.items() if isinstance(thing, sympy.Basic)}
    return {**functions, **constants, **{name: exported[name] for name in _PLAIN_FUNCTIONS}, "max": sympy.Max, "min": sympy.Min}


def _log10(formula: Any) -> float:
    """An upper bound of the decimal logarithm of the largest whole number in `formula` once it is worked out; symbols count for nothing."""
    if isinstance(formula, sympy.Rational):
        return math.log10(max(abs(int(formula.p)), int(formula.q)))
    if isinstance(formula, sympy.Float):
        return abs(math.log10(abs(float(formula)) or 1))
    parts = [_log10(part) for part in getattr(formula, "args", ())]
    if isinstance(formula, sympy.Pow):
        return parts[0] * 10 ** min(parts[1], _EXPONENT_CAP)
    if isinstance(formula, sympy.Add):
        return max(parts) + math.log10(len(parts))
    if isinstance(formula, sympy.Mul):
        return sum(parts)
    if str(type(formula).__module__).startswith(_COMBINATORIAL):
        return max(parts) * 10 ** min(max(parts), _EXPONENT_CAP)
    return max(parts, default=0.0)
