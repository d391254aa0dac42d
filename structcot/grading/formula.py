r"""Formulas as trees: what a line of LaTeX, or of plain notation such as `2*sqrt(3)/x`, says by the rules of school algebra.

Only what has a value is read: numbers, symbols, the four operations, powers, roots, functions, factorials, binomials, absolute values,
floors and ceilings. Anything else, an integral or a relation, is refused, so that nobody compares half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from structcot.grading.answer_text import FUNCTIONS
from structcot.grading.formula_tokens import NotAFormula, number_of, tokens_of

MAX_LENGTH, MAX_DEPTH = 2000, 40

_ACCENT_NAMES = "overline underline vec hat bar tilde dot ddot widehat widetilde overrightarrow text"
_REFUSED_NAMES = """
    int iint oint sum prod lim begin end cup cap in to ldots setminus bmod pmod mod forall exists pm mp le ge ne approx equiv mapsto
    emptyset subset subseteq boxed sim
"""
_ACCENTS = frozenset(f"\\{name}" for name in _ACCENT_NAMES.split())
_REFUSED = frozenset(f"\\{name}" for name in _REFUSED_NAMES.split())
_TIMES, _OVER = frozenset(("*", "\\cdot", "\\times", "\\ast")), frozenset(("/", "\\div"))
_BRACKETS = {"(": ")", "[": "]", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "{": "}"}
_NAMED = {"\\lfloor": "floor", "\\lceil": "ceil"}


@dataclass(frozen=True, slots=True)
class Node:
    """An operation and its arguments. A "number" has its exact value, a "symbol" its name."""

    operation: str
    arguments: tuple[Node, ...] = ()
    name: str = ""
    value: Fraction = Fraction(0)


def read_formula(text: str) -> Node:
    """Read a tidied text as one formula.

    Raises:
        NotAFormula: if it is none, or is too long or nested too deeply.
    """
    if len(text) > MAX_LENGTH:
        raise NotAFormula(f"longer than {MAX_LENGTH:,} characters")
    reader = _Reader(tokens_of(text))
    node = reader.sum()
    if reader.next:
        raise NotAFormula(f'cannot read "{reader.next}"')
    return node


class _Reader:
    """A recursive-descent reader of tokens; each method reads one level of precedence."""

    def __init__(self, tokens: Sequence[str]):
        self.tokens, self.position, self.depth, self.open_bars = tokens, 0, 0, 0

    @property
    def next(self) -> str:
        """The token that comes next, "" at the end."""
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        """Go on by one token, which must be `wanted` if that is given."""
        token = self.next
        if not token or (wanted and token != wanted):
            raise NotAFormula(f'{wanted or "more"} expected, got "{token}"' if token else "ends too early")
        self.position += 1
        return token

    def sum(self) -> Node:
        """Terms with plus and minus between them."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotAFormula(f"nested more than {MAX_DEPTH} deep")
        node = self.product()
        while self.next in ("+", "-"):
            sign = self.take()
            term = self.product()
            node = Node("+", (node, term if sign == "+" else Node("neg", (term,))))
        self.depth -= 1
        return node

    def product(self) -> Node:
        """Factors beside each other or with a sign between them, from left to right: 1/2x is a half of x."""
        if self.next in ("+", "-"):
            signs = 0
            while self.next in ("+", "-"):
                signs += self.take() == "-"
            node = self.product()
            return Node("neg", (node,)) if signs % 2 else node
        node = self.power()
        while True:
            if self.next in _TIMES:
                self.take()
                node = Node("*", (node, self.signed_power()))
            elif self.next in _OVER:
                self.take()
                node = Node("/", (node, self.signed_power()))
            elif self.starts_factor():
                node = self.beside(node, self.power())
            else:
                return node

    @staticmethod
    def beside(left: Node, right: Node) -> Node:
        """Two factors side by side: a product, but 1 and 1/2 beside each other are a mixed number. Two numbers are a mistake."""
        if left.operation == "number" and right.operation == "number":
            raise NotAFormula("two numbers side by side")
        if left.operation == "number" and right.operation == "frac" and left.value.denominator == 1:
            above, below = right.arguments
            if above.operation == below.operation == "number" and above.value < below.value:
                return Node("+", (left, right))
        return Node("*", (left, right))

    def starts_factor(self) -> bool:
        """Whether what comes next is a factor without a sign before it."""
        token = self.next
        if token == "|":
            return not self.open_bars
        if token.startswith("\\"):
            return token not in _REFUSED and token not in ("\\rfloor", "\\rceil", "\\}", "\\|")
        return bool(token) and (token[0].isalnum() or token[0] in "({[.")

    def signed_power(self) -> Node:
        """A factor that may have a sign, as behind a times."""
        if self.next in ("+", "-"):
            return Node("neg", (self.signed_power(),)) if self.take() == "-" else self.signed_power()
        return self.power()

    def power(self) -> Node:
        """A base with what stands behind it: exponent, factorial, primes, degrees."""
        base = self.atom()
        while self.next[:1] in ("!", "'", "^") or self.next == "**":
            token = self.take()
            if token == "!":
                base = Node("factorial", (base,))
            elif token[0] == "'":
                base = self.primed(base, token)
            elif self.next in ("\\prime", "\\ast"):
                base = self.primed(base, self.take())
            elif self.next == "\\circ":
                self.take()
                base = Node("degree", (base,))
            elif self.tokens[self.position : self.position + 3] in (["{", "\\prime", "}"], ["{", "\\circ", "}"]):
                base = Node("degree", (base,)) if self.tokens[self.position + 1] == "\\circ" else self.primed(base, "\\prime")
                self.position += 3
            else:
                exponent = self.exponent()
                if self.next == "_" and base.operation == "symbol":
                    base = Node("symbol", name=base.name + self.subscript())
                return Node("^", (base, exponent))
        return base

    @staticmethod
    def primed(base: Node, mark: str) -> Node:
        """A symbol with primes, which is another symbol."""
        if base.operation != "symbol":
            raise NotAFormula("a prime behind what is no symbol")
        return Node("symbol", name=base.name + mark.replace("\\prime", "'"))

    def exponent(self) -> Node:
        """What stands behind ^: a group, or a signed factor, itself with an exponent in plain notation such as 2^2^3."""
        if self.next == "{":
            return self.postfixed(self.group())
        if self.next in ("+", "-"):
            return Node("neg", (self.exponent(),)) if self.take() == "-" else self.exponent()
        return self.power()

    def postfixed(self, node: Node) -> Node:
        """A braced exponent ends there, unless another exponent follows, as in x^{2}^{3}, which has no meaning."""
        if self.next == "^":
            raise NotAFormula("two exponents")
        return node

    def group(self) -> Node:
        """One argument of a command: what braces hold, or one token; of a number its first digit, as TeX reads it."""
        if self.next == "{":
            self.take()
            node = self.inside("}")
            return node
        token = self.next
        if token[:1].isdigit() and len(token) > 1:
            self.tokens = [*self.tokens[: self.position], token[0], token[1:], *self.tokens[self.position + 1 :]]
        return self.atom()

    def inside(self, closing: str) -> Node:
        """A formula up to its closing bracket; bars opened outside do not close inside."""
        bars, self.open_bars = self.open_bars, 0
        node = self.sum()
        self.take(closing)
        self.open_bars = bars
        return node

    def atom(self) -> Node:
        """A number, a symbol, a command, or what brackets hold."""
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return Node("number", value=number_of(token))
        if token in _BRACKETS:
            node = self.inside(_BRACKETS[token])
            return Node(_NAMED[token], (node,)) if token in _NAMED else node
        if token == "|":
            self.open_bars += 1
            node = self.sum()
            self.take("|")
            self.open_bars -= 1
            return Node("abs", (node,))
        if token.isalpha():
            return Node("symbol", name=token + self.subscript())
        if token.startswith("\\") and token not in _REFUSED:
            return self.command(token)
        raise NotAFormula(f'cannot read "{token}"')

    def command(self, token: str) -> Node:
        """A command with its arguments; one that is not known is a symbol."""
        name = token[1:]
        if name == "frac":
            return Node("frac", (self.group(), self.group()))
        if name == "binom":
            return Node("binom", (self.group(), self.group()))
        if name == "sqrt":
            return self.root()
        if token in _ACCENTS:
            return Node("symbol", name=f"{name}({self.raw_group()}){self.subscript()}")
        if name in FUNCTIONS:
            return self.function(name)
        if not name.isalpha():
            raise NotAFormula(f'cannot read "{token}"')
        return Node("symbol", name=token + self.subscript())

    def root(self) -> Node:
        """A root; the brackets of sqrt(2) hold its argument too."""
        degree = Node("number", value=Fraction(2))
        if self.next == "[":
            self.take()
            degree = self.inside("]")
        if self.next == "(":
            self.take()
            return Node("root", (self.inside(")"), degree))
        return Node("root", (self.group(), degree))

    def function(self, name: str) -> Node:
        """A function of what stands in brackets behind it, else of the product behind it, up to the next function."""
        base = exponent = None
        while self.next in ("_", "^"):
            if self.take() == "_":
                base = self.group()
            else:
                exponent = self.exponent()
        argument = self.argument()
        if name == "log" and base:
            node = Node("/", (Node("ln", (argument,)), Node("ln", (base,))))
        elif base:
            raise NotAFormula(f"{name} with a subscript")
        elif exponent and exponent == Node("neg", (Node("number", value=Fraction(1)),)) and name in ("sin", "cos", "tan"):
            return Node(f"arc{name}", (argument,))
        else:
            node = Node(name, (argument,))
        return Node("^", (node, exponent)) if exponent else node

    def argument(self) -> Node:
        """The argument of a function: sin 2x y is sin(2xy), but sin(2x) y is sin(2x) times y."""
        if self.next in ("(", "{", "["):
            return self.inside(_BRACKETS[self.take()])
        node = self.signed_power()
        while self.starts_factor() and self.next[1:] not in FUNCTIONS and self.next not in ("(", "["):
            node = self.beside(node, self.power())
        if self.next == "/" and self.position + 1 < len(self.tokens) and self.tokens[self.position + 1][0].isdigit():
            self.take()
            node = Node("/", (node, self.power()))
        return node

    def subscript(self) -> str:
        """A subscript as part of a name."""
        if self.next != "_":
            return ""
        self.take()
        return f"_{self.raw_group()}"

    def raw_group(self) -> str:
        """The tokens of a group as text, for the names of symbols."""
        if self.next != "{":
            return self.take()
        self.take()
        depth, parts = 1, []
        while depth:
            token = self.take()
            depth += {"{": 1, "}": -1}.get(token, 0)
            parts.append(token)
        return "".join(part for part in parts if part not in ("{", "}", "\\text"))
