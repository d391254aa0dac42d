"""Which samples make which optimizer step, and how a step is laid over ranks and micro-batches.

A step is a set of samples in seeded order, whatever the number of GPUs: `make_plan` does not know how many there are. `spread` then lays
one step over (rank, micro-batch) bins. Documents lie end to end in a bin, so there is no padding and nothing is cut; every rank runs the
same number of micro-batches, since each one holds collective operations; and the costliest rank is as cheap as can be found, since all
others wait for it. Both are pure functions of their arguments, so any rank, any process and any later run gets the same plan.

Cost of a document of L tokens, in units of one token's matrix products: L + a L^2, where a = layers * heads * head_dim / matmul parameters
is causal attention's share (2 L^2 heads head_dim floating-point operations a layer against 2 L parameters).

Legend: S samples, N visits of samples in the whole run, K optimizer steps.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from structcot.config import TrainConfig
from structcot.errors import ConfigError, DataError

GIANT_SHARE = 1 / 16
"""A document with more than this share of a mean step's tokens is dealt out evenly over the steps: 16 ranks could not share it."""

MAX_MEASURED = 256
"""Steps that `imbalance` looks at, evenly spaced."""

Integers = Sequence[int] | NDArray[np.int64]

Bins = tuple[tuple[tuple[int, ...], ...], ...]
"""Sample numbers by [rank][micro-batch]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The samples of every step of a run.

    `order_N` lists sample numbers as the run visits them; step k holds `order_N[starts_K1[k]:starts_K1[k + 1]]`; after it,
    `epochs_K[k]` epochs are done.
    """

    lengths_S: NDArray[np.int64]
    order_N: NDArray[np.int64]
    starts_K1: NDArray[np.int64]
    epochs_K: NDArray[np.float64]
    steps_per_epoch: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return len(self.starts_K1) - 1

    @property
    def sha256(self) -> str:
        """Hash of what is visited when: equal on every world size, different where any sample, length or order differs."""
        digest = hashlib.sha256(b"step plan 1")
        for array in (self.lengths_S, self.order_N, self.starts_K1):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()

    def samples_of(self, step: int) -> NDArray[np.int64]:
        """Sample numbers of optimizer step `step`, counted from 0."""
        return self.order_N[self.starts_K1[step] : self.starts_K1[step + 1]]


def make_plan(lengths_S: Integers, config: TrainConfig, seed: int, weights_S: NDArray[np.float64] | None = None) -> StepPlan:
    """Plan a whole run over samples of the given lengths in tokens.

    An epoch visits every sample once (`weights_S`: that many times; a fraction by seeded choice) in an order drawn from (seed, epoch). It
    is cut into ceil(samples / batch_sequences) steps whose sizes differ by at most one, so no step is a small remainder with a noisy
    gradient. The order does not depend on lengths, but for documents so long that no layout balances a step which drew too few of them.

    Raises:
        DataError: if there is no sample.
    """
    lengths = np.asarray(lengths_S, dtype=np.int64)
    if len(lengths) == 0:
        raise DataError("data.train: no sample is left to train on; see data/rejected.jsonl in the output directory for the reasons")
    orders, sizes, epochs = [], [], []
    steps_wanted = config.max_steps
    steps_per_epoch, epoch, num_steps = 0, 0, 0
    while epoch == 0 or num_steps < steps_wanted:
        order = _epoch_order(len(lengths), weights_S, seed, epoch)
        starts = _cut_into_steps(lengths[order], config)
        if config.batch_sequences:
            order = _deal_out_giants(order, starts, lengths)
        if epoch == 0:
            steps_per_epoch = len(starts) - 1
            if steps_wanted < 0:
                steps_wanted = int(np.ceil(round(config.num_train_epochs * steps_per_epoch, 6)))
        steps = min(len(starts) - 1, steps_wanted - num_steps)
        orders.append(order[: starts[steps]])
        sizes.append(np.diff(starts[: steps + 1]))
        epochs.append(epoch + np.arange(1, steps + 1) / (len(starts) - 1))
        num_steps, epoch = num_steps + steps, epoch + 1
    return StepPlan(
        lengths_S=lengths,
        order_N=np.concatenate(orders),
        starts_K1=np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64),
        epochs_K=np.concatenate(epochs),
        steps_per_epoch=steps_per_epoch,
    )


