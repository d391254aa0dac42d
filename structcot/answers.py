"""The final answer of a text: what stands in its last box, else what its last "the answer is" names."""

from __future__ import annotations

import re

from structcot.tags import Answer

Span = tuple[int, int]

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LABEL = re.compile(
    r"(?:answer|result)\b[*_ ]*+(?:is\b|are\b|[:=：])[*_:： ]*+|答案[*_ ]*+(?:是|为|[:：])[*_:： ]*+",
    re.IGNORECASE,
)
_STATED_END = re.compile(r"\n|[.!](?=[\s*_]|\Z)|。")
_MARKUP = " \t\r*_$"


def box_spans(text: str) -> list[Span]:
    """Find what stands in each box, without its braces; a box that never closes reaches to the end of the text."""
    spans, position = [], 0
    while box := _BOX.search(text, position):
        depth, end = 1, len(text)
        for brace in _BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth:
                end = brace.start()
                break
        spans.append((box.end(), end))
        position = end
    return spans


def answer_span(text: str) -> Span | None:
    """Find the final answer: the last box (none if it never closes), without a box the last stated answer, else none."""
    boxes = box_spans(text)
    if boxes:
        return boxes[-1] if boxes[-1][1] < len(text) else None
    labels = list(_LABEL.finditer(text))
    return _tight(text, labels[-1].end()) if labels else None


def _tight(text: str, start: int) -> Span | None:
    """The rest of a sentence from `start` on, without the white space, emphasis and dollar signs around it; None of nothing."""
    stop = _STATED_END.search(text, start)
    rest = text[start : stop.start() if stop else len(text)]
    inner = rest.strip(_MARKUP)
    left = start + len(rest) - len(rest.lstrip(_MARKUP))
    return (left, left + len(inner)) if inner else None


def answer_of(answer: Answer) -> str:
    """The final answer of an assistant: in its solution, or anywhere in a text whose thought never closes; "" where there is none."""
    return final_answer(answer.solution if answer.is_closed else answer.text)


def final_answer(text: str) -> str:
    """The text of the final answer, "" where there is none."""
    span = answer_span(text)
    return text[slice(*span)].strip() if span else ""
