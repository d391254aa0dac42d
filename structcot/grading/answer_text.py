r"""Answers in one notation: what only typesets is taken out of LaTeX and plain text, and what has many spellings gets one."""

from __future__ import annotations

import re

_FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp"
_SMALL_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega"
_LARGE_GREEK = "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
_OTHER_COMMANDS = """
    varepsilon vartheta varphi varrho hbar ell infty frac sqrt binom text cdot times div ast pm mp le ge ne approx equiv sim in notin cup
    cap setminus to ldots lfloor rfloor lceil rceil begin end circ prime triangle angle overline underline vec hat bar tilde dot ddot mathbb
    int sum prod lim boxed odot partial nabla perp parallel max min gcd det emptyset iff deg langle rangle dim sup inf subset subseteq iint
    oint bmod pmod mod forall exists
"""
FUNCTIONS = frozenset(_FUNCTIONS.split())
GREEK = frozenset(_SMALL_GREEK.split())
_KNOWN = frozenset((*FUNCTIONS, *GREEK, *_LARGE_GREEK.split(), *_OTHER_COMMANDS.split()))
# Words that follow a command without a space where spaces were lost.
_GLUED = frozenset(("and", "for", "where", "when"))
_LETTERS = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ"
_LETTER_NAMES = f"{_SMALL_GREEK} {_LARGE_GREEK}".split()
_GLYPHS = {
    "∞": "\\infty ", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ", "÷": "\\div ", "−": "-", "–": "-", "—": "-",
    "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "≡": "\\equiv ", "±": "\\pm ", "∓": "\\mp ", "∪": "\\cup ", "∩": "\\cap ",
    "∈": "\\in ", "∅": "\\emptyset ", "→": "\\to ", "°": "^\\circ ", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "…": "\\ldots ",
    "，": ",", "、": ",", "；": ";", "：": ":", "（": "(", "）": ")", "％": "%", "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ",
    "⌉": "\\rceil ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "√": "\\sqrt ", "∛": "\\sqrt[3]", "½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}",
    "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "",
    **{letter: f"\\{name} " for letter, name in zip(_LETTERS, _LETTER_NAMES, strict=True)},
}  # fmt: skip
_TABLE = str.maketrans(_GLYPHS)
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n", strict=True))


def _all(names: str, spelling: str) -> dict[str, str]:
    """The same spelling for each of several names."""
    return dict.fromkeys(names.split(), spelling)


