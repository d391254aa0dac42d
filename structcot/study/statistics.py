"""What the right answers of a study say: accuracies, differences, trends, each with a 95 % interval over problems and training seeds.

An *arm* is what one way to train has answered: an array right_SP of shares of right samples, training seeds by problems, the problems in
the same order in all arms; or one such array for each task, of which the unweighted mean is meant. Arms may differ in the number of seeds.
Shape legend: S seeds, P problems, T tasks. Shares are between 0 and 1.

Two chances meet: the problems drawn, which all arms share, and the seeds, which each arm has of its own. An interval is the estimate plus
and minus a t-quantile times the square root of two variances:

    problems   between problems, of the (paired) mean over seeds; it holds the chance of single samples as well
    seeds      between the means of the seeds, less what single samples put there, never below 0

Both are what a bootstrap over problems and over seeds estimates, once the latter is scaled by S / (S - 1), without its random numbers:
nothing here is drawn. The degrees of freedom are Satterthwaite's (Biometrics Bulletin 2, 1946). Contrasts get half a problem that speaks
for either side by one sample, and one that speaks for none, after Agresti and Min (Statistics in Medicine 24, 2005).

Why this one: in simulation (difficulties of problems from Beta distributions, an effect of seeds of standard deviation up to 0.3 on the
logit scale, accuracies of 5 to 90 %, 1,000 studies each) intervals of 95 % held the truth in these per cent of cases:

    seeds, problems             accuracy       difference     note
    3 or 5, 200 or 500          93.5 to 97     94 to 98       98 where seeds have no effect at all
    3 or 5, 30                  92 to 98       95.5 to 98     few right answers are counted in jumps
    1, 200 or 500               94 to 97       93.5 to 96.5   of seeds without effect; else they are not in it
    1, 30                       92 to 97.5     95 to 99.8     99.8 at an accuracy of 5 %
    2, any                      87.5 to 98     91.5 to 99     too few where the effect of seeds is large: two do not show it
    any, seed noise pooled      91 to 98       91 to 98       mean 95; 300 studies each, so within 2.5 points

A percentile bootstrap over problems and seeds, the plain way, held a difference in 90 % at three seeds and in 82 % at two. Alone, an arm of
three seeds says so little of their noise that a difference of 12 points at 500 problems is found in 44 % of studies with 12 variants; with
the noise pooled by `seed_noise`, in 99 %. Any of 12 equal variants is then called different in at most 5 % of studies, at two, three or
five seeds; without pooling in up to 15 % at two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from structcot.eval.statistics import CONFIDENCE, NORMAL_QUANTILE, Interval, accuracy_interval, mean_interval

SIGNIFICANCE = 0.05
WORSE, BETTER, NOISE = "worse", "better", "within noise"
# Times the median variance between seeds, beyond which an arm is not like the others: 1 in 400 arms of two seeds by chance.
LOUD = 20.0
# A slope is told for this step of the fraction.
FRACTION_STEP = 0.1
# Shares with a larger common denominator are taken as those of this many samples.
MAX_SAMPLES = 64
# Variances below it are 0, give or take the order in which numbers were added.
ROUND_OFF = 1e-12
# From here on Student's distribution is the normal one, to 5 digits.
MANY_DEGREES = 10_000.0
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(128)

Arm = np.ndarray | Sequence[np.ndarray]
Point = tuple[float, Arm]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    interval: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A difference of accuracies, its 95 % interval, and the odds of one as far from 0 by chance, before any correction."""

    value: float
    interval: Interval
    p_value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """Accuracy with a broken structure less that with a broken content, where both are as far from the original, in edit distance."""

    edit_distance: float
    difference: Difference


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedNoise:
    """Variance between training seeds of the accuracy of one: as `seen`, and what of it the chance of single samples explains.

    `degrees` of freedom are behind it. Where it is pooled, an arm that shows more than `limit` is another matter and keeps its own.
    """

    seen: float
    by_samples: float
    degrees: int
    limit: float = 0.0


