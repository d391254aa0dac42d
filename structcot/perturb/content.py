"""Perturbations of the content: wrong digits, and sentences of reflection taken out."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from structcot.answers import answer_span, box_spans
from structcot.perturb.choose import below, order_of, whole_share
from structcot.perturb.edit import Edit, NotApplied, cut, scope_spans
from structcot.perturb.rewrite import rewrite_without_reflection
from structcot.perturb.spec import Spec
from structcot.structure.keywords import keyword_pattern
from structcot.structure.markers import REFLECTION, marker
from structcot.structure.sentences import Span, sentences
from structcot.tags import Answer

_DIGIT = re.compile(r"[0-9]")
# As in the paper's code: whole numbers and decimals that touch no letter, digit or underscore.
_NUMBER = re.compile(r"\b\d+(?:\.\d+)?\b")

# What a scope is called in a sentence.
PLACES = {"thought": "thought", "solution": "solution", "both": "thought and the solution", "message": "answer"}
Replacement = tuple[int, int, str]
# What may stand in the place of a digit, and in that of one that a longer number begins with.
_OTHERS = {digit: "0123456789".replace(digit, "") for digit in "0123456789"}
_NOT_ZERO = {digit: others.replace("0", "") for digit, others in _OTHERS.items()}


def corrupt_digits(answer: Answer, spec: Spec, rng: random.Random) -> Edit:
    """Replace a fraction of the digits or numbers of the scope, or every digit in a fraction of the sentences that hold one.

    With replacement "digit" each chosen digit becomes another one, a number keeps its length and its first digit stays no zero; with
    "zero-to-ten" each chosen unit becomes one of the eleven whole numbers from 0 to 10, which may be what it was. The answer in its box is
    left alone in every scope but "message", which is everything, as in the paper's code.

    Raises:
        NotApplied: if the tags are broken, there is nothing to replace, or a solution is in scope whose answer cannot be found.
    """
    pattern = _NUMBER if spec.unit == "number" else _DIGIT
    spans = scope_spans(answer, spec.scope)
    spared = [] if spec.scope == "message" else _spared(answer, spans, spec.scope)
    units = [match.span() for start, end in spans for match in pattern.finditer(answer.text, start, end)]
    if spared:
        units = [unit for unit in units if not any(start < unit[1] and unit[0] < end for start, end in spared)]
    if not units:
        raise NotApplied(f"no {'number' if spec.unit == 'number' else 'digit'} in the {PLACES[spec.scope]}")
    groups = _by_sentence(answer.text, spans, units) if spec.unit == "sentence" else [[unit] for unit in units]
    chosen = [groups[index] for index in sorted(_chosen(len(groups), spec, rng))]
    edits = [[(*unit, _replacement(answer.text, unit, spec, rng)) for unit in group] for group in chosen]
    changed = sum(any(answer.text[start:end] != text for start, end, text in group) for group in edits)
    text = _replace(answer.text, [edit for group in edits for edit in group])
    return Edit(text=text, units=len(groups), chosen=len(edits), changed=changed)


def remove_keywords(answer: Answer, spec: Spec, rng: random.Random) -> Edit:
    """Remove a fraction of the sentences of the scope that hold a reasoning keyword, or of the passages of reflection.

    A passage is a run of sentences that reflect (they open as backtracking, doubt or verification, or hold a keyword) together with the
    sentence before it, which is what they reflect on. With the `url` of a server a model removes them, from the whole answer.

    Raises:
        NotApplied: if the tags are broken or there is nothing to remove.
    """
    if spec.url:
        return rewrite_without_reflection(answer, spec)
    pieces = [(span, cut(text := answer.text[slice(*span)], sentences(text))) for span in scope_spans(answer, spec.scope)]
    pattern = keyword_pattern(spec.family)
    find = _keyword_sentences if spec.unit == "sentence" else _passages
    units = [(part, unit) for part, (_, piece) in enumerate(pieces) for unit in find(piece.contents, pattern)]
    if not units:
        raise NotApplied(f"no {spec.unit} of reflection in the {PLACES[spec.scope]}")
    chosen = order_of(len(units), rng)[: whole_share(spec.fraction, len(units))]
    gone = {(part, sentence) for index in chosen for part, unit in [units[index]] for sentence in unit}
    edits = []
    for part, (span, piece) in enumerate(pieces):
        kept = [sentence for sentence in range(len(piece.contents)) if (part, sentence) not in gone]
        if len(kept) < len(piece.contents):
            edits.append((*span, piece.kept(kept)))
    return Edit(text=_replace(answer.text, edits), units=len(units), chosen=len(chosen), changed=len(chosen))


def _spared(answer: Answer, spans: Sequence[Span], scope: str) -> list[Span]:
    """The boxed answers of the scope, and the answer that the solution states where it has no box."""
    spared = [(start + left, start + right) for start, end in spans for left, right in box_spans(answer.text[start:end])]
    if scope != "thought":
        stated = answer_span(answer.solution)
        if stated is None:
            raise NotApplied("no answer found in the solution, so its digits cannot be spared")
        spared.append((answer.solution_start + stated[0], answer.solution_start + stated[1]))
    return spared


def _by_sentence(text: str, spans: Sequence[Span], digits: Sequence[Span]) -> list[list[Span]]:
    """The digits of each sentence that holds some; sentences do not reach over the border of a span."""
    ends = [start + end for start, stop in spans for _, end in sentences(text[start:stop])]
    groups: dict[int, list[Span]] = {}
    for digit in digits:
        groups.setdefault(bisect_right(ends, digit[0]), []).append(digit)
    return list(groups.values())


def _chosen(num_units: int, spec: Spec, rng: random.Random) -> Iterable[int]:
    if spec.choice == "coin":
        draws = [rng.random() for _ in range(num_units)]
        return [index for index, draw in enumerate(draws) if draw < spec.fraction]
    return order_of(num_units, rng)[: whole_share(spec.fraction, num_units)]


def _replacement(text: str, unit: Span, spec: Spec, rng: random.Random) -> str:
    start, end = unit
    old = text[start:end]
    if spec.replacement == "zero-to-ten":
        return str(below(11, rng))
    if spec.unit != "number":
        leads = text[end : end + 1].isdigit() and not text[max(0, start - 1) : start].isdigit()
        others = (_NOT_ZERO if leads else _OTHERS)[old]
        return others[below(len(others), rng)]
    is_long, new = len(old) > 1 and old[1].isdigit(), old
    while new == old:
        digits = [str(below(10, rng)) if character.isdigit() else character for character in old]
        if is_long and old[0] != "0":
            digits[0] = str(1 + below(9, rng))
        new = "".join(digits)
    return new


def _keyword_sentences(contents: Sequence[str], pattern: re.Pattern[str]) -> list[tuple[int, ...]]:
    return [(index,) for index, content in enumerate(contents) if pattern.search(content)]


def _passages(contents: Sequence[str], pattern: re.Pattern[str]) -> list[tuple[int, ...]]:
    runs: list[list[int]] = []
    for index, content in enumerate(contents):
        if marker(content) in REFLECTION or pattern.search(content):
            if runs and runs[-1][-1] == index - 1:
                runs[-1].append(index)
            else:
                runs.append([*([index - 1] if index else []), index])
    # A sentence that is reflected on may itself end another passage.
    taken: set[int] = set()
    passages = []
    for run in runs:
        passages.append(tuple(index for index in run if index not in taken))
        taken.update(run)
    return passages


def _replace(text: str, edits: Sequence[Replacement]) -> str:
    """Lay replacements (start, end, new), in order, over a text."""
    parts, position = [], 0
    for start, end, new in edits:
        parts += [text[position:start], new]
        position = end
    return "".join([*parts, text[position:]])
