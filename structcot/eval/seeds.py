"""The seed of one request, for engines that take their random numbers from a seed."""

from __future__ import annotations

import hashlib

from structcot.eval.engine import Request


def seed_of(request: Request) -> int:
    """Derive the seed from `seed` and `key` of the request alone: a number below 2**31, for engines that count in 32 bits."""
    digest = hashlib.sha256(f"{request.seed} {request.key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") >> 1