def seed_noise(arms: Sequence[Arm]) -> SeedNoise | None:
    """Noise of the seeds, pooled over arms of the same tasks that were trained alike; None if none has two seeds.

    Three seeds of one arm say little about their noise, those of a dozen arms much; what is pooled is taken to be alike. An arm with more
    than 20 times the median of the variances, as of a training that fails with some seeds, is left out.

    Raises:
        ValueError: if an arm has no seed or no problem.
    """
    noises = [noise for noise in map(_noise_of, map(_tasks_of, arms)) if noise is not None]
    if not noises:
        return None
    limit = LOUD * float(np.median([noise.seen for noise in noises]))
    alike = [noise for noise in noises if noise.seen <= limit]
    degrees = sum(noise.degrees for noise in alike)
    return SeedNoise(
        seen=sum(noise.degrees * noise.seen for noise in alike) / degrees,
        by_samples=sum(noise.degrees * noise.by_samples for noise in alike) / degrees,
        degrees=degrees,
        limit=limit,
    )


def accuracy(arm: Arm, noise: SeedNoise | None = None) -> Estimate:
    """Accuracy with its 95 % interval over problems and seeds; over problems only where there is one seed: its noise is not in it.

    Over problems the interval is that of an evaluation, Wilson's at the effective number of samples, so it has a width at 0 % and 100 %
    too. Of several tasks it is the mean. What the seeds add is added in squares; `noise` is what a study's arms say of it together.

    Raises:
        ValueError: if the arm has no seed, no problem, or not the same number of seeds in all tasks.
    """
    tasks_T = _tasks_of(arm)
    shares_T = [float(right_SP.mean()) for right_SP in tasks_T]
    intervals_T = [
        accuracy_interval(right_SP.mean(axis=0), np.full(right_SP.shape[1], len(right_SP) * _samples_behind(right_SP)))
        for right_SP in tasks_T
    ]
    value = sum(shares_T) / len(shares_T)
    low, high = mean_interval(shares_T, intervals_T)
    added, square = _seed_variance([(1.0, tasks_T)], noise)
    if added > ROUND_OFF:
        problems = sum(float(right_SP.mean(axis=0).var()) / right_SP.shape[1] for right_SP in tasks_T) / len(tasks_T) ** 2
        quantile = t_quantile((problems + added) ** 2 / square)
        low = value - quantile * math.hypot((value - low) / NORMAL_QUANTILE, math.sqrt(added))
        high = value + quantile * math.hypot((high - value) / NORMAL_QUANTILE, math.sqrt(added))
    return Estimate(value=value, interval=(max(0.0, low), min(1.0, high)))


def difference(arm: Arm, reference: Arm, noise: SeedNoise | None = None) -> Difference:
    """Accuracy of `arm` less that of `reference`, paired over problems, the seeds independent of one another.

    `noise` is what the arms of a study say together of their seeds; without it each arm speaks for itself, and only large differences can
    be told from noise. An arm of one seed counts as one without seed noise, which is right for a model that was not trained, and too bold
    for one that was.

    Raises:
        ValueError: if the arms do not have the same tasks and problems, or one has no seed or no problem.
    """
    return _contrast([arm, reference], [1.0, -1.0], noise)


def trend(points: Sequence[Point], noise: SeedNoise | None = None) -> Estimate | None:
    """Slope of the accuracy by least squares over points (fraction, arm), the reference at 0, per 0.1; None with fewer than two fractions.

    Raises:
        ValueError: as for `difference`.
    """
    fractions = np.array([fraction for fraction, _ in points], dtype=np.float64)
    if len(set(fractions.tolist())) < 2:
        return None
    centred = fractions - fractions.mean()
    weights = FRACTION_STEP * centred / (centred @ centred)
    slope = _contrast([arm for _, arm in points], weights.tolist(), noise)
    return Estimate(value=slope.value, interval=slope.interval)


