"""The statistics of a study on simulated studies: intervals cover, equal variants are not told apart, and what must not matter does not.

Simulated: difficulties of problems from a Beta distribution, shared by all arms; every seed moves all problems of its arm by one amount on
the logit scale, drawn with standard deviation `seed_sd`; right answers are binomial. The truth is the mean over all problems and seeds that
there could be. A coverage or a rate of 5 % is found within 1.4 points by 1,000 simulations and 2.2 by 400 (two standard errors); the tests
allow for that. The whole grid is slow; a part of it, with fewer simulations, always runs.
"""

from __future__ import annotations

import math
from functools import cache

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structcot.eval.statistics import accuracy_interval, middle
from structcot.study.statistics import Difference, accuracy, difference, holm, matched, seed_noise, t_quantile, trend, two_sided_p, verdict

# Shapes of the Beta distributions, and the accuracy that each stands for.
HALF, FIFTH, TWENTIETH, NINE_TENTHS = (1.0, 1.0), (0.3, 1.2), (0.1, 1.9), (1.8, 0.2)
BETTER_LOGIT = 0.5
FAMILY = 12


def logits(shape: tuple[float, float], size: int | tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    chances = np.clip(rng.beta(*shape, size), 1e-9, 1 - 1e-9)
    return np.log(chances / (1 - chances))


def chance(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


@cache
def truth(shape: tuple[float, float], shift: float, seed_sd: float) -> float:
    rng = np.random.default_rng(1)
    return float(chance(logits(shape, 400_000, rng) + shift + seed_sd * rng.standard_normal(400_000)).mean())


def arm(logit_P: np.ndarray, num_seeds: int, seed_sd: float, rng: np.random.Generator, samples: int = 1) -> np.ndarray:
    """right_SP of one arm."""
    moved_SP = logit_P + seed_sd * rng.standard_normal((num_seeds, 1))
    return rng.binomial(samples, chance(moved_SP)) / samples


def simulation_error(num: int) -> float:
    """Two standard errors of a rate of 5 %."""
    return 2 * math.sqrt(0.05 * 0.95 / num)


def coverage(
    shape: tuple[float, float],
    num_problems: int,
    seeds: tuple[int, int],
    seed_sd: float,
    *,
    num: int = 1000,
    samples: int = 1,
    others: int = 0,
) -> tuple[float, float]:
    """How often the intervals of an arm's accuracy and of a difference hold the truth. An arm of one seed has no seed noise.

    `others` arms like the reference have their seed noise pooled with those of the two.
    """
    rng = np.random.default_rng(num_problems + sum(seeds))
    noises = [seed_sd if one > 1 else 0.0 for one in seeds]
    better, plain = truth(shape, BETTER_LOGIT, noises[0]), truth(shape, 0.0, noises[1])
    covered = np.zeros(2)
    for _ in range(num):
        logit_P = logits(shape, num_problems, rng)
        a, b = arm(logit_P + BETTER_LOGIT, seeds[0], noises[0], rng, samples), arm(logit_P, seeds[1], noises[1], rng, samples)
        noise = seed_noise([a, b, *(arm(logit_P, seeds[1], seed_sd, rng, samples) for _ in range(others))]) if others else None
        for place, (found, true) in enumerate(((accuracy(b, noise), plain), (difference(a, b, noise), better - plain))):
            covered[place] += found.interval[0] <= true <= found.interval[1]
    return float(covered[0]) / num, float(covered[1]) / num


def family_rates(
    shape: tuple[float, float], num_problems: int, num_seeds: int, seed_sd: float, *, shift: float = 0.0, num: int = 1000
) -> tuple[float, float]:
    """How often any of 12 variants is told apart from the reference, and the first, which alone is better by `shift` on the logit scale."""
    rng = np.random.default_rng(num_problems + num_seeds)
    any_found = first_found = 0
    for _ in range(num):
        logit_P = logits(shape, num_problems, rng)
        reference = arm(logit_P, num_seeds, seed_sd, rng)
        variants = [arm(logit_P + (shift if place == 0 else 0.0), num_seeds, seed_sd, rng) for place in range(FAMILY)]
        noise = seed_noise([reference, *variants])
        found = [difference(one, reference, noise) for one in variants]
        verdicts = [verdict(one.value, p) for one, p in zip(found, holm([one.p_value for one in found]), strict=True)]
        any_found += any(one != "within noise" for one in verdicts)
        first_found += verdicts[0] == "better"
    return any_found / num, first_found / num


def bootstrap_coverage(num_problems: int, num_seeds: int, seed_sd: float, num: int) -> float:
    """Coverage of the plain percentile bootstrap of a difference: problems in pairs, seeds of each arm, all drawn with replacement."""
    rng = np.random.default_rng(5)
    true, covered = truth(HALF, BETTER_LOGIT, seed_sd) - truth(HALF, 0.0, seed_sd), 0
    for _ in range(num):
        logit_P = logits(HALF, num_problems, rng)
        drawn_BP = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), size=400) / num_problems
        draws_B = np.zeros(400)
        for sign, shift in ((1, BETTER_LOGIT), (-1, 0.0)):
            right_SP = arm(logit_P + shift, num_seeds, seed_sd, rng)
            drawn_BS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=400) / num_seeds
            draws_B += sign * (drawn_BP * (drawn_BS @ right_SP)).sum(axis=1)
        low, high = middle(draws_B)
        covered += low <= true <= high
    return covered / num


