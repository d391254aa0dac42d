"""A thought cut into steps, without losing a character.

A segmenter maps a text to steps in order and without gaps: the text of all steps, joined, is the text, byte for byte. `blank-line` and
`sentence` cut by form, and tell the type of a piece by the words that open it. `marker` cuts by function: there is a boundary at each
sentence that backtracks, checks, doubts, tries something else or concludes, and one where the thought goes on after it. `whole_steps`
joins each such turn with what follows from it: the steps of Li et al., 2025 (arXiv 2502.07374), whose boundaries are breaks in a linear
sequence of thoughts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from structcot.structure.markers import marker
from structcot.structure.sentences import Span, paragraphs, sentences


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of a thought: text[start:end], offsets in characters, and its type, one of `STEP_TYPES`."""

    start: int
    end: int
    type: str


Segmenter = Callable[[str], list[Step]]


def by_blank_line(text: str) -> list[Step]:
    """Cut after blank lines."""
    return typed(text, paragraphs(text))


def by_sentence(text: str) -> list[Step]:
    """Cut after sentences and lines."""
    return typed(text, sentences(text))


def by_marker(text: str) -> list[Step]:
    """Cut before each sentence with a marker, and after it where the next has none."""
    steps: list[Step] = []
    for piece in by_sentence(text):
        if steps and piece.type == steps[-1].type and piece.type in ("initializing", "deduction"):
            steps[-1] = replace(steps[-1], end=piece.end)
        else:
            steps.append(piece)
    return steps


SEGMENTERS: dict[str, Segmenter] = {"blank-line": by_blank_line, "sentence": by_sentence, "marker": by_marker}


def whole_steps(steps: Sequence[Step]) -> list[Step]:
    """Join each step with the deduction that follows it."""
    joined: list[Step] = []
    for step in steps:
        if joined and step.type == "deduction":
            joined[-1] = replace(joined[-1], end=step.end)
        else:
            joined.append(step)
    return joined


def typed(text: str, spans: Sequence[Span]) -> list[Step]:
    """Give each span the type that its first sentence tells; what comes before the first marker sets the scene."""
    steps, plain = [], "initializing"
    for start, end in spans:
        kind = marker(text[start:end])
        if kind:
            plain = "deduction"
        steps.append(Step(start, end, kind or plain))
    return steps
