"""Where the thought and the solution lie in an assistant's answer, by their tags.

Two styles are understood: `<|begin_of_thought|>...<|end_of_thought|>` with `<|begin_of_solution|>...<|end_of_solution|>`, and
`<think>...</think>`, after which everything is the solution. Reading never fails: an answer that is cut short or broken is read as far as
it goes, and what is wrong with it is named in `defect`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

THOUGHT_TAGS = (("<|begin_of_thought|>", "<|end_of_thought|>"), ("<think>", "</think>"))
SOLUTION_TAGS = ("<|begin_of_solution|>", "<|end_of_solution|>")

_OPEN_THOUGHT, _CLOSE_THOUGHT = (frozenset(tags) for tags in zip(*THOUGHT_TAGS, strict=True))
_TAG = re.compile("|".join(re.escape(tag) for pair in (*THOUGHT_TAGS, SOLUTION_TAGS) for tag in pair))
# Some chat templates open the thought in the prompt, so that an answer only closes it.
_OPENED_BY_PROMPT = "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer and its parts, without tags: the thought text[thought_start:thought_end], the solution text[solution_start:solution_end].

    An answer without tags is all thought. `is_closed` tells whether the thought has an end; `defect` says what is wrong with the tags, ""
    where nothing is.
    """

    text: str
    thought_start: int
    thought_end: int
    solution_start: int
    solution_end: int
    is_closed: bool
    defect: str

    @property
    def thought(self) -> str:
        """The text between the tags of the thought."""
        return self.text[self.thought_start : self.thought_end]

    @property
    def solution(self) -> str:
        """The text between the tags of the solution, or what follows the thought where there are none."""
        return self.text[self.solution_start : self.solution_end]


def read_answer(text: str) -> Answer:
    """Find the parts of an assistant's answer."""
    tags = list(_TAG.finditer(text))
    opening = next((tag for tag in tags if tag[0] in _OPEN_THOUGHT), None)
    start = opening.end() if opening else 0
    closing = next((tag for tag in tags if tag.start() >= start and tag[0] in _CLOSE_THOUGHT), None)
    begin = next((tag for tag in tags if tag.start() >= (closing.end() if closing else start) and tag[0] == SOLUTION_TAGS[0]), None)
    end = closing or begin
    thought_end = end.start() if end else len(text)
    solution_start = begin.end() if begin else closing.end() if closing else len(text)
    finish = next((tag for tag in tags if tag.start() >= solution_start and tag[0] == SOLUTION_TAGS[1]), None)
    return Answer(
        text=text,
        thought_start=start,
        thought_end=thought_end,
        solution_start=solution_start,
        solution_end=finish.start() if finish and begin else len(text),
        is_closed=closing is not None,
        defect=_defect([tag[0] for tag in tags]),
    )


def _defect(tags: list[str]) -> str:
    """Say what is wrong with a row of tags: right are an open and a closed thought, then perhaps an open and a closed solution."""
    opened, closed = (sum(tag in kind for tag in tags) for kind in (_OPEN_THOUGHT, _CLOSE_THOUGHT))
    if not opened and not closed:
        return "no thought tags"
    if opened > 1 or closed > 1:
        return "more than one thought: nested or repeated tags"
    if opened and not closed:
        return "the thought is never closed"
    if tags[:1] == [_OPENED_BY_PROMPT]:
        tags = ["<think>", *tags]
    elif not opened:
        return "the thought is never opened"
    if tuple(tags[:2]) not in THOUGHT_TAGS:
        return "the tags of the thought do not match or are out of order"
    solution = tuple(tags[2:])
    if solution == SOLUTION_TAGS[:1]:
        return "the solution is never closed"
    return "" if solution in ((), SOLUTION_TAGS) else "the tags of the solution are out of order"
