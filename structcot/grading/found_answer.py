r"""The answer in what a model, or a person, wrote: in its boxes, behind "the answer is", in its last formula, or in its last number.

A whole output is read strictly: a box, or what a stated answer names. What was already taken for an answer may still be a sentence, and is
read as far as it goes. An inline formula, between single dollar signs or \( and \), ends on its line: one that does not is no formula.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from structcot.answers import answer_of, box_spans
from structcot.tags import read_answer

# Two boxes further apart are no list, and boxes in boxes beyond this are no answer.
MAX_GAP, MAX_NESTED_BOXES = 40, 3
# What structcot.tags says of an output that was cut short: what it states on the way is no answer yet.
UNFINISHED = "the thought is never closed"

# The end of a turn, where the output of a model goes on behind it.
_TURN = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|end_of_text|end)\|>|</s>")
_FORMULA = re.compile(r"\$\$((?:[^$\\]|\\.)+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$((?:[^$\\]|\\.)+?)(?<!\\)\$", re.DOTALL)
_WHOLE = re.compile(
    r"\s*(?:\$\$((?:[^$\\]|\\.)+)\$\$|\\\[((?:(?!\\[\[\]]).)+)\\\]|\\\(((?:(?!\\[()]).)+)\\\)|\$((?:[^$\\]|\\.)+)\$)[\s.,]*", re.DOTALL
)
# A command with its arguments, or a number, perhaps a fraction and with a percent sign, that no letter touches in front.
_BARE = re.compile(r"(?:\\[a-zA-Z]+(?:\{[^{}]*\})+|(?<![A-Za-z0-9_.])[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s?/\s?\d+)?)\s*(?:\\?%)?")
_TUPLE = re.compile(r"[(\[]\s*-?[\d.]+(?:/\d+)?(?:\s*,\s*-?[\d.]+(?:/\d+)?)+\s*[)\]]")
_ITEM = re.compile(f"(?P<formula>{_FORMULA.pattern})|{_TUPLE.pattern}|{_BARE.pattern}", re.DOTALL)
_BETWEEN = re.compile(r"\s*(?:,|,?\s*(?:and|or)\b)\s*")
_QUALIFIED = re.compile(rf"\s*(?:{_FORMULA.pattern})\s*,?\s*(?:where|with|for|if|when)\b", re.DOTALL)
_NAMES = (
    r"(?:\b(?:final\s+answer|answer|result|(?:correct|right)\s+(?:option|choice)|réponse|respuesta|antwort|resposta|risposta|ответ)\b"
    r"|答案|答え|정답|الجواب|الإجابة|उत्तर|#{4})"
)
_VERBS = r"(?:is|are|est|es|ist|é|è|=|是|为|は|은|는|هي|هو)"
_ADVERBS = r"(?:\b(?:therefore|thus|then|hence|simply|just|exactly|approximately|about)\b[\s,]*)*"
_LABEL = re.compile(rf"{_NAMES}[*_\s]*(?:{_VERBS}(?![A-Za-z])\s*{_ADVERBS}|[:：]\s*|(?<=####)\s+)+[*_\s]*", re.IGNORECASE)
_FINAL = re.compile(r"final\s+answer\b[*_ ]*(?:is\b|[:：])[*_:： ]*", re.IGNORECASE)
_VERB = re.compile(r"\b(?:is|are|equals?)\b")
_END = re.compile(r"\n\s*\n|[.!](?=\s*(?:I hope|[A-Z*\n]|\Z))|。")
_EDGES = re.compile(r'^(?:[\s*_"]|\\")+|(?:[\s*_"]|\\")+$')
_WORD = re.compile(r"(?<![\\A-Za-z{_^])[A-Za-zÀ-ÿ]{2,}|[\u0400-\u04ff\u0600-\u06ff\u0900-\u097f\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af]+")
_SET_WORDS = re.compile(r"\\(?:text[a-z]*|mbox|mathrm|operatorname)\s*\{[^{}]*\}")
_AROUND_DIGITS = re.compile(r"[\u4e00-\u9fff].*\d.*[\u4e00-\u9fff]", re.DOTALL)
_JOINING = re.compile(r"\\(?:q?quad|text|[,;()\[\]\\])|[\s,;+&${}]+")
_DOLLAR = re.compile(r"(?<!\\)\$")
# I is a pronoun more often than a choice.
_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-HJ-Z])\)?(?![A-Za-z'])")
# A letter that begins a text, and is no part of a formula or of a list of letters.
_FIRST_LETTER = re.compile(r"\s*[*_(\\$]*\(?([A-Za-z])\)?(?![A-Za-z'])(?!\s*(?:[-+*/^=_<>]|(?:,|and|or)\s*\(?[A-Z]\b))")
_NO_LETTERS = re.compile(r"\$[^$]{4,}\$|\\[A-Za-z]+\{[^{}]*\}|\S*[=_^]\S*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An answer, "" where none was found, and what is to be said of how it was found."""

    text: str
    note: str = ""


