"""The strictest grader: an answer is right if it is the text of the reference, once what only typesets is gone."""

from __future__ import annotations

import re

from structcot.answers import box_spans, final_answer
from structcot.grading.case import Case, Grade
from structcot.grading.found_answer import answer_in_response

_TYPESETTING = re.compile(r"\\(?:left|right|displaystyle|,|;|!| )|\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}|[\s$]|(?<=\d),(?=\d{3})|\.$")


def grade_exact(case: Case) -> Grade:
    """Judge an answer by its text; tolerance, unit and order of several answers are not considered."""
    if case.pred is None:
        found = answer_in_response(case.response).text
    else:
        found = final_answer(case.pred) if box_spans(case.pred) else case.pred.strip()
    if not found:
        return Grade(extracted="", verdict="no_answer", reason="no answer found")
    if exact(case.gold, found.rstrip(" .")):
        return Grade(extracted=found, verdict="correct", reason="the same text")
    return Grade(extracted=found, verdict="wrong", reason="another text")


def exact(gold: str, found: str) -> bool:
    """Whether two answers are the same text once what only typesets is gone."""
    return _bare(gold) == _bare(found)


def _bare(answer: str) -> str:
    return _TYPESETTING.sub(lambda match: match[1] or "", answer.replace("dfrac", "frac").replace("tfrac", "frac")).casefold()
