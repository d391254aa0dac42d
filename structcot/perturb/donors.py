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
from itertools import islice
from typing import Any

from structcot.perturb.choose import below
from structcot.perturb.edit import NotApplied
from structcot.perturb.spec import Spec
from structcot.traces import Trace

MAX_DONOR_BYTES = 16_000_000
DOMAIN_FIELDS = ("domain", "subject", "type", "dataset", "source")
MAX_DRAWS = 64
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
        wanted = 1 if length is None else DRAWS_PER_MATCH
        draws = (below(len(self.steps), rng) for _ in range(MAX_DRAWS if self.steps else 0))
        fitting = list(islice((index for index in draws if self._fits(index, own, rule)), wanted))
        if not fitting:  # they are few, or none
            listed = [index for index in range(len(self.steps)) if self._fits(index, own, rule)]
            fitting = [listed[below(len(listed), rng)] for _ in range(wanted if listed else 0)]
        if not fitting:
            raise NotApplied(f"no other record to take steps from ({rule})")
        found = [self.steps[index] for index in fitting]
        return found[0] if length is None else min(found, key=lambda step: abs(len(step) - length))

    def _fits(self, index: int, own: tuple[str, str], rule: str) -> bool:
        identity, domain = self.owners[index]
        return identity != own[0] and (rule == "any" or (bool(domain) and (domain == own[1]) == (rule == "in-domain")))


def sample_lines(lines: Iterable[tuple[str, bytes]], seed: int) -> list[tuple[str, bytes]]:
    """Choose the first lines, in the order of their hashes, that together take at most `MAX_DONOR_BYTES`; one of several at least."""
    heap: list[tuple[int, str, bytes]] = []
    held, limit = 0, 1 << 64
    for source, line in lines:
        text = line.strip()
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=8, key=str(seed).encode()).digest())
        if digest >= limit:
            continue
        heapq.heappush(heap, (-digest, source, text))
        held += len(text)
        while held > MAX_DONOR_BYTES and len(heap) > 1:
            # Whatever comes after a line that found no room finds none either.
            negative, _, dropped = heapq.heappop(heap)
            held, limit = held - len(dropped), -negative
    return [(source, line) for _, source, line in sorted(heap, key=lambda entry: -entry[0])]


def domain_of(trace: Trace, spec: Spec) -> str:
    """The domain that a record names, in the field `domain` of the spec or the first of `DOMAIN_FIELDS` that it has; "" if none."""
    names = (spec.domain,) if spec.domain else DOMAIN_FIELDS
    values: list[Any] = [trace.record.get(name) for name in names]
    return next((value for value in values if isinstance(value, str)), "")