def matched(reference: Arm, structure: Sequence[Point], content: Sequence[Point], noise: SeedNoise | None = None) -> Matched | None:
    """Structure less content at the largest edit distance that both curves reach, each drawn straight between its points.

    Points are (edit distance, arm); both curves begin with the reference at distance 0. None if one of them does not leave it.

    Raises:
        ValueError: as for `difference`.
    """
    reach = min(max((distance for distance, _ in curve), default=0.0) for curve in (structure, content))
    if reach <= 0:
        return None
    arms, weights = [reference], [0.0]
    for sign, curve in ((1.0, structure), (-1.0, content)):
        points = sorted((point for point in curve if point[0] > 0), key=lambda point: point[0])
        distances = [0.0, *(distance for distance, _ in points)]
        # A straight line is linear in its ends: the weight of a point is the height of a curve that is 1 there and 0 elsewhere.
        heights = [float(np.interp(reach, distances, unit)) for unit in np.eye(len(distances))]
        weights[0] += sign * heights[0]
        weights += [sign * height for height in heights[1:]]
        arms += [arm for _, arm in points]
    return Matched(edit_distance=reach, difference=_contrast(arms, weights, noise))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: those up to 0.05 are wrong about any of the comparisons in 5 % of studies at most (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(value: float, p_adjusted: float) -> str:
    """Say "better", "worse" or "within noise" of a difference with an adjusted p-value."""
    if p_adjusted > SIGNIFICANCE or value == 0:
        return NOISE
    return BETTER if value > 0 else WORSE


def two_sided_p(distance: float, degrees: float) -> float:
    """Odds that |t| of Student's distribution is at least `distance`, for 1 degree of freedom or more, not necessarily a whole number.

    With t = sqrt(degrees) / tan(angle) they are the integral of sin(angle)^(degrees - 1) up to the angle, over that up to a right angle.
    """
    if distance == 0:
        return 1.0
    if degrees >= MANY_DEGREES:
        return math.erfc(distance / math.sqrt(2))
    angle = math.atan2(math.sqrt(degrees), distance)
    log_sines = np.log(np.sin(angle / 2 * (_NODES + 1)))
    log_whole = 0.5 * math.log(math.pi) + math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2)
    return min(1.0, angle * float(_NODE_WEIGHTS @ np.exp((degrees - 1) * log_sines - log_whole)))


def t_quantile(degrees: float) -> float:
    """How far from 0 Student's t lies in 5 % of cases, on either side."""
    low, high = NORMAL_QUANTILE, 13.0
    if degrees >= MANY_DEGREES:
        return low
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, max(1.0, degrees)) > 1 - CONFIDENCE else (low, middle)
    return high


def _tasks_of(arm: Arm) -> list[np.ndarray]:
    tasks_T = [np.asarray(right_SP, dtype=np.float64) for right_SP in ([arm] if isinstance(arm, np.ndarray) else arm)]
    shapes = [right_SP.shape for right_SP in tasks_T]
    if not tasks_T or any(len(shape) != 2 or 0 in shape for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"arm: needs for each task seeds by problems, at least one of each and the same seeds in all; got shapes {shapes}")
    return tasks_T


def _samples_behind(right_SP: np.ndarray) -> int:
    """Samples a problem behind the shares: the smallest number of which they can be shares."""
    shares = np.unique(right_SP)
    return next((k for k in range(1, MAX_SAMPLES) if np.allclose(k * shares, np.rint(k * shares), rtol=0, atol=1e-6)), MAX_SAMPLES)


