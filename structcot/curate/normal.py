"""Problems as they are compared: what a rewriting leaves as it was, in lower case and without what only typesets.

Two texts that differ in white space, in how LaTeX is written, or in the number at their head are one problem. What it asks is in its words,
its numbers and its signs, and these stay.
"""

from __future__ import annotations

import re
import unicodedata

# Commands that say how something looks or how far apart it stands.
_LOOKS = re.compile(
    r"\\(?:left|right|big|Big|bigg|Bigg|bigl|bigr|displaystyle|textstyle|limits|nolimits|quad|qquad|hspace\*?\{[^{}]*\}|vspace\*?\{[^{}]*\}"
    r"|,|;|:|!|>|\s|noindent|centering|par|newline|nonumber|mathstrut)(?![a-zA-Z])|\\\\(?:\[[^\]]*\])?|[$~]|\\[()\[\]]|\\(?=[%&#_{}$])"
)
# Commands whose braces hold plain text, or the same signs in another face.
_FACES = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|emph|mathrm|mathbf|mathit|mathsf|mathbb|mathcal|boldsymbol|bm|operatorname\*?|mbox|hbox|underline"
    r"|begin|end)(?![a-zA-Z])"
)
_SAME = {
    r"\\[dtc]?frac\s*(\d)\s*(\d)": r" \1/\2 ",
    r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}": r" \1/\2 ",
    r"\\(?:cdot|times|ast)(?![a-zA-Z])|×|·|∗": "*",
    r"\\div(?![a-zA-Z])|÷|\u2044": "/",
    r"\\(?:leq?|leqslant)(?![a-zA-Z])|≤|⩽": "<=",
    r"\\(?:geq?|geqslant)(?![a-zA-Z])|≥|⩾": ">=",
    r"\\(?:neq?)(?![a-zA-Z])|≠": "!=",
    r"\\(?:l|c|d)?dots[a-z]?(?![a-zA-Z])|…|⋯|\.{3,}": "...",
    r"\^?\s*\{?\\circ\}?(?![a-zA-Z])|°|\\degrees?(?![a-zA-Z])": " degrees ",
    r"\\(?:to|rightarrow|longrightarrow)(?![a-zA-Z])|→": "->",
    r"\\pi(?![a-zA-Z])|π": " pi ",
    r"\\sqrt(?![a-zA-Z])|√": " sqrt ",
    r"\\infty(?![a-zA-Z])|∞": " infinity ",
    r"\\pm(?![a-zA-Z])|±": " +- ",
    r"[−–—]": "-",
    r"[‘’`´]": "'",
}
_REPLACED = [(re.compile(pattern), put) for pattern, put in _SAME.items()]
# "Problem 12.", "Example 3:", "4)", "(5)", "Q7.", and marks such as "(10 points)" or "[2019 AMC 10A]".
_NUMBERED = re.compile(
    r"\A\s*(?:[*#_>\s]*(?:problem|exercise|example|question|task|q|ex|no|№|#)\s*[.#№]?\s*[a-z]?\d+(?:[.\-]\d+)*\s*[a-z]?\s*[.:)\]*_]*"
    r"|[(\[]?\d{1,3}[.)\]:](?!\d))\s+",
    re.IGNORECASE,
)
_MARKS = re.compile(r"[(\[]\s*\d+\s*(?:points?|pts?|marks?|分)\s*[.)\]]+", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+(?:'[a-z]+)?|\d+(?:[.,]\d+)*|<=|>=|!=|->|\.{3}|[-+*/=<>^%|!]|[\u3040-\u30ff\u3400-\u9fff]")
_UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u9fff])")
# Not "one", which is a pronoun as often.
_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_SPELLED = {word: str(number) for number, word in enumerate(_WORDS, 2)}


def words_of(problem: str) -> list[str]:
    """The words, numbers and signs of a problem in their order: lower case, LaTeX undone, without a number at the head."""
    text = unicodedata.normalize("NFKC", problem)
    text = _MARKS.sub(" ", _NUMBERED.sub("", text, count=1))
    for pattern, put in _REPLACED:
        text = pattern.sub(put, text)
    text = _LOOKS.sub(" ", _FACES.sub(" ", text))
    text = _UNSPACED.sub(r" \1 ", text.replace("\\", " ").lower())
    found: list[str] = _WORD.findall(text)
    return [_SPELLED.get(word) or (word.replace(",", "") if word[0].isdigit() else word) for word in found]


def numbers_of(words: list[str]) -> list[str]:
    """The numbers among the words of a problem, sorted: a problem with others is another problem, however alike it reads."""
    return sorted(word for word in words if word[0].isdigit())