# Fewer simulations of a part of the grid; "few problems" have intervals that may be wider than needed, never too narrow.
@pytest.mark.parametrize(
    ("shape", "num_problems", "seeds", "seed_sd", "samples"),
    [
        pytest.param(HALF, 200, (1, 1), 0.0, 1, id="one seed"),
        pytest.param(HALF, 200, (3, 3), 0.2, 1, id="three seeds"),
        pytest.param(FIFTH, 500, (5, 5), 0.3, 1, id="five seeds"),
        pytest.param(NINE_TENTHS, 200, (3, 1), 0.1, 1, id="three seeds against one"),
        pytest.param(FIFTH, 200, (3, 3), 0.2, 4, id="four samples"),
    ],
)
def test_intervals_cover_the_truth(
    shape: tuple[float, float], num_problems: int, seeds: tuple[int, int], seed_sd: float, samples: int
) -> None:
    error = simulation_error(400)
    for covered in coverage(shape, num_problems, seeds, seed_sd, num=400, samples=samples):
        assert 0.93 - error <= covered <= 0.97 + error


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_seeds", [1, 3, 5])
@pytest.mark.parametrize("shape", [HALF, FIFTH, TWENTIETH, NINE_TENTHS])
def test_intervals_cover_the_truth_on_the_whole_grid(shape: tuple[float, float], num_seeds: int) -> None:
    error = simulation_error(1000)
    for num_problems in (30, 200, 500):
        for seed_sd in (0.1, 0.2, 0.3) if num_seeds > 1 else (0.0,):
            of_accuracy, of_difference = coverage(shape, num_problems, (num_seeds, num_seeds), seed_sd)
            place = (num_problems, seed_sd, of_accuracy, of_difference)
            # Of 30 problems at 5 % one or two are solved: the interval of the accuracy jumps from one count to the next.
            assert (0.93 if (num_problems, shape) != (30, TWENTIETH) else 0.92) - error <= of_accuracy, place
            assert 0.93 - error <= of_difference, place
            if num_problems > 30:
                assert max(of_accuracy, of_difference) <= 0.97 + error, place


@pytest.mark.slow
def test_two_seeds_cover_too_seldom_where_their_noise_rules_unless_it_is_pooled() -> None:
    # 0.3 on the logit scale is 5 points of an accuracy of 50 %, twice what 500 problems leave open.
    alone, together = coverage(HALF, 500, (2, 2), 0.3), coverage(HALF, 500, (2, 2), 0.3, num=400, others=11)
    assert 0.84 <= alone[0] <= 0.92
    assert min(together) >= 0.93 - simulation_error(400)


