"""The grader of the paper's evaluation, mistake for mistake, to compare with its tables.

It judges as the harness of the paper's authors does (branch `corrupt` of NovaSky-AI/SkyThought, a copy of Qwen2.5-Math's with edits of
their own): it takes the answer from the output (`paper_answers`), brings it to a plain form (`paper_strings`), and compares by a row of
rules, the last of which ask SymPy (`paper_equal`, `paper_symbolic`). Each module lists the mistakes that it keeps. Use it for nothing but
that comparison: it calls wrong answers right and right ones wrong.

What differs: the harness also runs Python programs that an output without a box ends in, and takes what they print for the answer; it
evaluates answers as Python code. Neither is done here. It stops a comparison after three seconds, which then counts as wrong: here the
caller limits the time, but what is sure to take longer is called wrong at once.
"""

from __future__ import annotations

from structcot.grading.case import Case, Grade
from structcot.grading.paper_answers import answer_of_case, gold_of_case
from structcot.grading.paper_equal import compare


def grade_paper(case: Case) -> Grade:
    """Judge an answer as the paper's harness does.

    `case.pred` is compared with `case.gold` as both are; they are in the plain form already. Without it, the answer is taken from
    `case.response` as for `case.benchmark`, and `case.gold` is brought to the plain form. Tolerance and unit do not count, nor does
    `is_multiple`: the harness knows none of them. An empty answer is right where the reference is empty as well.
    """
    gold, pred = case.gold, case.pred
    if pred is None:
        gold = gold_of_case(case)
        pred = answer_of_case(case, gold)
    if pred is None:
        return Grade(extracted="", verdict="no_answer", reason="no output")
    try:
        compared = compare(pred, gold)
    except RecursionError:
        return Grade(extracted=pred, verdict="wrong", reason="nested too deeply to be compared")
    verdict = "correct" if compared.equal else "wrong" if pred else "no_answer"
    return Grade(extracted=pred, verdict=verdict, reason=compared.reason)
