"""Micro-batches for one rank: those of a step, those of the held-out data, and the costliest of the whole run.

Legend: S samples of the plan, E held-out samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from structcot.data.batch import MicroBatch, pack
from structcot.data.plan import StepPlan, document_costs, spread
from structcot.data.store import SampleStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Samples and their plan as one process reads them; sample s of the plan is number `indices_S[s]` of the store.

    `max_tokens` bounds a micro-batch; `dropout_seed` is None without dropout, else what is dropped depends on it, the step and the sample,
    never on how samples lie in micro-batches.
    """

    store: SampleStore
    indices_S: np.ndarray
    plan: StepPlan
    max_tokens: int
    attention_ratio: float
    device: torch.device
    dropout_seed: int | None = None

    def bins(self, step: int) -> list[tuple[int, ...]]:
        """Samples of each micro-batch of optimizer step `step`, counted from 0, costliest first."""
        samples = self.plan.samples_of(step)
        lengths = self.plan.lengths_S[samples]
        (bins,) = spread(samples, lengths, num_ranks=1, max_tokens=self.max_tokens, attention_ratio=self.attention_ratio)
        return list(bins)

    def step_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `step`, in the order in which they run."""
        return [self._pack(numbers, step) for numbers in self.bins(step)]

    def costliest_batch(self) -> MicroBatch:
        """The micro-batch of the whole run that asks for most."""
        costs_S = document_costs(self.plan.lengths_S, self.attention_ratio)
        firsts = (self.bins(step)[0] for step in range(self.plan.num_steps))
        return self._pack(max(firsts, key=lambda numbers: float(costs_S[list(numbers)].sum())), step=0)

    def max_microbatch_tokens(self) -> int:
        """Tokens of the largest micro-batch of the whole run."""
        return max(
            int(self.plan.lengths_S[list(numbers)].sum()) for step in range(self.plan.num_steps) for numbers in self.bins(step) if numbers
        )

    def _pack(self, numbers: tuple[int, ...], step: int) -> MicroBatch:
        samples = [self.store.sample(int(self.indices_S[number])) for number in numbers]
        if self.dropout_seed is None:
            return pack(samples, self.device)
        return pack(samples, self.device, [_dropout_key(self.dropout_seed, step, number) for number in numbers])


def eval_batches(store: SampleStore, indices_E: np.ndarray, max_tokens: int, device: torch.device) -> Iterator[MicroBatch]:
    """Each held-out sample once, in micro-batches of at most `max_tokens` tokens."""
    (bins,) = spread(indices_E, store.lengths_S[indices_E], num_ranks=1, max_tokens=max_tokens, attention_ratio=0.0)
    for numbers in bins:
        yield pack([store.sample(number) for number in numbers], device)


def _dropout_key(seed: int, step: int, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{sample}".encode()).digest()[:7], "little")
