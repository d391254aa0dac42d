"""The three readers that the paper's harness tries one after the other on a formula, each as it is and with doubled backslashes halved.

1. SymPy's LaTeX reader. It reads the longest start that makes sense and ignores the rest: of "1,-2" it reads 1, of "5;7" it reads 5.
2. SymPy's reader of Python expressions, for what the first one refuses: tuples, lists, sets, powers written `**`. The harness lets it
   evaluate whatever the model wrote; here only expressions are evaluated that build numbers, symbols, functions and collections.
3. A LaTeX reader with lists, matrices, and units as symbols. The harness carries its own copy; the nearest published one is used here, kept
   to what the copy understands.
"""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from importlib.util import find_spec, module_from_spec
from itertools import accumulate
from types import ModuleType
from typing import Any

import antlr4
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from sympy.parsing.latex._antlr.latexlexer import LaTeXLexer
from sympy.parsing.latex._antlr.latexparser import LaTeXParser

from structcot.grading.paper_expression import read_expression

# The harness gives a comparison three seconds, in which its readers do not come to the end of longer formulas.
MAX_TOKENS = 500
MAX_CHARACTERS = 20_000
MAX_MATRIX_CHARACTERS = 600
# What no reader knows.
_CUT = "\0"
_ROW_END = "\\\\"

_CONVERSION = ConversionConfig(
    interpret_as_mixed_fractions=False,
    interpret_simple_eq_as_assignment=True,
    interpret_contains_as_eq=False,
    lowercase_symbols=False,
)
_STEPS = {**dict.fromkeys("([{", 1), **dict.fromkeys(")]}", -1), ",": 0, ";": 0}
_BRACKET_OR_COMMA = re.compile(r"[()\[\]{},;]")
_BLANKS = re.compile(r"\\displaystyle|\\q?quad|~|\\,|\$")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
_FALLING_FACTORIAL = re.compile(r"\(([a-zA-Z0-9+\-*/\\ ]+?)\)_{([a-zA-Z0-9+\-*/\\ ]+?)}")
_SEVERAL_ARGUMENTS = re.compile(r"\\(?:max|min|gcd|lcm)(?![a-zA-Z])|operatorname")
_SYMBOL = re.compile(r"\s*(?:\\[a-zA-Z]+|[a-zA-Z])(?:_(?:\{\w+\}|\w))?\s*|\s*\{\s*[a-zA-Z]\s*\}\s*")
# What the published reader understands and the harness's copy does not.
_NEWER = re.compile(
    r"\\(?:boxed|cfrac|cup|cap|setminus|mathbb|text[a-z]+|mbox|pm|mp|degree|circ|lor|land|l?dots|approx)(?![a-zA-Z])"
    r"|\\frac\s*[^\s{]|\\mathrm\s*\{[~\s]*\}|\d_|[<>!]=|(?<!\\)%"
)


class _Lexer(LaTeXLexer):
    """SymPy's lexer, up to `MAX_TOKENS`, under any antlr runtime that reads its tables (4.10 and later)."""

    num_tokens = 0

    def checkVersion(self, toolVersion: str) -> None:
        """Say nothing of a newer runtime."""

    def nextToken(self) -> Any:
        """The next token.

        Raises:
            ValueError: after `MAX_TOKENS`.
        """
        self.num_tokens += 1
        if self.num_tokens > MAX_TOKENS:
            raise ValueError(f"more than {MAX_TOKENS} tokens")
        return super().nextToken()


class _Parser(LaTeXParser):
    """SymPy's LaTeX grammar under any antlr runtime that reads its tables."""

    def checkVersion(self, toolVersion: str) -> None:
        """Say nothing of a newer runtime."""


def parse(text: str) -> Any:
    """What the first reader that understands `text` reads; `text` itself where none does."""
    forms = dict.fromkeys((text.replace(_ROW_END, "\\"), text))
    for read in (read_latex, read_expression, read_matrices):
        for form in forms:
            # Readers fail with anything, also the bare Exception; to the harness each failure only means "the next one".
            with suppress(Exception):
                return read(form)
    return text


def read_latex(text: str) -> Any:
    """Read the longest start of `text` that SymPy takes for LaTeX; fails where there is none."""
    reader = _sympy_reader()
    listener = reader.MathErrorListener(text)
    lexer = _Lexer(antlr4.InputStream(text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + _CUT))
    parser = _Parser(antlr4.CommonTokenStream(lexer))
    for recognizer in (lexer, parser):
        recognizer.removeErrorListeners()
        recognizer.addErrorListener(listener)
    return reader.convert_relation(parser.math().relation())


@cache
def _sympy_reader() -> ModuleType:
    """A copy of SymPy's module that reads derivatives by `read_latex`: SymPy's own function insists on one version of the antlr runtime.

    Raises:
        ImportError: if SymPy has no such module.
    """
    spec = find_spec("sympy.parsing.latex._parse_latex_antlr")
    if spec is None or spec.loader is None:
        raise ImportError("SymPy has no LaTeX reader made by antlr")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["parse_latex"] = read_latex
    return module


def read_matrices(text: str) -> Any:
    """Read a formula with matrices, or a list of formulas with or without square or curly brackets.

    Raises:
        ValueError: if it is too long, or holds what the harness's copy of this reader refuses.
    """
    if len(text) > MAX_MATRIX_CHARACTERS or not text.isascii() or _NEWER.search(text):
        raise ValueError("not for this reader")
    text = text if r"\begin" in text else text.partition(_ROW_END)[0]
    text = _FALLING_FACTORIAL.sub(r"\\frac{(\1)!}{((\1)-(\2))!}", text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac"))
    text = _BLANKS.sub(" ", text.replace("{~", "{")).strip()
    parts = _parts(_THOUSANDS.sub("", text))
    if any("," in part and not _SEVERAL_ARGUMENTS.search(part) for part in parts):
        raise ValueError("a tuple")
    if any("=" in part and not _SYMBOL.fullmatch(part.partition("=")[0]) for part in parts):
        raise ValueError("an equation, which the harness's copy solves or fails on")
    formulas = [latex2sympy(part, normalization_config=None, conversion_config=_CONVERSION) for part in parts]
    return formulas if len(formulas) > 1 else formulas[0]


def _parts(text: str) -> list[str]:
    """Split a list at the commas and semicolons outside of brackets; of a list in square or curly brackets that opens `text`, only that."""
    if text[:1] in ("[", "{"):
        inner = _split(text[1 : _closing(text)])
        if len(inner) > 1:
            return inner
    return _split(text)


def _split(text: str) -> list[str]:
    depth, start, parts = 0, 0, []
    for mark in _BRACKET_OR_COMMA.finditer(text):
        depth += _STEPS[mark[0]]
        if not _STEPS[mark[0]] and not depth:
            parts.append(text[start : mark.start()])
            start = mark.end()
    return [*parts, text[start:]]


def _closing(text: str) -> int:
    """Where the bracket that opens `text` closes.

    Raises:
        ValueError: if it never does, or with another kind of bracket.
    """
    marks = list(_BRACKET_OR_COMMA.finditer(text))
    place = list(accumulate(_STEPS[mark[0]] for mark in marks)).index(0)
    if marks[place][0] != {"[": "]", "{": "}"}[text[0]]:
        raise ValueError("the brackets do not match")
    return marks[place].start()
