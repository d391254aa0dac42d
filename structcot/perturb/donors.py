"""Steps of other records, for insertion.

The donors are a sample of the data set of bounded size, chosen by a hash of the lines, so that it depends neither on their order nor on the
number of processes, and a data set of any length can be perturbed without holding it.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from structcot.perturb.choose import below
from structcot.perturb.edit import NotApplied
from structcot.perturb.spec import Spec
from structcot.traces import Trace

MAX_DONOR_BYTES = 16_000_000
DOMAIN_FIELDS = ("domain", "subject", "type", "dataset", "source")
MAX_DRAWS = 1000
# To match a length, the nearest of this many steps is taken.
DRAWS_PER_MATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Donors:
    """Steps that may be inserted: step i has the text steps[i] and comes from record owners[i], a pair of identity and domain."""

    steps: tuple[str, ...] = ()
    owners: tuple[tuple[str, str], ...] = ()

    def draw(self, own: tuple[str, str], rule: str, rng: random.Random, length: int | None) -> str:
        """Draw a step of another record for the record `own`; of several the nearest to `length` characters where one is given.

        Raises:
            NotApplied: if none is found, or a domain is asked for and the record names none.
        """
        if rule != "any" and not own[1]:
            raise NotApplied("the record names no domain; name its field with domain=FIELD")
        found: list[str] = []
        for _ in range(MAX_DRAWS if self.steps else 0):
            index = below(len(self.steps), rng)
            owner = self.owners[index]
            is_fit = rule == "any" or ((owner[1] == own[1]) == (rule == "in-domain") and owner[1])
            if owner[0] != own[0] and is_fit:
                found.append(self.steps[index])
                if len(found) == (1 if length is None else DRAWS_PER_MATCH):
                    break
        if not found:
            raise NotApplied(f"no other record to take steps from ({rule})")
        return found[0] if length is None else min(found, key=lambda step: abs(len(step) - length))


def sample_lines(lines: Iterable[tuple[str, bytes]], seed: int) -> list[tuple[str, bytes]]:
    """Choose the lines of smallest hash that together take at most `MAX_DONOR_BYTES`; at least one where there is one."""
    heap: list[tuple[int, str, bytes]] = []
    held = 0
    for source, line in lines:
        digest = hashlib.blake2b(line, digest_size=8, key=str(seed).encode()).digest()
        heapq.heappush(heap, (-int.from_bytes(digest), source, line))
        held += len(line)
        while held > MAX_DONOR_BYTES and len(heap) > 1:
            held -= len(heapq.heappop(heap)[2])
    return [(source, line) for _, source, line in sorted(heap, key=lambda entry: -entry[0])]


def domain_of(trace: Trace, spec: Spec) -> str:
    """The domain that a record names, in the field `domain` of the spec or the first of `DOMAIN_FIELDS` that it has; "" if none."""
    names = (spec.domain,) if spec.domain else DOMAIN_FIELDS
    values: list[Any] = [trace.record.get(name) for name in names]
    return next((value for value in values if isinstance(value, str)), "")
