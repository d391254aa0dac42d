"""What a number of right answers says: accuracy with an interval, pass@k, majority votes, accuracy within a budget of tokens.

The unit of chance is the problem: samples of one problem are alike, so every interval is over problems and never over samples. An accuracy
is a share between 0 and 1; every interval is meant to cover 95 %. Shape legend: P problems, S samples, B budgets, V values.

Which interval, and why. With 30 problems and one greedy sample each, resampling (the bootstrap) says "100 % to 100 %" of a model that
solves all of them, and covers the truth too seldom near both ends. Wilson's score interval does neither, but knows one sample a problem
only. So an accuracy gets Wilson's interval at the effective number of samples: as many independent samples as would scatter like the
problems do. That is the number of problems for one sample each, and more where several samples tell what a problem's chance is (the idea
of Korn and Graubard, Survey Methodology 24, 1998, who take Clopper's and Pearson's interval). The plain bootstrap stands beside it for
comparison with other tools.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Two-sided 95 % of the normal distribution.
CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.959963984540054
NUM_RESAMPLES = 10_000
NUM_BUDGETS = 48
SHORTEST_BUDGET_TOKENS = 32
# Shares of samples are differences of fractions; beyond this common denominator they are rounded to it for the test.
MAX_DENOMINATOR = 840

Interval = tuple[float, float]


def pass_at_k(num_samples_P: np.ndarray, num_right_P: np.ndarray, k: int) -> np.ndarray:
    """Chance that of k of a problem's samples, drawn without replacement, at least one is right: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate of Chen et al. 2021 (arXiv 2107.03374), as their product over k factors, which no factorial overflows.

    Raises:
        ValueError: if a problem has fewer than k samples, or more right ones than samples.
    """
    if k < 1 or np.any(num_samples_P < k) or np.any(num_right_P > num_samples_P):
        raise ValueError(f"pass@{k}: needs at least {k} samples of every problem, and no more right ones than samples")
    wrong_P = num_samples_P - num_right_P
    miss_P = np.ones(len(num_samples_P))
    for drawn in range(k):
        # Once the wrong samples are used up the factor is 0 and stays so.
        miss_P = miss_P * np.maximum(wrong_P - drawn, 0) / (num_samples_P - drawn)
    return 1.0 - miss_P


def powers_of_two(limit: int) -> list[int]:
    """List 1, 2, 4, ... up to `limit`."""
    return [2**power for power in range(limit.bit_length())] if limit > 0 else []


def wilson_interval(share: float, num_trials: float) -> Interval:
    """Wilson's score interval of a share observed in `num_trials` independent trials, which need not be a whole number."""
    if num_trials <= 0:
        return 0.0, 1.0
    square = NORMAL_QUANTILE**2
    centre = (share + square / (2 * num_trials)) / (1 + square / num_trials)
    variance = share * (1 - share) / num_trials + square / (4 * num_trials**2)
    half_width = NORMAL_QUANTILE / (1 + square / num_trials) * math.sqrt(variance)
    # All right means an upper end of 1 and not of 0.9999999999999999.
    return (0.0 if share == 0 else max(0.0, centre - half_width)), (1.0 if share == 1 else min(1.0, centre + half_width))


def effective_samples(means_P: np.ndarray, num_samples_P: np.ndarray) -> float:
    """Number of independent samples whose mean would scatter as the mean over these problems does: a (1 - a) / (variance / P).

    It is P for one sample a problem, and never more than all samples together: equal means are no proof that all problems are equal.
    """
    share, variance = float(means_P.mean()), float(means_P.var())
    num_samples = float(num_samples_P.sum())
    if share in (0.0, 1.0):
        return float(len(means_P))
    return num_samples if variance == 0 else min(num_samples, share * (1 - share) / variance * len(means_P))


def accuracy_interval(means_P: np.ndarray, num_samples_P: np.ndarray) -> Interval:
    """95 % interval of the mean of `means_P`, the share of right samples of each problem: Wilson's, at the effective number of samples."""
    return wilson_interval(float(means_P.mean()), effective_samples(means_P, num_samples_P))


def resampled_means(values_P: np.ndarray, seed: int, pseudo: Sequence[tuple[float, float]] = ()) -> np.ndarray:
    """Means of `NUM_RESAMPLES` draws of the problems with replacement; `pseudo` adds (value, weight) pairs to what is drawn from.

    Problems of one value are alike to a mean, so how often each value is drawn is drawn at once: a multinomial over the few values.
    """
    values_V, counts_V = np.unique(values_P, return_counts=True)
    values_V = np.concatenate([values_V, [value for value, _ in pseudo]])
    weights_V = np.concatenate([counts_V, [weight for _, weight in pseudo]]).astype(np.float64)
    num_drawn = round(weights_V.sum())
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_drawn, weights_V / weights_V.sum(), size=NUM_RESAMPLES) @ values_V / num_drawn


