"""The final answer of a text: what stands in its last box, else what its last "the answer is" names."""

from __future__ import annotations

import re

Span = tuple[int, int]

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_STATED = re.compile(
    r"(?:answer|result)\s*(?:is|are|:|=|：)\s*([^\n]*?[^\s.。])\**[.。]?(?=\s|$)|答案(?:是|为|：|:)\s*([^\n。]+)", re.IGNORECASE
)


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
    """Find the final answer: the last box, else the last stated answer, else none."""
    boxes = box_spans(text)
    if boxes:
        return boxes[-1]
    stated = list(_STATED.finditer(text))[-1:]
    return stated[0].span(1 if stated[0][1] is not None else 2) if stated else None


def final_answer(text: str) -> str:
    """The text of the final answer, "" where there is none."""
    span = answer_span(text)
    return text[slice(*span)].strip() if span else ""