# Commands and what each is written as here. What only sets the page goes.
_SPELLINGS = {
    **_all("dfrac tfrac cfrac", "\\frac"),
    **_all("dbinom tbinom", "\\binom"),
    **_all("leq leqq leqslant", "\\le"),
    **_all("geq geqq geqslant", "\\ge"),
    **_all("simeq cong thickapprox doteq", "\\approx"),
    **_all("rightarrow longrightarrow Rightarrow Longrightarrow implies", "\\to"),
    **_all("dots cdots dotsc dotsb dotsm dotso", "\\ldots"),
    **_all("lvert rvert vert mid", "|"),
    **_all("quad qquad enspace thinspace", " "),
    **_all("land wedge", "\\text{ and }"),
    **_all("lor vee", "\\text{ or }"),
    **_all("text textbf textit textrm textsf texttt textnormal textup textsc mbox hbox emph bm boldsymbol", "\\text"),
    **_all("mathrm mathbf mathit mathsf mathcal operatorname", "\\text"),
    **_all("displaystyle textstyle scriptstyle limits nolimits rm bf it hfill nonumber large Large normalsize", ""),
    **_all("left right middle big bigl bigr Big Bigl Bigr bigg biggl biggr Bigg Biggl Biggr", ""),
    **{"neq": "\\ne", "lt": "<", "gt": ">", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "varnothing": "\\emptyset"},
    **{"colon": ":", "bullet": "\\cdot", "degree": "^\\circ", "degrees": "^\\circ", "infin": "\\infty"},
}
_BEFORE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right)(?![a-z])\s*\.", ""),  # an invisible bracket
        (r"\\(?:phantom|label|tag\*?|[hv]space\*?)\{[^{}]*\}", ""),
        (r"\\not\s*=", r"\\ne "),
        (r"\\operatorname\*", r"\\operatorname"),
    )
)
_AFTER = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\text\s+\{", r"\\text{"),
        (r",\s*\\!\s*", ","),  # 1,\! 234 is one number
        (r"\\!", ""),
        (r"\{([,:;=<>])\}", r"\1"),
        (r"(?<!\\)\\[,;:> ]|~|\\\\(?=\s*$)", " "),
        (r"<=|=<|⩽", r"\\le "),
        (r">=|⩾", r"\\ge "),
        (r"!=", r"\\ne "),
        (r"\.\.\.", r"\\ldots "),
        (r"\^\s*\{\s*\\circ\s*\}|\^\s*\^\s*\\circ|\^\s*o(?![A-Za-z])", r"^\\circ "),
        (rf"\\text\{{\s*\\?({_FUNCTIONS.replace(' ', '|')}|pi)\s*\}}", r"\\\1 "),
        (r"\\text\{\s*([-+]?[\d.,]+|[eid])\s*\}", r"\1"),
        (r"(?<![\d})\]])(?<![\d})\]] )\\text\{\s*([A-Za-z])\s*\}", r"\1"),  # a letter, where it is no unit behind a number
        (r"(?<=[)\]}])\s*U\s*(?=[(\[\\])", r" \\cup "),
        (r"(?<=\d)\s*\^?\s*\{?\s*\\text\{\s*(?:st|nd|rd|th)?\s*\}\s*\}?|(?<=\d)(?:st|nd|rd|th)\b", ""),
        (r"\\dot\{(\d)\}(?!\d)", r"\\overline{\1}"),
    )
)
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_SEPARATE = re.compile(r"(?<!\d)\s+|\s+(?!\d)|\$|\\text(?=\{)|\\[,;! ]")
_SINGLE = re.compile(r"\{(\\?[A-Za-z]|\d)\}(?![A-Za-z0-9])")
# Commands whose backslash was escaped once too often.
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z]{2}|[{}()\[\]%$,!])")
# A radical sign covers a whole number, where the command covers one digit.
_RADICAL = re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z])")
_SPACES = re.compile(r"\s+")


def tidy(text: str) -> str:
    r"""Write an answer in one notation: one spelling for each command, no spacing commands, `\text{}` for every font of words."""
    text = _RADICAL.sub(r"\\sqrt{\1}", "".join(_raised(text))).translate(_TABLE)
    if "\\begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    for pattern, replacement in _BEFORE:
        text = pattern.sub(replacement, text)
    text = _COMMAND.sub(_respelled, text)
    for pattern, replacement in _AFTER:
        text = pattern.sub(replacement, text)
    return _SPACES.sub(" ", text).strip()


def plain(text: str) -> str:
    r"""What is left of a tidied answer without the commands that only set words: `\text{no solution}` is no solution."""
    before = ""
    while before != text:
        before, text = text, _TEXT.sub(r" \1 ", text)
    return _SPACES.sub(" ", text).strip()


def bare(text: str) -> str:
    """A text without what only sets it: white space but between digits, dollar signs, braces around one letter or digit."""
    return _SINGLE.sub(r"\1", _SEPARATE.sub("", text))


def _raised(text: str) -> list[str]:
    """Write raised and lowered digits as exponents and subscripts."""
    parts: list[str] = []
    mode = ""
    for letter in text:
        new = "^" if letter in _RAISED else "_" if letter in _LOWERED else ""
        if new != mode:
            parts += ["}"] if mode else []
            parts += [f"{new}{{"] if new else []
            mode = new
        parts.append(_RAISED.get(letter) or _LOWERED.get(letter) or letter)
    return [*parts, "}"] if mode else parts


def _respelled(match: re.Match[str]) -> str:
    r"""Spell a command as it is spelt here, and part it from letters that ran into it: `\quadx` is a space and x."""
    name = match[1]
    if name in _SPELLINGS:
        return _SPELLINGS[name]
    if name in _KNOWN or len(name) < 3:
        return match[0]
    for length in range(len(name) - 1, 1, -1):
        known, rest = name[:length], name[length:]
        if (known in _KNOWN or known in _SPELLINGS) and (len(rest) <= 2 or rest in _GLUED):
            return f"{_SPELLINGS.get(known, f'{chr(92)}{known}')} {rest}"
    return match[0]