def bootstrap_interval(values_P: np.ndarray, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean over problems. Of equal values it has no width, which says nothing: see `accuracy_interval`."""
    return middle(resampled_means(values_P, seed))


def middle(draws: np.ndarray) -> Interval:
    """Give the range of the middle 95 % of the draws."""
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mean_interval(means: Sequence[float], intervals: Sequence[Interval]) -> Interval:
    """95 % interval of the unweighted mean of independent estimates, from the interval of each.

    The distances from the estimates to their ends add up like standard errors, on each side by itself (the method of variance estimates
    recovery; Zou and Donner, Statistics in Medicine 27, 2008).
    """
    mean, count = sum(means) / len(means), len(means)
    below = math.sqrt(sum((one - low) ** 2 for one, (low, _) in zip(means, intervals, strict=True))) / count
    above = math.sqrt(sum((high - one) ** 2 for one, (_, high) in zip(means, intervals, strict=True))) / count
    return mean - below, mean + above


def majority_share(answers: Sequence[str], right: Sequence[bool]) -> float:
    """Chance that a vote of the samples of one problem is right: the answer given most often wins, a tie is drawn by lot.

    Answers are votes for the text they are written in; samples without an answer do not vote. An answer counts as right where most samples
    that give it do.
    """
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    is_right = [2 * sum(r for answer, r in zip(answers, right, strict=True) if answer == winner) > most for winner in winners]
    return sum(is_right) / len(winners)


def budget_grid(longest_tokens: int) -> list[int]:
    """Budgets of tokens, evenly spaced on a logarithmic scale up to the longest output, which is the last."""
    shortest = min(SHORTEST_BUDGET_TOKENS, longest_tokens)
    if longest_tokens < 1:
        return []
    grid = np.unique(np.geomspace(max(1, shortest), longest_tokens, NUM_BUDGETS).round().astype(int))
    return [*grid[:-1].tolist(), longest_tokens]


def accuracy_within(budgets_B: Sequence[int], tokens_S: np.ndarray, right_S: np.ndarray, weight_S: np.ndarray) -> list[float]:
    """Accuracy at each budget if every output longer than it were wrong; `weight_S` is what one right sample adds to the accuracy."""
    order = np.argsort(tokens_S, kind="stable")
    gained = np.concatenate([[0.0], np.cumsum(weight_S[order] * right_S[order])])
    return gained[np.searchsorted(tokens_S[order], np.asarray(budgets_B), side="right")].tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Two models on the same problems: A's accuracy less B's, with its interval, and the odds of such a difference by chance.

    `only_a` and `only_b` count problems on which A or B has the larger share of right samples; `test` names the test of `p_value`.
    """

    difference: float
    interval: Interval
    p_value: float
    test: str
    problems: int
    only_a: int
    only_b: int


def compare_paired(means_a_P: np.ndarray, means_b_P: np.ndarray, num_a_P: np.ndarray, num_b_P: np.ndarray, seed: int = 0) -> Paired:
    """Compare the shares of right samples of two models, problem by problem; `num_a_P` and `num_b_P` are the samples behind each share.

    The interval is the percentile bootstrap over problems of the difference, after adding what was not seen: half a problem that A does
    better by one sample, half one that B does, and one on which they are equal. For one sample a problem that is the adjustment of Agresti
    and Min (Statistics in Medicine 24, 2005); it keeps two models with the same answers from being called equal for sure.

    Raises:
        ValueError: if there is no problem.
    """
    if not len(means_a_P):
        raise ValueError("compare_paired: needs at least one problem that both models were given")
    differences_P = means_a_P - means_b_P
    one_sample = 1.0 / max(1.0, float(np.minimum(num_a_P, num_b_P).mean()))
    pseudo = [(one_sample, 0.5), (-one_sample, 0.5), (0.0, 1.0)]
    is_single = bool(np.all(num_a_P == 1) and np.all(num_b_P == 1))
    denominator = min(MAX_DENOMINATOR, math.lcm(*map(int, {*num_a_P.tolist(), *num_b_P.tolist()})))
    return Paired(
        difference=float(differences_P.mean()),
        interval=middle(resampled_means(differences_P, seed, pseudo)),
        p_value=sign_flip_p(np.rint(differences_P * denominator).astype(np.int64)),
        test="McNemar's exact test" if is_single else "exact sign-flip test",
        problems=len(differences_P),
        only_a=int((differences_P > 1e-9).sum()),
        only_b=int((differences_P < -1e-9).sum()),
    )


def sign_flip_p(differences_P: np.ndarray) -> float:
    """Two-sided p-value of whole-numbered paired differences: the odds of a sum as far from 0 if each sign were the toss of a coin.

    Exact, by adding the differences one by one to the distribution of their sum. Of differences -1, 0 and 1 it is McNemar's exact test.
    """
    sizes = [int(size) for size in np.abs(differences_P) if size]
    total = sum(sizes)
    odds = np.zeros(2 * total + 1)
    odds[total] = 1.0
    for size in sizes:
        moved = np.zeros_like(odds)
        moved[size:] += 0.5 * odds[: len(odds) - size]
        moved[: len(odds) - size] += 0.5 * odds[size:]
        odds = moved
    reached = abs(int(differences_P.sum()))
    far = np.abs(np.arange(-total, total + 1)) >= reached
    return min(1.0, float(odds[far].sum()))
