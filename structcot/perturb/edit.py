"""What a perturbation does to one answer, and pieces of text that can be moved without gluing words together.

A step is its content and the white space after it. Perturbations move, drop and replace contents and leave the white space where it is, so
a sentence that ended a paragraph does not end up stuck to the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from structcot.structure.sentences import Span
from structcot.tags import Answer

FOREIGN = -1


class NotApplied(ValueError):
    """Why a perturbation leaves one record as it is; becomes a line of the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """An answer after one perturbation.

    Of `units` digits, sentences, steps or (where lengths are matched) characters, `chosen` were taken and `changed` really differ now.
    `order` names for each step of the result which step of the original it is, FOREIGN for one from elsewhere; None where steps stay.
    """

    text: str
    units: int
    chosen: int
    changed: int
    order: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """A text as contents and the white space around them: lead, contents[0], gaps[0], contents[1], ..., gaps[-1]."""

    lead: str
    contents: tuple[str, ...]
    gaps: tuple[str, ...]

    def replaced(self, contents: Sequence[str]) -> str:
        """The text with as many other contents in the same places."""
        return self.lead + "".join(content + gap for content, gap in zip(contents, self.gaps, strict=True))

    def kept(self, kept: Sequence[int]) -> str:
        """The text of the pieces `kept`, in order; between two of them the widest white space that lay there, so paragraphs stay apart."""
        if not kept:
            return self.lead or self.gaps[-1]
        ends = [*kept[1:], len(self.contents)]
        joints = [max(self.gaps[here:there], key=_width) for here, there in zip(kept, ends, strict=True)]
        joints[-1] = self.gaps[-1]
        return self.lead + "".join(self.contents[index] + joint for index, joint in zip(kept, joints, strict=True))


def cut(text: str, spans: Sequence[Span]) -> Pieces:
    """Cut `text` into the contents of `spans`, which cover it in order; spans of nothing but white space are no pieces."""
    tight = []
    for start, end in spans:
        content = text[start:end].strip()
        if content:
            begin = text.index(content[0], start)
            tight.append((begin, begin + len(content)))
    if not tight:
        return Pieces(lead=text, contents=(), gaps=())
    ends = [start for start, _ in tight[1:]] + [len(text)]
    return Pieces(
        lead=text[: tight[0][0]],
        contents=tuple(text[start:end] for start, end in tight),
        gaps=tuple(text[end:following] for (_, end), following in zip(tight, ends, strict=True)),
    )


def scope_spans(answer: Answer, scope: str) -> list[Span]:
    """The parts of an answer that a scope names, in order.

    Raises:
        NotApplied: if it has no such part, or its tags are not whole; "message" is everything and asks for no tags.
    """
    if scope == "message":
        return [(0, len(answer.text))]
    if answer.defect:
        raise NotApplied(answer.defect)
    thought, solution = (answer.thought_start, answer.thought_end), (answer.solution_start, answer.solution_end)
    return {"thought": [thought], "solution": [solution], "both": [thought, solution]}[scope]


def with_thought(answer: Answer, thought: str) -> str:
    """The answer with another thought between the same tags; all else stays as it is, byte for byte."""
    return answer.text[: answer.thought_start] + thought + answer.text[answer.thought_end :]


def without_thought(answer: Answer) -> str:
    """The answer without its thought, the tags of it, and the white space after them."""
    opening = answer.text.rfind("<", 0, answer.thought_start) if answer.thought_start else 0
    closing = answer.text.index(">", answer.thought_end) + 1
    return answer.text[:opening] + answer.text[closing:].lstrip()


def _width(gap: str) -> tuple[int, int]:
    return gap.count("\n"), len(gap)
