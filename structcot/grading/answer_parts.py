r"""The structure of an answer: lists, tuples, sets, intervals, unions, matrices, relations, ratios, and in them what has one value.

Structure is read from brackets and separators alone and decides what may be equal to what; values are compared elsewhere, one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from structcot.grading.answer_text import plain

_SCAN = re.compile(r"\\begin\{[^{}]*\}|\\end\{[^{}]*\}|\\\\|\\[A-Za-z]+|\\.|\b(?:and|or)\b|<>|[^\\]", re.DOTALL)
_OPEN = frozenset(("(", "[", "{", "\\{", "\\lfloor", "\\lceil", "\\langle"))
_CLOSE = frozenset((")", "]", "}", "\\}", "\\rfloor", "\\rceil", "\\rangle"))
_RELATIONS = {"=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\in": "in", "\\approx": "~", "\\to": "->"}
_REVERSED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_CONNECTIVE = re.compile(r"\\text\{\s*,?\s*(and|or)\s*\}")
_ALL_WORDS = re.compile(r"\\text\{([^{}]*)\}")
_MATRIX = re.compile(r"\\begin\{([pbvVB]?(?:small)?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", re.DOTALL)
_FRENCH = re.compile(r"(\]|\[)([^\[\]]*)(\]|\[)")
_ACCENTED = r"\\(?:overline|vec|hat|bar|widehat|overrightarrow|angle|triangle)\s*(?:\{[^{}]*\}|[A-Za-z]+)"
_NAME = rf"(?:\\?[A-Za-z]+'*|\\text\{{[^{{}}]*\}}|{_ACCENTED})"
_SUBSCRIPT = r"(?:\s*_\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\?[A-Za-z0-9]+)|\s*\^\s*\{?\s*(?:\\prime|\\ast|\*|')\s*\}?)*"
_CALL = r"(?:\s*\([^()=]*\))?"
_ONE_NAME = rf"\|?\s*{_NAME}{_SUBSCRIPT}{_CALL}\s*\|?"
_NAME_PATTERN = re.compile(rf"\s*(?:{_ONE_NAME}(?:\s*:\s*{_ONE_NAME})*|\(\s*{_ONE_NAME}(?:\s*,\s*{_ONE_NAME})*\s*\))\s*")
_DERIVATIVE = re.compile(r"\\frac\s*\{\s*(?:d|\\partial)\b[^{}=]*\}\s*\{\s*(?:d|\\partial)[^{}=]*\}|\\frac\s*\{d[^{}=]*\}\s*\{d[^{}=]*\}")
_NO_NAME = frozenset(("\\frac", "\\sqrt", "\\sin", "\\cos", "\\tan", "\\log", "\\ln"))
_TIME = re.compile(r"\d{1,2}:\d\d(?::\d\d)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of an answer. `kind` is scalar, list, tuple, set, union, matrix, relation or ratio.

    `brackets` are those of a tuple or interval, such as "[)"; `signs` stand between the sides of a relation; a matrix has `width` columns.
    """

    kind: str
    text: str
    items: tuple[Part, ...] = ()
    brackets: str = ""
    signs: tuple[str, ...] = ()
    width: int = 0

    @property
    def is_assignment(self) -> bool:
        """Whether it gives a value to a name: x = 5, but not x + y = 5."""
        return self.kind == "relation" and self.signs[0] in ("=", "in", "~") and len(self.items) == 2 and is_name(self.items[0].text)


def is_name(text: str) -> bool:
    """Whether a text names what the answer is: a symbol, a function of symbols, a tuple or a ratio of names."""
    if _DERIVATIVE.fullmatch(text.strip()):
        return True
    return bool(_NAME_PATTERN.fullmatch(text)) and not any(name in text for name in _NO_NAME)


def read_part(text: str) -> Part:
    """Read the structure of a tidied answer."""
    text = _unwrapped(_CONNECTIVE.sub(r" \1 ", text).strip())
    if words := _ALL_WORDS.fullmatch(text):
        text = words[1].strip()
    for read in (_known_set, _separated, _united, _related, _bracketed, _matrix, _ratio, _plus_or_minus):
        part = read(text)
        if part:
            return part
    return Part(kind="scalar", text=text)


