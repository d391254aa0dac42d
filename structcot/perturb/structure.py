"""Perturbations of the structure: steps deleted, replaced by steps of other records, or put in another order.

Only the thought changes; everything outside its tags stays as it is, byte for byte.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from structcot.perturb.choose import order_of, whole_share
from structcot.perturb.donors import Donors
from structcot.perturb.edit import FOREIGN, Edit, NotApplied, Pieces, cut, with_thought, without_thought
from structcot.perturb.spec import Spec
from structcot.structure.segmenters import by_marker, whole_steps
from structcot.structure.sentences import Span, paragraphs, sentences
from structcot.tags import Answer


def steps_at(level: str, thought: str, given: Any = None) -> list[Span]:
    """Cut a thought at a level: step, sentence, paragraph, or given by the record's own `steps`.

    Raises:
        NotApplied: if `given` is asked for and does not cover the thought in order and without gaps.
    """
    if level == "sentence":
        return sentences(thought)
    if level == "paragraph":
        return paragraphs(thought)
    if level == "step":
        return [(step.start, step.end) for step in whole_steps(by_marker(thought))]
    if not isinstance(given, list) or not all(isinstance(step, dict) for step in given):
        raise NotApplied("the record has no steps; structcot segment adds them")
    spans = [(step.get("start"), step.get("end")) for step in given]
    edges = [0, *(end for _, end in spans)]
    if not all(isinstance(edge, int) for span in spans for edge in span):
        raise NotApplied("the record's steps have no whole numbers for start and end; run structcot segment on it again")
    is_whole = [start for start, _ in spans] == edges[:-1] and edges[-1] == len(thought)
    if not is_whole or any(start > end for start, end in spans):
        raise NotApplied("the record's steps do not cover its thought; run structcot segment on it again")
    return spans


def delete_steps(answer: Answer, pieces: Pieces, spec: Spec, rng: random.Random) -> Edit:
    """Remove a fraction of the steps; with `match_length` as many as make that fraction of the characters, to the nearest step."""
    candidates = _candidates(len(pieces.contents), spec)
    order = _in_turn(candidates, spec, rng)
    if spec.match_length:
        lengths = [len(pieces.contents[index]) for index in order]
        num_chosen, units = _nearest_prefix(lengths, spec.fraction * sum(lengths)), sum(lengths)
        count = sum(lengths[:num_chosen])
    else:
        num_chosen = count = whole_share(spec.fraction, len(candidates))
        units = len(candidates)
    gone = set(order[:num_chosen])
    kept = tuple(index for index in range(len(pieces.contents)) if index not in gone)
    text = without_thought(answer) if not kept and spec.empty_thought == "drop" else with_thought(answer, pieces.kept(kept))
    return Edit(text=text, units=units, chosen=count, changed=count, order=kept)


def insert_steps(answer: Answer, pieces: Pieces, spec: Spec, rng: random.Random, donors: Donors, own: tuple[str, str]) -> Edit:
    """Replace a fraction of the steps by steps of other records; `own` is the identity and the domain of this one.

    Raises:
        NotApplied: if no other record, or none of the domain asked for, has a step to give.
    """
    candidates = _candidates(len(pieces.contents), spec)
    chosen = sorted(_in_turn(candidates, spec, rng)[: whole_share(spec.fraction, len(candidates))])
    contents, order = list(pieces.contents), list(range(len(pieces.contents)))
    for index in chosen:
        wanted = len(contents[index]) if spec.match_length else None
        contents[index], order[index] = donors.draw(own, spec.donors, rng, wanted), FOREIGN
    changed = sum(contents[index] != pieces.contents[index] for index in chosen)
    text = with_thought(answer, pieces.replaced(contents))
    return Edit(text=text, units=len(candidates), chosen=len(chosen), changed=changed, order=tuple(order))


def shuffle_steps(answer: Answer, pieces: Pieces, spec: Spec, rng: random.Random) -> Edit:
    """Put a fraction of the steps, or of blocks of neighbouring steps, in another order, each in a place that another of them left.

    One step alone cannot move: a share of one is two steps where the fraction makes at least one, else none. With `fixed_points` "allow"
    the chosen steps are permuted without a look at which stay.

    Raises:
        NotApplied: if there are not two steps to exchange.
    """
    candidates = _candidates(len(pieces.contents), spec)
    blocks = [candidates[start : start + spec.block] for start in range(0, len(candidates), spec.block)]
    if len(blocks) < 2:
        raise NotApplied("fewer than two steps to exchange")
    num_chosen = whole_share(spec.fraction, len(blocks))
    if num_chosen == 1 and spec.fixed_points == "avoid":
        num_chosen = 2 if spec.fraction * len(blocks) >= 1 else 0
    chosen = _in_turn(list(range(len(blocks))), spec, rng)[:num_chosen]
    moved = _rotated(chosen, rng) if spec.fixed_points == "avoid" else [chosen[index] for index in order_of(len(chosen), rng)]
    taken = dict(zip(chosen, moved, strict=True))
    order = list(range(len(pieces.contents)))
    if candidates:
        order[candidates[0] : candidates[-1] + 1] = [index for place in range(len(blocks)) for index in blocks[taken.get(place, place)]]
    text = with_thought(answer, pieces.replaced([pieces.contents[index] for index in order]))
    changed = sum(place != content for place, content in taken.items())
    return Edit(text=text, units=len(blocks), chosen=len(chosen), changed=changed, order=tuple(order))


def pieces_of(answer: Answer, spec: Spec, given: Any) -> Pieces:
    """Cut the thought of an answer into the steps that `spec` moves.

    Raises:
        NotApplied: if the tags are broken or the thought is empty.
    """
    if answer.defect:
        raise NotApplied(answer.defect)
    pieces = cut(answer.thought, steps_at(spec.level, answer.thought, given))
    if not pieces.contents:
        raise NotApplied("the thought is empty")
    return pieces


def _candidates(num_steps: int, spec: Spec) -> list[int]:
    """The steps that may change: all, or all but the first and the last."""
    if spec.keep != "ends":
        return list(range(num_steps))
    if num_steps < 3:
        raise NotApplied("no step between the first and the last")
    return list(range(1, num_steps - 1))


def _in_turn(candidates: Sequence[int], spec: Spec, rng: random.Random) -> list[int]:
    """The candidates as they are taken: at random, from the last back to keep a prefix, from the first on to keep a suffix."""
    if spec.keep == "prefix":
        return list(reversed(candidates))
    if spec.keep == "suffix":
        return list(candidates)
    return [candidates[index] for index in order_of(len(candidates), rng)]


def _rotated(places: Sequence[int], rng: random.Random) -> list[int]:
    """A random arrangement in which no place keeps its own: all places in a ring of random order, each taking from the next."""
    ring = [places[index] for index in order_of(len(places), rng)]
    follower = dict(zip(ring, [*ring[1:], *ring[:1]], strict=True))
    return [follower[place] for place in places]


def _nearest_prefix(lengths: Sequence[int], wanted: float) -> int:
    """How many of the first lengths add up to `wanted` most nearly."""
    total, best, best_miss = 0, 0, wanted
    for count, length in enumerate(lengths, 1):
        total += length
        if abs(total - wanted) < best_miss:
            best, best_miss = count, abs(total - wanted)
    return best