def answer_in_response(response: str) -> Found:
    """Find the answer of a whole output: after its thought, the last box or the last stated answer."""
    answer = read_answer(_TURN.split(response)[0])
    boxed = _boxed(answer.solution if answer.is_closed else answer.text)
    if boxed:
        return boxed
    if answer.defect == UNFINISHED:
        return Found(text="", note=f"{UNFINISHED}, and holds no box")
    found = answer_of(answer)
    return Found(text=found, note="stated, not boxed" if found else "no answer in the output")


def answer_in_text(text: str, is_choice: bool = False) -> Found:
    """Find the answer in what was given as one: all of it, or if it is a sentence, what the sentence says; a letter for a choice."""
    answer = read_answer(_TURN.split(text)[0])
    said = (answer.solution if answer.is_closed else answer.text).strip()
    if boxed := _boxed(said):
        return boxed
    if whole := _WHOLE.fullmatch(said):
        return Found(text=_inner(whole))
    if is_choice and (letter := _letter(said)):
        return Found(text=letter)
    return _in_prose(said) if _is_prose(said) else Found(text=_without_delimiters(said))


# Boxes


def _boxed(text: str, depth: int = 0) -> Found | None:
    """The last box with those that it is joined to; what is called the final answer behind it outweighs it. None without a box."""
    spans = box_spans(text)
    if not spans:
        return None
    if spans[-1][1] == len(text):
        return Found(text="", note="the last box is never closed")
    labels = list(_FINAL.finditer(text, spans[-1][1]))
    if labels and (stated := _in_sentence(text[labels[-1].end() :])):
        return Found(text=stated, note="stated behind the last box")
    first = len(spans) - 1
    while first and _are_joined(text[spans[first - 1][1] + 1 : text.rfind("\\", 0, spans[first][0])]):
        first -= 1
    texts = [_innermost(text[slice(*span)], depth) for span in spans]
    last = list(dict.fromkeys(texts[first:]))
    if not any(last):
        return Found(text="", note="the last box is empty")
    others = [one for one in texts[:first] if one not in last]
    return Found(text=_DOLLAR.sub("", ", ".join(last)), note="the last of several boxes that differ" if others else "")


def _innermost(text: str, depth: int) -> str:
    """The content of a box, or of the boxes in it."""
    inner = _boxed(text, depth + 1) if depth < MAX_NESTED_BOXES else None
    return inner.text if inner and inner.text else text.strip()


def _are_joined(gap: str) -> bool:
    """Whether two boxes are one answer: with nothing but "and", "or", or a word and one of these between them."""
    if len(gap) > MAX_GAP or re.search(r"\n\s*\n|\.\s", gap):
        return False
    words = _JOINING.sub(" ", gap.strip("\\ ")).split()
    return not words or (words[-1] in ("and", "or") and len(words) <= 2)