def split_top(text: str, separators: frozenset[str]) -> list[tuple[str, str]]:
    """Cut a text at separators outside all brackets: pairs of a separator, "" for the first, and the piece behind it."""
    pieces: list[tuple[str, str]] = []
    depth, start, separator = 0, 0, ""
    for match in _SCAN.finditer(text):
        token = match[0]
        if token in _OPEN or token.startswith("\\begin"):
            depth += 1
        elif token in _CLOSE or token.startswith("\\end"):
            depth = max(0, depth - 1)
        elif not depth and token in separators:
            pieces.append((separator, text[start : match.start()].strip()))
            start, separator = match.end(), token
    return [*pieces, (separator, text[start:].strip())]


def items_of(part: Part) -> tuple[Part, ...]:
    """The elements of a list or set; anything else is the one element of itself."""
    return part.items if part.kind in ("list", "set") else (part,)


def reversed_relation(part: Part) -> Part:
    """The same relation read from right to left."""
    return replace(part, items=part.items[::-1], signs=tuple(_REVERSED.get(sign, sign) for sign in part.signs[::-1]))


def _unwrapped(text: str) -> str:
    """A text without braces or redundant marks around all of it."""
    text = text.strip().rstrip(".,;:").strip() if not re.search(r"\d\.$", text) else text.strip().rstrip(".").strip()
    while text.startswith("{") and _closes_at_end(text):
        text = text[1:-1].strip()
    return text


def _closes_at_end(text: str) -> bool:
    """Whether the bracket that a text starts with closes at its very end."""
    depth = 0
    for match in _SCAN.finditer(text):
        depth += (match[0] in _OPEN or match[0].startswith("\\begin")) - (match[0] in _CLOSE or match[0].startswith("\\end"))
        if depth <= 0:
            return match.end() == len(text) and depth == 0
    return False


def _known_set(text: str) -> Part | None:
    """The empty set and the real line, by their names."""
    name = plain(text).replace(" ", "").casefold()
    if name in ("\\emptyset", "\\{\\}"):
        return Part(kind="set", text="\\{\\}")
    if name in ("\\mathbb{r}", "allrealnumbers", "allreals", "realnumbers"):
        ends = tuple(Part(kind="scalar", text=f"{sign}\\infty") for sign in ("-", ""))
        return Part(kind="tuple", text="(-\\infty,\\infty)", items=ends, brackets="()")
    return None


def _pieces(text: str, *separators: str) -> list[str]:
    return [piece for _, piece in split_top(text, frozenset(separators)) if piece]


def _separated(text: str) -> Part | None:
    """A list: separated by semicolons, and, or, line ends; in each piece by commas. Pieces of several assignments are tuples."""
    if _FRENCH.fullmatch(text):
        return None
    pieces = _pieces(text, ";", "and", "or", "\\\\")
    if len(pieces) > 1:
        rows = [_pieces(piece, ",") for piece in pieces]
        widths = {len(row) for row in rows}
        if len(widths) == 1 and widths != {1} and all("=" in cell for row in rows for cell in row):
            tuples = (
                Part(kind="tuple", text=piece, items=tuple(map(read_part, row)), brackets="()")
                for piece, row in zip(pieces, rows, strict=True)
            )
            return Part(kind="list", text=text, items=tuple(tuples))
        pieces = [cell for row in rows for cell in row]
    else:
        pieces = _pieces(text, ",")
    if len(pieces) < 2:
        return None
    return Part(kind="list", text=text, items=tuple(_flat(map(read_part, pieces))))


def _flat(parts: Iterator[Part]) -> Iterator[Part]:
    """Take the two values of a plus-or-minus into the list that holds it."""
    for part in parts:
        if part.kind == "list":
            yield from part.items
        elif part.is_assignment and part.items[1].kind == "list":
            yield from part.items[1].items
        else:
            yield part


def _united(text: str) -> Part | None:
    pieces = [piece for _, piece in split_top(text, frozenset(("\\cup",)))]
    if len(pieces) < 2:
        return None
    head = split_top(pieces[0], frozenset(("=", "\\in")))
    pieces[0] = head[-1][1]
    items = tuple(map(read_part, pieces))
    if all(item.kind == "set" for item in items):
        return Part(kind="set", text=text, items=tuple(element for item in items for element in item.items))
    return Part(kind="union", text=text, items=items)