def test_intervals_with_pooled_noise_cover_the_truth() -> None:
    for covered in coverage(HALF, 200, (3, 3), 0.2, num=300, others=5):
        assert 0.93 - simulation_error(300) <= covered <= 0.97 + simulation_error(300)


def test_a_plain_bootstrap_over_problems_and_three_seeds_covers_too_seldom() -> None:
    assert bootstrap_coverage(500, 3, 0.3, 150) < 0.93
    covered = coverage(HALF, 500, (3, 3), 0.3, num=200)[1]
    assert covered >= 0.93 - simulation_error(200)


def test_equal_variants_are_told_apart_in_five_per_cent_of_studies_at_most() -> None:
    assert family_rates(HALF, 200, 3, 0.2, num=150)[0] <= 0.05 + simulation_error(150)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [HALF, FIFTH])
def test_equal_variants_are_rarely_told_apart_on_the_whole_grid(shape: tuple[float, float], num_seeds: int) -> None:
    for num_problems in (30, 200, 500):
        for seed_sd in (0.0, 0.1, 0.3) if num_seeds > 1 else (0.0,):
            found = family_rates(shape, num_problems, num_seeds, seed_sd, num=500)[0]
            assert found <= 0.05 + simulation_error(500), (num_problems, seed_sd, found)


def test_twelve_points_are_found_and_five_are_not_at_500_problems_and_three_seeds() -> None:
    assert truth(HALF, 0.75, 0.1) - truth(HALF, 0.0, 0.1) == pytest.approx(0.123, abs=0.002)
    assert family_rates(HALF, 500, 3, 0.1, shift=0.75, num=40)[1] >= 0.9
    assert family_rates(HALF, 500, 3, 0.1, shift=0.3, num=40)[1] <= 0.6


def test_a_trend_a_matched_difference_and_a_mean_of_tasks_cover_the_truth() -> None:
    rng = np.random.default_rng(3)
    sd, num, sizes, shapes = 0.2, 300, (100, 300), (HALF, FIFTH)
    shifts = (0.0, -0.4, -0.8)
    levels = [truth(HALF, shift, sd) for shift in shifts]
    slope = (levels[2] - levels[0]) * 0.1
    halfway = (levels[0] + levels[2]) / 2 - levels[1]
    mean = sum(truth(shape, -0.4, sd) - truth(shape, 0.0, sd) for shape in shapes) / 2
    covered = np.zeros(3)
    for _ in range(num):
        logit_P = logits(HALF, 300, rng)
        first, second, third = (arm(logit_P + shift, 3, sd, rng) for shift in shifts)
        found_slope, found_matched = trend([(0.0, first), (0.5, second), (1.0, third)]), matched(first, [(0.6, third)], [(0.3, second)])
        assert found_slope is not None
        assert found_matched is not None
        by_task = [logits(shape, size, rng) for shape, size in zip(shapes, sizes, strict=True)]
        # The same trained model answers all tasks, so its seed moves all of them.
        models = [sd * rng.standard_normal((3, 1)) + shift for shift in (-0.4, 0.0)]
        ours, theirs = ([rng.binomial(1, chance(logit_P + moves)).astype(float) for logit_P in by_task] for moves in models)
        intervals = (found_slope.interval, found_matched.difference.interval, difference(ours, theirs).interval)
        covered += [low <= true <= high for (low, high), true in zip(intervals, (slope, halfway, mean), strict=True)]
    assert np.all(covered / num >= 0.93 - simulation_error(num)), covered / num
    assert np.all(covered / num <= 0.98 + simulation_error(num)), covered / num


SHARES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**32 - 1))