# Sentences


def _is_prose(text: str) -> bool:
    """Whether a text is a sentence that names an answer, rather than an answer."""
    outside = _SET_WORDS.sub(" ", _FORMULA.sub(" 1 ", text))
    words = [word for word in _WORD.findall(outside) if word.lower() not in ("and", "or")]
    if _FORMULA.search(text):
        return bool(words)
    before = _WORD.findall(re.split(r"\d", outside, maxsplit=1)[0]) if re.search(r"\d", outside) else []
    return len(words) > 4 or len(before) > 1 or bool(_LABEL.search(text)) or bool(_AROUND_DIGITS.search(text))


def _in_prose(text: str) -> Found:
    """What a text names: a formula whose letters it then explains, what its last label names, or its last formula or number."""
    if begun := _QUALIFIED.match(text):
        return Found(text=_inner(begun))
    for label in reversed(list(_LABEL.finditer(text))):
        if stated := _in_sentence(text[label.end() :]):
            return Found(text=stated)
    items = list(_items(text))
    if items:
        return Found(text=items[-1], note="the last formula or number of a text")
    return Found(text="" if _FORMULA.search(text) else text, note="no answer in the text")


def _in_sentence(text: str) -> str:
    """What the rest of a sentence names: all of it, or if it is prose, the first formula or number, behind its verb if it has one."""
    stop = _END.search(text)
    rest = _EDGES.sub("", text[: stop.start() if stop else len(text)])
    if whole := _WHOLE.fullmatch(rest):
        return _inner(whole)
    has_words = re.search(r"\d", rest) and len(_WORD.findall(_SET_WORDS.sub(" ", rest))) > 2
    if not rest or not (has_words or _is_prose(rest)):
        return _without_delimiters(rest)
    verbs = list(_VERB.finditer(rest))
    behind = rest[verbs[-1].end() :] if verbs else ""
    return next(_items(behind), "") or next(_items(rest), rest)


def _items(text: str) -> Iterator[str]:
    """The formulas and numbers of a text, without inline formulas that run over lines; a row of them, as in "1, 2 and 3", is one."""
    row, end = "", 0
    for match in _ITEM.finditer(text):
        item = _item(match)
        if not item:
            continue
        if row and _BETWEEN.fullmatch(text[end : match.start()]):
            row = f"{row}, {item}"
        else:
            if row:
                yield row
            row = item
        end = match.end()
    if row:
        yield row


def _item(match: re.Match[str]) -> str:
    """A formula without its delimiters, "" for an inline one that runs over lines, or a number."""
    formula = match["formula"]
    if not formula:
        return match[0].strip().rstrip(",")
    if "\n" in formula and not formula.startswith(("$$", "\\[")):
        return ""
    whole = _WHOLE.fullmatch(formula)
    return _inner(whole) if whole else formula


def _inner(match: re.Match[str]) -> str:
    """What stands between the delimiters of a formula."""
    return next(group for group in match.groups() if group is not None).strip()


def _without_delimiters(text: str) -> str:
    """A text of formulas and little else without the marks of the formulas."""
    return _FORMULA.sub(lambda match: f" {_inner(match)} ", text).strip()


def _letter(text: str) -> str:
    """The letter of a choice: behind a label, else at the start, else the last one that stands alone and in no formula."""
    labels = list(_LABEL.finditer(text))
    if labels:
        stated = _in_sentence(text[labels[-1].end() :])
        if re.fullmatch(r"\(?[A-Za-z]\)?", stated):
            return stated.strip("()")
        if letter := _LETTER.search(text, labels[-1].end()):
            return letter[1]
    start = _FIRST_LETTER.match(text)
    if start and (len(text.strip()) < 4 or start[1].isupper()):
        return start[1]
    letters = _LETTER.findall(_NO_LETTERS.sub(" ", text)) if _is_prose(text) else []
    return letters[-1] if letters else ""