def _noise_of(tasks_T: list[np.ndarray]) -> SeedNoise | None:
    """What one arm shows; None of one seed."""
    num_seeds = len(tasks_T[0])
    if num_seeds == 1:
        return None
    means_S = np.mean([right_SP.mean(axis=1) for right_SP in tasks_T], axis=0)
    by_samples = 0.0
    for right_SP in tasks_T:
        num_problems = right_SP.shape[1]
        rest_SP = right_SP - right_SP.mean(axis=0) - right_SP.mean(axis=1, keepdims=True) + right_SP.mean()
        residual = float((rest_SP**2).sum()) / max(1, (num_seeds - 1) * (num_problems - 1))
        by_samples += residual / (num_problems * len(tasks_T) ** 2)
    return SeedNoise(seen=float(np.var(means_S, ddof=1)), by_samples=by_samples, degrees=num_seeds - 1)


def _seed_variance(weighted: Sequence[tuple[float, list[np.ndarray]]], pooled: SeedNoise | None) -> tuple[float, float]:
    """What the seeds add to the variance of a weighted sum of arms, perhaps below 0, and the seen variances, squared, by their degrees."""
    added = square = pooled_share = 0.0
    for weight, tasks_T in weighted:
        own, share = _noise_of(tasks_T), weight**2 / len(tasks_T[0])
        if own is None:
            continue
        if pooled is not None and own.seen <= pooled.limit:
            pooled_share += share
        else:
            added += share * (own.seen - own.by_samples)
            square += (share * own.seen) ** 2 / own.degrees
    if pooled is not None:
        added += pooled_share * (pooled.seen - pooled.by_samples)
        square += (pooled_share * pooled.seen) ** 2 / pooled.degrees
    return added, square


def _problems_of(rights: list[np.ndarray], weights: list[float]) -> tuple[float, float, float]:
    """Mean over problems of the weighted sum of arms in one task, the same drawn towards 0, and the latter's variance."""
    sums_P = np.array(weights) @ np.array([right_SP.mean(axis=0) for right_SP in rights])
    one_sample = max(abs(weight) / (len(right_SP) * _samples_behind(right_SP)) for weight, right_SP in zip(weights, rights, strict=True))
    count = len(sums_P) + 2
    centre = float(sums_P.sum()) / count
    return float(sums_P.mean()), centre, (float(sums_P @ sums_P + one_sample**2) / count - centre**2) / count


def _contrast(arms: Sequence[Arm], weights: list[float], noise: SeedNoise | None) -> Difference:
    """Weighted sum of the accuracies of arms, paired over problems; of several tasks the mean."""
    tasks_of_arms = [_tasks_of(arm) for arm in arms]
    sizes = [[right_SP.shape[1] for right_SP in tasks_T] for tasks_T in tasks_of_arms]
    if any(one != sizes[0] for one in sizes):
        raise ValueError(f"arms: need the same problems in the same tasks; got these numbers of problems by task: {sizes}")
    num_tasks = len(sizes[0])
    by_task = [_problems_of([tasks_T[task] for tasks_T in tasks_of_arms], weights) for task in range(num_tasks)]
    value, centre = (sum(one[place] for one in by_task) / num_tasks for place in (0, 1))
    problems_T = [variance / num_tasks**2 for _, _, variance in by_task]
    added, seed_square = _seed_variance(list(zip(weights, tasks_of_arms, strict=True)), noise)
    variance = sum(problems_T) + max(0.0, added)
    problem_square = sum(one**2 / max(1, size - 1) for one, size in zip(problems_T, sizes[0], strict=True))
    # That the seeds show nothing beyond the samples may be luck. The interval believes it; the test, which looks at rarer cases, does not.
    half_width = t_quantile(variance**2 / seed_square if added > ROUND_OFF else math.inf) * math.sqrt(variance)
    return Difference(
        value=value,
        interval=(
            max(centre - half_width, sum(weight for weight in weights if weight < 0)),
            min(centre + half_width, sum(weight for weight in weights if weight > 0)),
        ),
        p_value=two_sided_p(abs(centre) / math.sqrt(variance), max(1.0, variance**2 / (problem_square + seed_square))),
    )