def random_arms(drawn: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    seeds_a, seeds_b, num_problems, state = drawn
    rng = np.random.default_rng(state)
    return rng.integers(0, 3, (seeds_a, num_problems)) / 2, rng.integers(0, 3, (seeds_b, num_problems)) / 2, rng


def expect_same(one: Difference, other: Difference, sign: float = 1.0) -> None:
    low, high = other.interval if sign > 0 else (-other.interval[1], -other.interval[0])
    assert (one.value, *one.interval, one.p_value) == pytest.approx((sign * other.value, low, high, other.p_value), abs=1e-9)


@settings(max_examples=60)
@given(SHARES)
def test_swapping_arms_turns_a_difference_round(drawn: tuple[int, int, int, int]) -> None:
    a, b, _ = random_arms(drawn)
    expect_same(difference(a, b), difference(b, a), sign=-1.0)


@settings(max_examples=60)
@given(SHARES)
def test_the_order_of_problems_and_of_seeds_does_not_matter(drawn: tuple[int, int, int, int]) -> None:
    a, b, rng = random_arms(drawn)
    order = rng.permutation(a.shape[1])
    expect_same(difference(a, b), difference(a[::-1][:, order], b[:, order]))
    one, other = accuracy(a), accuracy(a[::-1][:, order])
    assert (one.value, *one.interval) == pytest.approx((other.value, *other.interval), abs=1e-9)


@settings(max_examples=60)
@given(SHARES)
def test_estimates_lie_in_their_intervals_and_these_in_the_possible(drawn: tuple[int, int, int, int]) -> None:
    a, b, _ = random_arms(drawn)
    found = difference(a, b)
    assert -1 <= found.interval[0] <= found.value + 1e-9
    assert found.value - 1e-9 <= found.interval[1] <= 1
    assert 0 <= found.p_value <= 1
    level = accuracy(a)
    assert 0 <= level.interval[0] <= level.value + 1e-9
    assert level.value - 1e-9 <= level.interval[1] <= 1


@settings(max_examples=60)
@given(SHARES)
def test_an_arm_does_not_differ_from_itself_but_that_is_not_sure(drawn: tuple[int, int, int, int]) -> None:
    a, _, _ = random_arms(drawn)
    found = difference(a, a.copy())
    assert (found.value, found.p_value) == (0.0, 1.0)
    assert found.interval[0] < 0 < found.interval[1]
    assert verdict(found.value, found.p_value) == "within noise"


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holms_p_values_are_no_smaller_and_keep_their_order(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(raw <= one <= 1 for raw, one in zip(p_values, adjusted, strict=True))
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    assert [adjusted[index] for index in order] == sorted(adjusted)
    assert not adjusted or min(adjusted) == min(1.0, len(adjusted) * min(p_values))


def test_holm_is_as_computed_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [verdict(0.1, 0.05), verdict(-0.1, 0.01), verdict(-0.1, 0.051)] == ["better", "worse", "within noise"]


@pytest.mark.parametrize("degrees", [1.0, 1.7, 2.0, 4.3, 30.0, 999.0, 9999.0, 1e6])
def test_students_distribution_is_that_of_mpmath(degrees: float) -> None:
    for distance in (0.0, 0.3, 1.96, 4.0, 12.0):
        tail = mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + distance**2), regularized=True)
        assert two_sided_p(distance, degrees) == pytest.approx(float(tail), rel=1e-3 if degrees >= 1e4 else 1e-7, abs=1e-30)
    assert two_sided_p(t_quantile(degrees), degrees) == pytest.approx(0.05, rel=1e-5)


def test_of_one_seed_an_accuracy_has_the_interval_of_an_evaluation() -> None:
    right = np.random.default_rng(2).integers(0, 5, (1, 40)) / 4
    assert accuracy(right).interval == pytest.approx(accuracy_interval(right[0], np.full(40, 4)))


def test_where_seeds_rule_the_interval_is_students_of_their_means() -> None:
    # Means of 40, 50 and 60 %, and nothing else that varies: 4.303 standard errors for 2 degrees of freedom.
    shares = np.repeat([[0.4], [0.5], [0.6]], 20_000, axis=1)
    half_width = 4.3027 * 0.1 / math.sqrt(3)
    assert accuracy(shares).interval == pytest.approx((0.5 - half_width, 0.5 + half_width), rel=0.01)
    assert difference(shares, np.full((1, 20_000), 0.5)).interval == pytest.approx((-half_width, half_width), rel=0.01)
    # With the same seen four times, 8 degrees of freedom and both arms uncertain.
    half_width = 2.3060 * 0.1 * math.sqrt(2 / 3)
    assert difference(shares, shares, seed_noise([shares] * 4)).interval == pytest.approx((-half_width, half_width), rel=0.01)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_intervals_keep_a_width_at_the_edges(share: float) -> None:
    right = np.full((3, 30), share)
    low, high = accuracy(right).interval
    assert (low, high) == pytest.approx((0.0, 0.1135) if share == 0 else (0.8865, 1.0), abs=1e-4)
    slope = trend([(0.0, right), (1.0, right)])
    assert slope is not None
    assert slope.interval[0] < slope.value == 0 < slope.interval[1]


