"""Seeded choices that nest: what a fraction of 0.3 chooses, a fraction of 0.6 chooses too.

Every record has a stream of its own, made from the seed, the record and the place of the perturbation among those applied, so a choice does
not depend on other records, on their order or on the number of processes. Only `Random.random` is used, whose numbers Python promises to
keep.
"""

from __future__ import annotations

import math
import random


def stream(seed: int, stage: int, kind: str, identity: str) -> random.Random:
    """The random numbers of one perturbation of one record."""
    return random.Random(f"{seed}/{stage}/{kind}/{identity}".encode("utf-8", "surrogatepass"))


def whole_share(fraction: float, num_units: int) -> int:
    """How many of `num_units` a fraction is: the nearest whole number, the larger one at a half."""
    return math.floor(fraction * num_units + 0.5)


def order_of(num_units: int, rng: random.Random) -> list[int]:
    """A random order of the units; a fraction takes its first part."""
    keys = [rng.random() for _ in range(num_units)]
    return sorted(range(num_units), key=keys.__getitem__)


def below(limit: int, rng: random.Random) -> int:
    """A random whole number from 0 to limit - 1."""
    return int(rng.random() * limit)
