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
from structcot.data.plan import Bins, StepPlan, document_costs, spread
from structcot.data.store import SampleStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """Samples and their plan as one rank reads them; sample s of the plan is number `indices_S[s]` of the store.

    Documents are spread over `num_ranks` shares, of which this rank works on number `rank`; `share` says which slice of its micro-batches'
    tokens it takes, of how many. `max_tokens` bounds the tokens of a rank in a micro-batch; `dropout_seed` is None without dropout, else
    what is dropped depends on it, the step and the sample, never on how samples lie in micro-batches.
    """

    store: SampleStore
    indices_S: np.ndarray
    plan: StepPlan
    max_tokens: int
    attention_ratio: float
    device: torch.device
    dropout_seed: int | None = None
    rank: int = 0
    num_ranks: int = 1
    share: tuple[int, int] = (0, 1)

    @property
    def max_microbatch(self) -> int:
        """Tokens that the ranks which share a micro-batch may hold together."""
        return self.max_tokens * self.share[1]

    def layout(self, step: int) -> Bins:
        """Samples by [rank][micro-batch] of optimizer step `step`, counted from 0; costliest first within a rank."""
        samples = self.plan.samples_of(step)
        return self._spread(samples, self.plan.lengths_S[samples], self.attention_ratio)

    def step_batches(self, step: int) -> list[MicroBatch]:
        """Micro-batches of this rank in optimizer step `step`, in the order in which they run; as many as every other rank has."""
        return [self._pack(numbers, step) for numbers in self.layout(step)[self.rank]]

    def step_lengths(self, step: int) -> list[int]:
        """Tokens of each sample of step `step`, over all ranks."""
        return self.plan.lengths_S[self.plan.samples_of(step)].tolist()

    def num_supervised(self, step: int) -> int:
        """Tokens that have a label in step `step`, over all ranks: what its loss is divided by."""
        return int(self.store.supervised_S[self.indices_S[self.plan.samples_of(step)]].sum())

    def costliest_batch(self) -> MicroBatch:
        """The micro-batch of this rank in the whole run that asks for most."""
        costs_S = document_costs(self.plan.lengths_S, self.attention_ratio)
        firsts = (self.layout(step)[self.rank][0] for step in range(self.plan.num_steps))
        return self._pack(max(firsts, key=lambda numbers: float(costs_S[list(numbers)].sum())), step=0)

    def max_microbatch_tokens(self) -> int:
        """Tokens that a rank holds of the largest micro-batch of the whole run, whichever rank that is."""
        bins = (numbers for step in range(self.plan.num_steps) for rank_bins in self.layout(step) for numbers in rank_bins)
        return -(-max(int(self.plan.lengths_S[list(numbers)].sum()) for numbers in bins) // self.share[1])

    def eval_batches(self, store: SampleStore, indices_E: np.ndarray) -> Iterator[MicroBatch]:
        """Micro-batches of this rank of held-out samples; each sample is in one, of some rank."""
        bins = self._spread(indices_E, store.lengths_S[indices_E], 0.0)
        for numbers in bins[self.rank]:
            yield pack([store.sample(number) for number in numbers], self.device, share=self.share)

    def _spread(self, samples: np.ndarray, lengths: np.ndarray, attention_ratio: float) -> Bins:
        return spread(samples, lengths, num_ranks=self.num_ranks, max_tokens=self.max_microbatch, attention_ratio=attention_ratio)

    def _pack(self, numbers: tuple[int, ...], step: int) -> MicroBatch:
        samples = [self.store.sample(int(self.indices_S[number])) for number in numbers]
        keys = None if self.dropout_seed is None else [_dropout_key(self.dropout_seed, step, number) for number in numbers]
        return pack(samples, self.device, keys, self.share)


def _dropout_key(seed: int, step: int, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{sample}".encode()).digest()[:7], "little")