def _related(text: str) -> Part | None:
    """A relation; of a chain of equations its first name and its last value, and nothing of what is only approximate."""
    pieces = split_top(text, frozenset(_RELATIONS))
    if len(pieces) < 2:
        return None
    sides, signs = _whole_sides([side for _, side in pieces], [_RELATIONS[sign] for sign, _ in pieces[1:]])
    if len(sides) > 2 and set(signs) <= {"=", "~"}:
        sides, signs = [*(sides[:1] if is_name(sides[0]) else []), sides[-1]], ["="]
    if len(sides) == 2 and signs == ["="]:
        if _is_numeric(sides[0]) and _is_numeric(sides[1]):
            sides = sides[1:]
        elif is_name(sides[1]) and not is_name(sides[0]):
            sides = sides[::-1]
    if len(sides) == 1:
        return read_part(sides[0])
    return Part(kind="relation", text=text, items=tuple(map(read_part, sides)), signs=tuple(signs))


def _whole_sides(sides: list[str], signs: list[str]) -> tuple[list[str], list[str]]:
    """The sides of a relation without empty ones at its ends, and without an approximation of what stands before it."""
    if signs[-1] == "~" and sides[0] and not (len(sides) == 2 and is_name(sides[0])):
        sides, signs = sides[:-1], signs[:-1]
    if not sides[0]:
        sides, signs = sides[1:], signs[1:]
    if len(sides) > 1 and not sides[-1]:
        sides, signs = sides[:-1], signs[:-1]
    return sides, signs


def _is_numeric(text: str) -> bool:
    """Whether an expression has no letters but those of commands."""
    return not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text))


def _bracketed(text: str) -> Part | None:
    """A tuple, an interval or a set; brackets around one thing are that thing."""
    if (match := _FRENCH.fullmatch(text)) and match[1] + match[3] != "[]" and len(_pieces(match[2], ",", ";")) == 2:
        return _inside(match[2], ("(" if match[1] == "]" else "[") + (")" if match[3] == "[" else "]"))
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _closes_at_end(text):
        return _inside(text[1:-1], text[0] + text[-1])
    if text.startswith("\\langle") and text.endswith("\\rangle"):
        return _inside(text[len("\\langle") : -len("\\rangle")], "()")
    if text.startswith("\\{") and text.endswith("\\}") and _closes_at_end(text):
        return _set(text, text[2:-2].strip())
    return None


def _set(text: str, inside: str) -> Part | None:
    """A set of elements, or the condition that describes one: {x : x > 2}."""
    described = _pieces(inside, "|", ":")
    if len(described) > 1:
        condition = read_part(described[1])
        return condition if len(described) == 2 and condition.kind == "relation" else None
    return Part(kind="set", text=text, items=tuple(_flat(map(read_part, _pieces(inside, ",", ";")))))


def _inside(inside: str, brackets: str) -> Part | None:
    """What brackets hold: a tuple or an interval, or one part that is more than a single expression."""
    pieces = _pieces(inside, ",", ";")
    if len(pieces) > 1:
        text = f"{brackets[0]}{inside}{brackets[1]}"
        return Part(kind="tuple", text=text, items=tuple(map(read_part, pieces)), brackets=brackets)
    inner = read_part(inside)
    return inner if inner.kind != "scalar" or "=" in inside else None


def _matrix(text: str) -> Part | None:
    match = _MATRIX.fullmatch(text)
    if not match or "\\begin" in match[2]:
        return None
    rows = [[cell.strip() for cell in row.split("&")] for row in match[2].split("\\\\") if row.strip()]
    if not rows or len({len(row) for row in rows}) != 1:
        return None
    cells = tuple(read_part(cell) for row in rows for cell in row)
    return Part(kind="matrix", text=text, items=cells, width=len(rows[0]), brackets="|" if match[1].startswith("v") else "")


def _ratio(text: str) -> Part | None:
    pieces = _pieces(text, ":")
    if len(pieces) < 2 or _TIME.fullmatch(text.replace(" ", "")) or plain(text) != text:
        return None
    return Part(kind="ratio", text=text, items=tuple(map(read_part, pieces)))


def _plus_or_minus(text: str) -> Part | None:
    if "\\pm" not in text or "=" in text:
        return None
    plus, minus = (re.sub(r"\\mp(?![a-z])", other, re.sub(r"\\pm(?![a-z])", sign, text)) for sign, other in (("+", "-"), ("-", "+")))
    return Part(kind="list", text=text, items=tuple(Part(kind="scalar", text=one.strip()) for one in (plus, minus)))
