r"""The plain form to which the paper's harness brings every answer before it compares, with all that is lost on the way.

What it loses on purpose or by accident, kept here as it is:

- units wherever they stand as words ("5 m" becomes "5"), also letters that are no units (see `paper_units`);
- a `\text{...}` at the end, with everything from the first `\text{` on; number words inside one become digits;
- the square of "cm" and "inches", the ending "thgrade", percent and dollar signs, degrees;
- the name in front of an equals sign, if it is at most two characters long; `x=` and the like anywhere;
- decimals that are zero: "1.0x" becomes "1x", and "3.)" becomes "3)";
- the word "and" inside other words, `j` for `i`, "inf" for infinity;
- the order of a list of integers without brackets, which is sorted; integers too long for Python become "-1,-1";
- the whole sentence, if a word of it is a number word: then only the number stays (see `paper_words`).
"""

from __future__ import annotations

import re

from structcot.grading.paper_units import without_units
from structcot.grading.paper_words import number_of_words

Replacements = tuple[tuple[str, str], ...]

_ARRAY = re.compile(r"\\begin\{array\}\{[^}]*\}")
_SPELLINGS: Replacements = (
    (r"\end{array}", r"\end{pmatrix}"),
    ("bmatrix", "pmatrix"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    (r"\neq", r"\ne"),
    (r"\leq", r"\le"),
    (r"\geq", r"\ge"),
    (r"\left", ""),
    (r"\right", ""),
    (r"\{", "{"),
    (r"\}", "}"),
)
_WORD_IN_TEXT = re.compile(r"\\text\{([a-zA-Z]+)\}")
_SQUARED_UNIT = re.compile(r"(cm|inches)\}\^2")
_SIGNS: Replacements = ((r"^{\circ}", ""), (r"^\circ", ""), (r"\$", ""), ("$", ""), (r"\(", ""), (r"\)", ""))
_NAMES_AND_SIGNS: Replacements = (
    *((letter + sign, "") for sign in ("=", r"\in", r"\to") for letter in "xyz"),
    (r"\emptyset", "{}"),
    (r"(-\infty,\infty)", r"\mathbb{R}"),
    (r"\%", ""),
    ("%", ""),
    (" .", " 0."),
    ("{.", "{0."),
    ("infinity", r"\infty"),
)
_LATE_WORDS: Replacements = ((r"+\inity", r"\infty"), ("and", ""), (r"\mathbf", ""))
# A match begins with its digits, so that a long run of them is read once.
_ZERO_DECIMALS = re.compile(r"(?<!\d)(\d+)\.0*([^\d])")
_ZERO_DECIMALS_AT_END = re.compile(r"(?<!\d)(\d+)\.0*$")
_BARE_ROOT = re.compile(r"\\sqrt(\w+)")
_STRAY_BACKSLASH = re.compile(r"\\(?=-?\d+(\\|\)|,|\]|$))")
_INTEGERS = re.compile(r"(\s*-?\d+\s*,)*\s*-?\d+\s*")
_INTEGERS_TOO_LONG = "-1,-1"
_GRADE = "thgrade"
_LONGEST_NAME = 2


def strip_string(text: str, *, keep_units: bool = False) -> str:
    """Bring an answer to the harness's plain form."""
    text = text.strip().replace("\n", "").rstrip(".").replace(r"\!", "")
    text = _replace(_ARRAY.sub(lambda _: r"\begin{pmatrix}", text), _SPELLINGS)
    text = _SQUARED_UNIT.sub(r"\1}", _WORD_IN_TEXT.sub(_digits_of_word, text))
    text = _without_text_at_end(text)
    text = text if keep_units else without_units(text)
    text = number_of_words(_replace(text, _SIGNS))
    text = _replace(_unwrap(text, r"\text{", keep=True), _NAMES_AND_SIGNS)
    text = text if r"\infty" in text else text.replace("inf", r"\infty")
    text = _unwrap(_replace(text, _LATE_WORDS), r"\mbox{", keep=False)
    text = text.replace("j", "i") if "i" not in text else text
    text = _ZERO_DECIMALS_AT_END.sub(r"\1", _ZERO_DECIMALS.sub(r"\1\2", text))
    return _in_latex(text) if text else text


def _in_latex(text: str) -> str:
    """The second half: drop a short name, write roots and fractions with braces, sort integers."""
    text = "0" + text if text[0] == "." else text
    if text.count("=") == 1 and text.index("=") <= _LONGEST_NAME:
        text = text.partition("=")[2]
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text).replace(" ", "")
    text = _STRAY_BACKSLASH.sub("", _slash_as_fraction(_braced_fractions(text)))
    return _sorted_integers(text.removesuffix(_GRADE))


def _replace(text: str, table: Replacements) -> str:
    for old, new in table:
        text = text.replace(old, new)
    return text


def _digits_of_word(match: re.Match[str]) -> str:
    word = match[1].lower()
    number = number_of_words(word)
    return match[0] if number == word else number


def _without_text_at_end(text: str) -> str:
    r"""Cut an answer that ends in a brace at its first `\text{`, wherever that is, unless nothing is left."""
    start = text.find(r"\text{")
    cut = text[:start] if 0 <= start < len(text) - len(r"\text{") and text.endswith("}") else text
    return cut.strip() or text


def _unwrap(text: str, opening: str, *, keep: bool) -> str:
    """Take away each `opening` with the next closing brace, and what stands between them unless `keep`."""
    pieces, position = [], 0
    while 0 <= (start := text.find(opening, position)) < (end := text.find("}", start)):
        pieces += [text[position:start], text[start + len(opening) : end] if keep else ""]
        position = end + 1
    return "".join(pieces) + text[position:]


def _braced_fractions(text: str) -> str:
    r"""Put braces around the two characters after each bare `\frac`; leave everything as it is where one of them is missing."""
    head, *tails = text.split(r"\frac")
    if any(len(tail) < 2 and tail[:1] != "{" for tail in tails):
        return text
    return head + "".join(r"\frac" + _braced(tail) for tail in tails)


def _braced(tail: str) -> str:
    if tail[0] == "{":
        return tail
    lower = tail[1:] if tail[1] == "{" else f"{{{tail[1]}}}{tail[2:]}"
    return f"{{{tail[0]}}}{lower}"


def _slash_as_fraction(text: str) -> str:
    """Write a/b as a fraction where both are integers in their shortest form, or hold a root."""
    upper, slash, lower = text.partition("/")
    if not slash or "/" in lower:
        return text
    if all("sqrt" in part or _is_shortest_integer(part) for part in (upper, lower)):
        return rf"\frac{{{upper}}}{{{lower}}}"
    return text


def _is_shortest_integer(text: str) -> bool:
    try:
        return str(int(text)) == text
    except ValueError:
        return False


def _sorted_integers(text: str) -> str:
    if not _INTEGERS.fullmatch(text):
        return text
    try:
        return ",".join(map(str, sorted(map(int, text.split(",")))))
    except ValueError:
        return _INTEGERS_TOO_LONG