def document_costs(lengths: Integers, attention_ratio: float) -> NDArray[np.float64]:
    """Cost of documents in units of one token's matrix products; `attention_ratio` is the module docstring's a, per token."""
    tokens = np.asarray(lengths, dtype=np.float64)
    return tokens + attention_ratio * tokens**2


def spread(samples: Integers, lengths: Integers, *, num_ranks: int, max_tokens: int, attention_ratio: float) -> Bins:
    """Lay the samples of one step over ranks and micro-batches of at most `max_tokens` tokens.

    Every rank gets the same number of micro-batches, the fewest that fit; within a rank the costliest comes first, so that ranks meet in
    collectives with micro-batches of like cost. A bin is empty only where a rank has fewer samples than micro-batches.

    Raises:
        ConfigError: if a sample is longer than `max_tokens`.
    """
    if max(lengths) > max_tokens:
        raise ConfigError(
            f"parallel.max_tokens_per_microbatch: got {max_tokens}, but the longest sample has {max(lengths)} tokens and none is cut;"
            f' raise it to {max(lengths)}, or lower data.max_length with data.overlong = "drop"'
        )
    costs = document_costs(np.asarray(lengths), attention_ratio)
    shares = _share_out(costs, num_ranks)
    num_bins = max(len(_first_fit(share, lengths, max_tokens)) for share in shares)
    bins = [_fill_bins(share, lengths, costs, [0.0] * num_bins, max_tokens) for share in shares]
    # A rank with one long document cannot make its micro-batches equal; the others then do better to be as unequal as it is.
    profile = max(([float(costs[one].sum()) for one in rank_bins] for rank_bins in bins), key=lambda profile: profile[0])
    alike = [_fill_bins(share, lengths, costs, profile, max_tokens) for share in shares]
    if waited_cost(alike, costs) < (1 - 1e-9) * waited_cost(bins, costs):  # and not by rounding: a rank alone waits for nobody
        bins = alike
    return tuple(tuple(tuple(int(samples[item]) for item in one) for one in rank_bins) for rank_bins in bins)


def imbalance(plan: StepPlan, *, num_ranks: int, max_tokens: int, attention_ratio: float) -> float:
    """Mean over the steps of one epoch of (costliest rank / mean rank), 1.0 being perfect; of a long epoch MAX_MEASURED steps count."""
    ratios = []
    costs_S = document_costs(plan.lengths_S, attention_ratio)
    num_steps = min(plan.steps_per_epoch, plan.num_steps)
    for step in np.linspace(0, num_steps - 1, min(num_steps, MAX_MEASURED)).astype(int):
        samples = plan.samples_of(step)
        bins = spread(samples, plan.lengths_S[samples], num_ranks=num_ranks, max_tokens=max_tokens, attention_ratio=attention_ratio)
        ranks = [sum(costs_S[sample] for one in rank_bins for sample in one) for rank_bins in bins]
        ratios.append(max(ranks) / (sum(ranks) / len(ranks)))
    return float(np.mean(ratios))


def _epoch_order(num_samples: int, weights_S: NDArray[np.float64] | None, seed: int, epoch: int) -> NDArray[np.int64]:
    generator = np.random.default_rng([seed, epoch])
    visits = np.arange(num_samples)
    if weights_S is not None:
        whole = np.floor(weights_S)
        once_more = generator.random(num_samples) < weights_S - whole
        visits = np.repeat(visits, (whole + once_more).astype(np.int64))
    if len(visits) == 0:
        raise DataError("data.train: the weights leave no sample in an epoch; raise a weight")
    return generator.permutation(visits)


