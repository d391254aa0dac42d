"""Where the paper's harness finds the answer in an output, and how it reads the reference.

It looks through the whole output, the thought as well as the solution: for the last "boxed", else for a sentence that states the answer,
else for the last number, which is how a thought that was cut off may still score.
"""

from __future__ import annotations

import re

from structcot.grading.case import Case
from structcot.grading.paper_strings import strip_string

_STOPS = ("</s>", "<|im_end|>", "<|endoftext|>")
_NO_OUTPUT = ("", "error")
# The benchmarks whose answers keep their units, and whose reference is not brought to the plain form.
_UNSTRIPPED = frozenset({"carp_en", "minerva_math"})
# The benchmarks whose reference is a whole solution with its answer in a box.
_SOLUTIONS = frozenset({"math", "minerva_math"})
_CHOICES_AFTER_STATEMENT = frozenset({"mmlu_stem", "sat_math", "aqua", "gaokao2023"})
_CHOICES = frozenset({"gpqa", "mmlu"})
_CHOICE_LETTERS = frozenset("ABCDE")
_A_TO_E = re.compile(r"\b[ABCDE]\b")
_A_TO_D = re.compile(r"\b[ABCD]\b")
_STATES_CHOICE = re.compile("choice is|answer is")
_STRAY_WORD = "ки"
_MINERVA = ("final answer is $", "$. I hope")
_BOX = "boxed"
_STATED = ("he answer is", "final answer is")
_STATED_IN_CHINESE = "答案是"
_BRACE = re.compile("[{}]")
_NUMBER = re.compile(r"-?\d*\.?\d+")
_LINE_BREAK = re.compile(r"\n\s*")


def answer_of_case(case: Case, gold: str) -> str | None:
    """The answer that the harness takes from the output of `case`, in its plain form; None where there is no output."""
    output = _until_stop(case.response)
    if output in _NO_OUTPUT:
        return None
    keep_units = case.benchmark in _UNSTRIPPED
    # It is stripped once when it is found and once more when the output has been run.
    answer = strip_string(_extracted(output, case.benchmark), keep_units=keep_units)
    if gold in _CHOICE_LETTERS:
        return answer if answer in _CHOICE_LETTERS else choice_in_statement(output)
    if _CHOICE_LETTERS.issuperset(gold) and not _CHOICE_LETTERS.issuperset(answer):
        return "".join(letter for letter in answer if letter in _CHOICE_LETTERS)
    return answer


def gold_of_case(case: Case) -> str:
    """The reference in the plain form in which the harness compares it."""
    gold = case.gold
    if case.benchmark in _SOLUTIONS and _BOX in gold:
        gold = _extracted(gold, case.benchmark)
    if case.benchmark in _UNSTRIPPED:
        return gold.replace(r"\neq", r"\ne").replace(r"\leq", r"\le").replace(r"\geq", r"\ge")
    gold = gold.rpartition("####")[2] if case.benchmark == "gsm8k" else gold
    gold = gold.strip("$") if case.benchmark == "olympiadbench" else gold
    # Once when the problem is read, once more before the comparison.
    return strip_string(strip_string(gold))


def last_choice(text: str) -> str:
    """The last letter from A to E that stands alone in `text`, else `text` without what ends a sentence."""
    text = text.strip("\n").rstrip(".").rstrip("/").strip(" ").lstrip(":")
    letters = _A_TO_E.findall(text.upper())
    return (letters[-1] if letters else text.strip().strip(".")).rstrip(".").rstrip("/")


def choice_in_statement(text: str) -> str:
    """The first letter from A to E after the last "answer is", or the last of all letters where nothing is stated.

    Where a statement is repeated, only the text up to the first blank line counts. "answer is a number" states the choice A.
    """
    text = text.strip("\n")
    if any(text.count(phrase) > 1 for phrase in ("choice is", "answer is")):
        text = text.partition("\n\n")[0]
    statements = _STATES_CHOICE.split(text)
    text = statements[-1].strip("\n").rstrip(".").rstrip("/").strip(" ").lstrip(":")
    letters = _A_TO_E.findall(text.upper()) or [text.strip().strip(".")]
    return (letters[0] if len(statements) > 1 else letters[-1]).rstrip(".").rstrip("/")


def _until_stop(response: str) -> str:
    """The output up to a stop string, without the white space around it."""
    text = response.strip()
    for stop in _STOPS:
        if stop in text:
            text = text.partition(stop)[0].strip()
    return text


def _extracted(text: str, benchmark: str) -> str:
    """The answer in an output, in the plain form but for a choice."""
    text = text.replace(_STRAY_WORD, "")
    if benchmark in _CHOICES_AFTER_STATEMENT:
        return choice_in_statement(text)
    if benchmark in _CHOICES:
        return _last_letter(text, _A_TO_D).rstrip(".").rstrip("/")
    answer = _found(text)
    if "mmlu" in benchmark:
        answer = _last_letter(answer, _A_TO_E)
    answer = _LINE_BREAK.sub("", answer).removeprefix(":").removesuffix(".").removesuffix("/")
    return strip_string(answer, keep_units=benchmark in _UNSTRIPPED)


def _found(text: str) -> str:
    """What the first rule that applies finds: a sentence of Minerva's prompt, the last box, a stated answer, the last number."""
    opening, closing = _MINERVA
    if opening in text and closing in text:
        return text.partition(opening)[2].partition(closing)[0].strip()
    if _BOX in text:
        return _boxed(text.rpartition(_BOX)[2])
    for statement in _STATED:
        if statement in text:
            return text.rpartition(statement)[2].strip()
    if _STATED_IN_CHINESE in text:
        return text.split(_STATED_IN_CHINESE)[1].strip().partition("\n\n")[0].strip()
    numbers = _NUMBER.findall(text.replace(",", ""))
    return numbers[-1] if numbers else ""


def _boxed(text: str) -> str:
    """What stands in the braces that open `text`, to its end if they never close; without braces, what stands before a dollar sign."""
    if text[:1] != "{":
        return text.partition("$")[0].strip()
    depth = 0
    for brace in _BRACE.finditer(text):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return text[1 : brace.start()]
    return text[1:]


def _last_letter(text: str, letters: re.Pattern[str]) -> str:
    found = letters.findall(text.upper())
    return found[-1] if found else text.strip().strip(".")
