"""The grader of mathematics: finds the answer in an output and says whether it is the reference, and why."""

from __future__ import annotations

import re
import threading

from structcot.grading.answer_parts import read_part
from structcot.grading.answer_text import bare, plain, tidy
from structcot.grading.case import Case, Grade
from structcot.grading.compare import Rules, same_answer
from structcot.grading.found_answer import Found, answer_in_response, answer_in_text
from structcot.grading.numbers import with_point, without_thousands

# Beyond these a text is compared as text alone: nobody answers like that, and reading it takes long.
MAX_LENGTH, MAX_DEPTH = 10_000, 60
# The precision of mpmath is one for all threads.
_ONE_AT_A_TIME = threading.Lock()
_CHOICE = re.compile(r"\(?\s*([A-Z])\s*\)?\.?")
_ANSWER_WORD = re.compile(r"(yes|no|true|false)\.?", re.IGNORECASE)
_FIRST_WORD = re.compile(r"([A-Za-z]+)(?:[.,;:!]|$)")
# A letter in brackets, with a mark or a word behind it, or alone: (C) 7, C. 7, C Plane, C.
_CHOSEN = re.compile(r"(?:\(\s*([A-Za-z])\s*\)|([A-Za-z])\s*[.:)]|([A-Za-z])\s+(?=[A-Za-z]{2})|([A-Za-z])$)(?!\s*[-+*/^=])")
_CONDITION = re.compile(
    r"(?<=\S)\s*,?\s*(?:\\text\{\s*,?\s*)?\b(?:for|where|when|whenever|if|provided|unless)\b(?!.*\|).*$"
    r"|(?<=\S)\s*[,(]\s*[a-z]\s*\\in\s*\\mathbb.*$",
    re.DOTALL,
)


def grade_math(case: Case) -> Grade:
    """Judge an answer by its value: equal numbers, formulas, lists, sets, intervals, relations or words are right however written."""
    with _ONE_AT_A_TIME:
        return _graded(case)


def _graded(case: Case) -> Grade:
    gold = answer_in_text(case.gold).text or case.gold
    choice = _CHOICE.fullmatch(plain(tidy(gold)))
    found = answer_in_response(case.response) if case.pred is None else answer_in_text(case.pred, is_choice=choice is not None)
    if not found.text.strip():
        return Grade(extracted="", verdict="no_answer", reason=found.note or "the answer is empty")
    return _judged(gold, found, case)


def _judged(gold: str, found: Found, case: Case) -> Grade:
    how = same(gold, found.text, Rules(tolerance=case.tolerance, unit=tidy(case.unit), is_multiple=case.is_multiple))
    note = f"; {found.note}" if found.note else ""
    if how:
        return Grade(extracted=found.text, verdict="correct", reason=how + note)
    return Grade(extracted=found.text, verdict="wrong", reason=f"{_short(found.text)} is not {_short(gold)}{note}")


def same(gold: str, pred: str, rules: Rules) -> str:
    """How two answers are the same, "" where they are not."""
    if gold.strip() == pred.strip():
        return "the same text"
    if max(len(gold), len(pred)) > MAX_LENGTH or max(_depth(gold), _depth(pred)) > MAX_DEPTH:
        return ""
    ours, theirs = tidy(gold), tidy(pred)
    if bare(ours) == bare(theirs):
        return "the same text"
    if choice := _same_choice(ours, theirs):
        return choice
    return _same_readings(ours, theirs, rules) or _same_but_condition(ours, theirs, rules)


def _same_readings(gold: str, pred: str, rules: Rules) -> str:
    """Compare the readings of two answers: commas may separate answers or thousands, or stand for a decimal point."""
    ours, theirs = (list(dict.fromkeys((without_thousands(text), text))) for text in (gold, pred))
    if not rules.is_multiple and ("." in gold) != ("." in pred):
        ours, theirs = [with_point(text) for text in ours], [with_point(text) for text in theirs]
    for first in ours:
        for second in theirs:
            if how := same_answer(read_part(first), read_part(second), rules):
                return how
    return ""


def _same_but_condition(gold: str, pred: str, rules: Rules) -> str:
    """Compare two answers of which one names a condition, such as "for n > 1", that the other leaves out."""
    conditions = [_CONDITION.search(text) for text in (gold, pred)]
    if (conditions[0] is None) == (conditions[1] is None):
        return ""
    ours, theirs = (text[: found.start()] if found else text for text, found in zip((gold, pred), conditions, strict=True))
    how = _same_readings(ours, theirs, rules)
    return how and f"{how}, but for a condition"


def _same_choice(gold: str, pred: str) -> str:
    """Compare the letters of choices: one side is a letter, the other starts with it."""
    asked, said = _ANSWER_WORD.fullmatch(plain(gold)), _FIRST_WORD.match(plain(pred))
    if asked and said:
        return "the same word" if said[1].casefold() == asked[1].casefold() else ""
    letters = [_CHOICE.fullmatch(plain(text)) for text in (gold, pred)]
    if letters[0] and letters[1]:
        return "the same choice" if letters[0][1] == letters[1][1] else ""
    for letter, other, is_gold in ((letters[0], pred, False), (letters[1], gold, True)):
        if not letter or letter[1] not in "ABCDEFGH" or not (found := _CHOSEN.match(plain(other))):
            continue
        chosen = next(filter(None, found.groups()))
        if letter[1] == (chosen if is_gold else chosen.upper()):
            return "the same choice"
    return ""


def _depth(text: str) -> int:
    """How deeply brackets are nested at most."""
    depth = deepest = 0
    for letter in text:
        depth += (letter in "({[") - (letter in ")}]")
        deepest = max(deepest, depth)
    return deepest


def _short(text: str) -> str:
    one_line = " ".join(text.encode("utf-8", "replace").decode().split())
    return one_line if len(one_line) <= 80 else f"{one_line[:77]}..."