def test_an_arm_whose_seeds_fail_by_chance_keeps_its_own_noise() -> None:
    rng = np.random.default_rng(4)
    steady = [(rng.random((3, 200)) < 0.5).astype(float) for _ in range(8)]
    broken = (rng.random((3, 200)) < np.array([[0.05], [0.5], [0.9]])).astype(float)
    pooled = seed_noise([*steady, broken])
    assert pooled is not None
    assert pooled.degrees == 2 * len(steady)
    widths = [high - low for low, high in (difference(one, steady[0], pooled).interval for one in (broken, steady[1]))]
    assert widths[0] > 1.0 > 0.3 > widths[1]
    assert seed_noise([right[:1] for right in steady]) is None


def test_a_trend_is_the_slope_for_a_tenth_of_the_fraction() -> None:
    levels = [np.repeat([[1.0, 0.0]], [count, 10 - count], axis=1) for count in (8, 6, 4)]
    slope = trend([(0.0, levels[0]), (0.5, levels[1]), (1.0, levels[2])])
    assert slope is not None
    assert slope.value == pytest.approx(-0.04)
    assert trend([(0.5, levels[0]), (0.5, levels[1])]) is None
    assert trend([]) is None


def test_curves_are_compared_where_both_reach_between_their_points() -> None:
    zero, half, full = (np.repeat([[1.0, 0.0]], [count, 10 - count], axis=1) for count in (0, 5, 10))
    found = matched(full, [(0.0, full), (0.4, zero)], [(0.1, full), (0.2, half)])
    assert found is not None
    # Structure falls from 100 % to 0 % at 0.4, so at 0.2 it is half way down, as content is.
    assert (found.edit_distance, found.difference.value) == pytest.approx((0.2, 0.0))
    beyond = matched(full, [(0.3, half)], [(0.1, full), (0.5, half)])
    assert beyond is not None
    assert (beyond.edit_distance, beyond.difference.value) == pytest.approx((0.3, 0.5 - 0.75))
    assert matched(full, [(0.0, full)], [(0.2, half)]) is None
    assert matched(full, [], [(0.2, half)]) is None


def test_a_matched_difference_without_the_reference_is_the_plain_one() -> None:
    rng = np.random.default_rng(6)
    reference, a, b = ((rng.random((3, 50)) < 0.5).astype(float) for _ in range(3))
    found = matched(reference, [(0.3, a)], [(0.3, b)])
    assert found is not None
    expect_same(found.difference, difference(a, b))


def test_of_several_tasks_the_mean_is_meant() -> None:
    rng = np.random.default_rng(7)
    arms = [[(rng.random((3, size)) < 0.5).astype(float) for size in (30, 200)] for _ in range(2)]
    assert accuracy(arms[0]).value == pytest.approx((arms[0][0].mean() + arms[0][1].mean()) / 2)
    assert difference(arms[0], arms[1]).value == pytest.approx(accuracy(arms[0]).value - accuracy(arms[1]).value)
    expect_same(difference([arms[0][0]], [arms[1][0]]), difference(arms[0][0], arms[1][0]))


def test_arms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same problems in the same tasks; got .*\[\[3\], \[4\]\]"):
        difference(np.ones((2, 3)), np.ones((2, 4)))
    for wrong in (np.ones(3), np.ones((0, 3)), [np.ones((2, 3)), np.ones((1, 3))], []):
        with pytest.raises(ValueError, match="seeds by problems"):
            accuracy(wrong)