def _cut_into_steps(lengths_N: NDArray[np.int64], config: TrainConfig) -> NDArray[np.int64]:
    """Starts of the steps of one epoch, and its end."""
    if config.batch_sequences:
        num_steps = -(-len(lengths_N) // config.batch_sequences)
        return np.arange(num_steps + 1) * len(lengths_N) // num_steps
    ends = np.cumsum(lengths_N)
    num_steps = -(-int(ends[-1]) // (config.batch_tokens or 1))
    inner = np.searchsorted(ends, np.arange(1, num_steps) * ends[-1] / num_steps)
    return np.unique(np.concatenate([[0], inner, [len(lengths_N)]]))


def _deal_out_giants(order_N: NDArray[np.int64], starts: NDArray[np.int64], lengths_S: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give every step its even share of the documents that hold over GIANT_SHARE of a mean step's tokens; the rest keeps its order.

    Where steps are so small that not every one can take its share, there is nothing to balance and the order stays as drawn.
    """
    num_steps = len(starts) - 1
    giant_N = lengths_S[order_N] > GIANT_SHARE * lengths_S[order_N].sum() / num_steps
    giants, others = order_N[giant_N], order_N[~giant_N]
    quota = np.minimum(np.diff(np.arange(num_steps + 1) * len(giants) // num_steps), np.diff(starts))
    if quota.sum() < len(giants):
        return order_N
    dealt = []
    for step, size in enumerate(np.diff(starts)):
        first_giant = int(quota[:step].sum())
        first_other = int(starts[step]) - first_giant
        dealt += [giants[first_giant : first_giant + quota[step]], others[first_other : first_other + size - quota[step]]]
    return np.concatenate(dealt)


def _share_out(costs: NDArray[np.float64], num_ranks: int) -> list[list[int]]:
    """Items of each rank: largest first to the cheapest rank, then swaps that lower the costliest one until none helps."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, rank) for rank in range(num_ranks)]
    for item in np.argsort(-costs, kind="stable"):
        load, rank = heapq.heappop(loads)
        shares[rank].append(int(item))
        heapq.heappush(loads, (load + float(costs[item]), rank))
    for _ in range(4 * len(costs) if num_ranks > 1 else 0):
        if not _swap_once(shares, costs):
            break
    return shares


def _swap_once(shares: list[list[int]], costs: NDArray[np.float64]) -> bool:
    """Exchange one item of the costliest rank for a cheaper one (or none) elsewhere, where that lowers the larger of the two loads most."""
    loads = [float(costs[share].sum()) for share in shares]
    top = int(np.argmax(loads))
    best = (loads[top] * (1 - 1e-6), -1, -1, -1)
    for rank, share in enumerate(shares):
        if rank == top:
            continue
        gives = costs[shares[top]][:, None] - np.concatenate([costs[share], [0.0]])[None, :]
        larger = np.maximum(loads[top] - gives, loads[rank] + gives)
        mine, theirs = np.unravel_index(int(np.argmin(larger)), larger.shape)
        best = min(best, (float(larger[mine, theirs]), rank, int(mine), int(theirs)))
    _, rank, mine, theirs = best
    if rank < 0:
        return False
    item = shares[top].pop(mine)
    if theirs < len(shares[rank]):
        shares[top].append(shares[rank].pop(theirs))
    shares[rank].append(item)
    return True


def _first_fit(share: list[int], lengths: Integers, max_tokens: int) -> list[list[int]]:
    """Bins of at most `max_tokens` by first fit decreasing: within 11/9 of the fewest possible (Johnson 1973)."""
    bins: list[list[int]] = []
    rooms: list[int] = []
    for item in sorted(share, key=lambda item: -lengths[item]):
        for number, room in enumerate(rooms):
            if lengths[item] <= room:
                bins[number].append(item)
                rooms[number] -= lengths[item]
                break
        else:
            bins.append([item])
            rooms.append(max_tokens - lengths[item])
    return bins or [[]]


def waited_cost(bins: Sequence[Sequence[Sequence[int]]], costs: NDArray[np.float64]) -> float:
    """Sum over micro-batches of the costliest rank's, for which all others wait; `bins` are items by [rank][micro-batch]."""
    return sum(max(float(costs[list(one)].sum()) for one in microbatch) for microbatch in zip(*bins, strict=True))


def _fill_bins(
    share: list[int], lengths: Integers, costs: NDArray[np.float64], profile: Sequence[float], max_tokens: int
) -> list[list[int]]:
    """As many bins as `profile` has, each about as far above its cost there, costliest first.

    Tight fits fall back to first fit, which is known to fit.
    """
    num_bins = len(profile)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    rooms, loads = [max_tokens] * num_bins, [-cost for cost in profile]
    for item in sorted(share, key=lambda item: -lengths[item]):
        fitting = [number for number in range(num_bins) if lengths[item] <= rooms[number]]
        if not fitting:
            tight = _first_fit(share, lengths, max_tokens)
            bins = [*tight, *([] for _ in range(num_bins - len(tight)))]
            break
        number = min(fitting, key=lambda number: loads[number])
        bins[number].append(item)
        rooms[number] -= lengths[item]
        loads[number] += costs[item]
    return sorted(bins, key=lambda one: -float(costs[one].sum()))
