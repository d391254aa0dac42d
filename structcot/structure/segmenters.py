"""A thought cut into steps, without losing a character.

A segmenter maps a text to steps in order and without gaps: the text of all steps, joined, is the text, byte for byte. `blank-line` and
`sentence` cut by form, and tell the type of a piece by the words that open it. `marker` cuts by function: there is a boundary at each
sentence that backtracks, checks, doubts, tries something else or concludes, and one where the thought goes on after it. `whole_steps`
joins each such turn with what follows from it: the steps of Li et al., 2025 (arXiv 2502.07374), whose boundaries are breaks in a linear
sequence of thoughts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from structcot.structure.markers import marker
from structcot.structure.sentences import Span, paragraphs, sentences


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of a thought: text[start:end], offsets in characters, and its type, one of `STEP_TYPES`."""

    start: int
    end: int
    type: str


# The types of sentences without a marker.
PLAIN = ("initializing", "deduction")
Segmenter = Callable[[str], list[Step]]


def by_blank_line(text: str) -> list[Step]:
    """Cut after blank lines."""
    return typed(text, paragraphs(text))


def by_sentence(text: str) -> list[Step]:
    """Cut after sentences and lines."""
    return typed(text, sentences(text))


def by_marker(text: str) -> list[Step]:
    """Cut before each sentence with a marker, and after it where the next has none."""
    pieces = by_sentence(text)
    opening = pieces[:1] + [piece for before, piece in pairwise(pieces) if piece.type not in PLAIN or piece.type != before.type]
    return _until_next(opening, len(text))


SEGMENTERS: dict[str, Segmenter] = {"blank-line": by_blank_line, "sentence": by_sentence, "marker": by_marker}


def whole_steps(steps: Sequence[Step]) -> list[Step]:
    """Join each step with the deduction that follows it."""
    opening = [step for index, step in enumerate(steps) if not index or step.type != "deduction"]
    return _until_next(opening, steps[-1].end) if steps else []


def _until_next(opening: Sequence[Step], end: int) -> list[Step]:
    """Let each step reach to the start of the next, and the last to `end`."""
    ends = [step.start for step in opening[1:]] + [end]
    return [Step(step.start, stop, step.type) for step, stop in zip(opening, ends, strict=bool(opening))]


def typed(text: str, spans: Sequence[Span]) -> list[Step]:
    """Give each span the type that its first sentence tells; what comes before the first marker sets the scene."""
    steps, plain = [], "initializing"
    for start, end in spans:
        kind = marker(text[start:end])
        if kind:
            plain = "deduction"
        steps.append(Step(start, end, kind or plain))
    return steps
