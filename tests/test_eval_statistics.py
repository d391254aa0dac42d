"""The statistics of an evaluation against brute force and simulation: estimates are unbiased, intervals cover, tests are exact."""

from __future__ import annotations

import math
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structcot.errors import DataError
from structcot.eval.golden import BEFORE, GOLDEN, MATHS_BENCHMARKS, golden_of
from structcot.eval.statistics import (
    accuracy_interval,
    accuracy_within,
    bootstrap_interval,
    budget_grid,
    compare_paired,
    effective_samples,
    majority_share,
    mean_interval,
    pass_at_k,
    powers_of_two,
    sign_flip_p,
    wilson_interval,
)
from structcot.eval.summary import compare, p_text, summarise

RIGHT_COUNTS = st.lists(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=12)


def sample(task: str, problem: int, number: int = 0, is_right: bool = True, **changes: Any) -> dict[str, Any]:
    return {
        "task": task,
        "problem_id": f"p{problem}",
        "sample": number,
        "completion_tokens": 100,
        "gold": "1",
        "group": "",
        "extracted": "1" if is_right else "2",
        "verdict": "correct" if is_right else "wrong",
        "correct": is_right,
        "ending": "finished",
    } | changes


def evaluation(task: str, rights: list[int], num_samples: int = 1) -> list[dict[str, Any]]:
    return [sample(task, p, s, s < right) for p, right in enumerate(rights) for s in range(num_samples)]


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Two-sided exact binomial test of the pairs that differ."""
    total = only_a + only_b
    odds = [math.comb(total, k) / 2**total for k in range(total + 1)]
    return min(1.0, sum(one for k, one in enumerate(odds) if abs(2 * k - total) >= abs(only_a - only_b)))


@given(RIGHT_COUNTS, st.integers(1, 8))
def test_pass_at_k_is_what_counting_all_draws_gives(counts: list[tuple[int, int]], k: int) -> None:
    counts = [(max(n, k), c) for n, c in counts]
    found = pass_at_k(np.array([n for n, _ in counts]), np.array([c for _, c in counts]), k)
    for (n, c), value in zip(counts, found, strict=True):
        draws = list(combinations(range(n), k))
        assert value == pytest.approx(sum(min(draw) < c for draw in draws) / len(draws), abs=1e-12)


def test_pass_at_k_grows_with_k_is_accuracy_at_one_and_refuses_too_few_samples() -> None:
    count, right = np.full(3, 1024), np.array([0, 3, 1024])
    values = [pass_at_k(count, right, k).mean() for k in powers_of_two(1024)]
    assert values == sorted(values)
    assert values[0] == pytest.approx((right / count).mean())
    assert values[-1] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="pass@8: needs at least 8 samples"):
        pass_at_k(np.array([8, 4]), np.array([1, 1]), 8)
    assert powers_of_two(0) == []
    assert powers_of_two(7) == [1, 2, 4]


@given(RIGHT_COUNTS)
def test_an_accuracy_lies_in_its_interval_which_is_never_empty(counts: list[tuple[int, int]]) -> None:
    num, means = np.array([n for n, _ in counts]), np.array([c / n for n, c in counts])
    low, high = accuracy_interval(means, num)
    assert 0 <= low <= means.mean() <= high <= 1
    assert high - low > 0.05
    assert len(means) - 1e-6 <= effective_samples(means, num) <= num.sum() + 1e-6


def test_of_one_sample_a_problem_the_interval_is_wilsons() -> None:
    # The values that a table of Wilson's interval gives for 5 of 30 and 30 of 30.
    means = np.array([1.0] * 5 + [0.0] * 25)
    assert accuracy_interval(means, np.ones(30)) == pytest.approx((0.0734, 0.3356), abs=1e-4)
    assert accuracy_interval(np.ones(30), np.ones(30)) == pytest.approx((0.8865, 1.0), abs=1e-4)
    assert wilson_interval(0.0, 30) == pytest.approx((0.0, 0.1135), abs=1e-4)
    assert wilson_interval(0.5, 0) == (0.0, 1.0)
    assert bootstrap_interval(np.ones(30)) == (1.0, 1.0)


@pytest.mark.parametrize("num_problems", [30, 500])
@pytest.mark.parametrize("chance", [0.03, 0.167, 0.5, 0.9, 0.97])
def test_the_interval_covers_the_truth_as_often_as_it_says(num_problems: int, chance: float) -> None:
    rng = np.random.default_rng(7)
    rights = rng.random((2000, num_problems)) < chance
    covered = [low <= chance <= high for low, high in (accuracy_interval(one.astype(float), np.ones(num_problems)) for one in rights)]
    assert 0.90 <= np.mean(covered) <= 0.99


@pytest.mark.parametrize(("num_problems", "num_samples"), [(30, 8), (30, 64), (200, 4)])
def test_the_interval_covers_the_truth_with_several_samples_a_problem(num_problems: int, num_samples: int) -> None:
    # Problems are drawn with them: the truth is the mean over all problems that there could be.
    rng = np.random.default_rng(8)
    covered = []
    for _ in range(2000):
        means = rng.binomial(num_samples, rng.beta(0.7, 1.1, num_problems)) / num_samples
        low, high = accuracy_interval(means, np.full(num_problems, num_samples))
        covered.append(low <= 0.7 / 1.8 <= high)
    assert 0.92 <= np.mean(covered) <= 0.98


def test_the_bootstrap_alone_would_cover_too_seldom_near_the_ends() -> None:
    rng = np.random.default_rng(9)
    rights = (rng.random((300, 30)) < 0.97).astype(float)
    covered = [low <= 0.97 <= high for low, high in map(bootstrap_interval, rights)]
    assert np.mean(covered) < 0.7


def test_the_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    means = np.array([1.0] * 200 + [0.0] * 300)
    low, high = bootstrap_interval(means, seed=1)
    assert (low, high) == bootstrap_interval(means, seed=1)
    assert (low, high) != bootstrap_interval(means, seed=2)
    half = 1.96 * math.sqrt(0.4 * 0.6 / 500)
    assert (low, high) == pytest.approx((0.4 - half, 0.4 + half), abs=0.004)


def test_the_interval_of_a_mean_of_tasks_covers_the_truth() -> None:
    chances, sizes = np.array([0.167, 0.675, 0.848, 0.476]), (30, 40, 500, 675)
    rng = np.random.default_rng(10)
    covered = []
    for _ in range(2000):
        shares = [rng.binomial(size, chance) / size for size, chance in zip(sizes, chances, strict=True)]
        low, high = mean_interval(shares, [wilson_interval(share, size) for share, size in zip(shares, sizes, strict=True)])
        covered.append(low <= chances.mean() <= high)
    assert 0.93 <= np.mean(covered) <= 0.975


@given(st.lists(st.integers(-1, 1), max_size=40))
def test_of_one_sample_a_problem_the_test_is_mcnemars(differences: list[int]) -> None:
    assert sign_flip_p(np.array(differences, dtype=int)) == pytest.approx(mcnemar_p(differences.count(1), differences.count(-1)), abs=1e-9)


@given(st.lists(st.integers(-8, 8), max_size=9))
def test_the_sign_flip_test_is_what_flipping_all_signs_gives(differences: list[int]) -> None:
    flipped = [
        abs(sum(sign * one for sign, one in zip(signs, differences, strict=True))) for signs in product((1, -1), repeat=len(differences))
    ]
    expected = sum(one >= abs(sum(differences)) for one in flipped) / len(flipped)
    assert sign_flip_p(np.array(differences, dtype=int)) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30), st.integers(0, 3))
def test_swapping_two_models_turns_their_comparison_round(rights: list[tuple[int, int]], seed: int) -> None:
    a, b, num = np.array([one for one, _ in rights]) / 4, np.array([one for _, one in rights]) / 4, np.full(len(rights), 4)
    one, other = compare_paired(a, b, num, num, seed), compare_paired(b, a, num, num, seed)
    assert one.difference == pytest.approx(-other.difference)
    assert (one.only_a, one.only_b, one.p_value) == (other.only_b, other.only_a, pytest.approx(other.p_value))
    # The ends are quantiles of few distinct means, so they may lie a sample or two apart.
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]), abs=0.5 / (len(rights) + 2))
    assert one.interval[0] < one.interval[1]


def test_equal_models_are_rarely_called_different_and_the_interval_covers() -> None:
    rng = np.random.default_rng(11)
    num, covered, significant = np.ones(60), [], []
    for _ in range(1000):
        # On a fifth of the problems the two disagree, on the rest they are right or wrong together.
        together, apart = rng.random(60) < 0.5, rng.random(60) < 0.2
        a = np.where(apart, rng.random(60) < 0.5, together).astype(float)
        b = np.where(apart, 1 - a, together)
        paired = compare_paired(a, b, num, num)
        covered.append(paired.interval[0] <= 0 <= paired.interval[1])
        significant.append(paired.p_value < 0.05)
    assert 0.93 <= np.mean(covered) <= 0.985
    assert np.mean(significant) <= 0.05


def test_the_interval_of_a_difference_covers_with_several_samples() -> None:
    rng = np.random.default_rng(12)
    num, covered = np.full(30, 8), []
    for _ in range(1000):
        chance = rng.beta(1, 1, 30)
        a, b = rng.binomial(8, chance) / 8, rng.binomial(8, chance**1.5) / 8
        low, high = compare_paired(a, b, num, num).interval
        covered.append(low <= 0.5 - 0.4 <= high)
    assert 0.91 <= np.mean(covered) <= 0.985


def test_models_with_the_same_answers_are_not_equal_for_sure() -> None:
    paired = compare_paired(np.ones(30), np.ones(30), np.ones(30), np.ones(30))
    assert paired.p_value == 1.0
    assert paired.interval[0] < -0.02 < 0.02 < paired.interval[1]
    with pytest.raises(ValueError, match="at least one problem"):
        compare_paired(np.ones(0), np.ones(0), np.ones(0), np.ones(0))


@given(st.lists(st.tuples(st.sampled_from(["", "1", "2", "3"]), st.booleans()), min_size=1, max_size=9))
def test_a_vote_is_won_by_the_answer_given_most(votes: list[tuple[str, bool]]) -> None:
    answers = [answer for answer, _ in votes]
    right = [answer == "1" for answer in answers]
    most = max((answers.count(one) for one in "123"), default=0)
    winners = [one for one in "123" if answers.count(one) == most] if most else []
    assert majority_share(answers, right) == pytest.approx(("1" in winners) / len(winners) if winners else 0.0)


@given(st.lists(st.tuples(st.integers(0, 5000), st.booleans()), min_size=1, max_size=40))
def test_accuracy_within_a_budget_is_counted_anew_and_ends_at_the_accuracy(outputs: list[tuple[int, bool]]) -> None:
    tokens, right = np.array([length for length, _ in outputs]), np.array([is_right for _, is_right in outputs])
    budgets = budget_grid(int(tokens.max())) or [0]
    found = accuracy_within(budgets, tokens, right, np.full(len(tokens), 1 / len(tokens)))
    expected = [sum(is_right and length <= budget for length, is_right in outputs) / len(outputs) for budget in budgets]
    assert found == pytest.approx(expected)
    assert found[-1] == pytest.approx(right.mean())
    assert budgets == sorted(set(budgets))
    assert budgets[-1] == tokens.max()


def test_a_summary_has_the_numbers_counted_by_hand() -> None:
    samples = evaluation("lcb", [2, 1, 0], 2)
    for one, group in zip(samples, ["hard", "hard", "easy", "easy", "medium", "medium"], strict=True):
        one["group"] = group
    samples[5] |= {"verdict": "no_answer", "ending": "truncated", "extracted": "", "completion_tokens": 900}
    samples[4] |= {"verdict": "error"}
    facts = summarise(samples)
    task = facts["tasks"]["lcb"]
    assert (facts["samples"], task["problems"], task["samples"]) == (6, 3, 6)
    assert task["accuracy"] == pytest.approx(0.5)
    assert task["pass_at_k"] == {"1": pytest.approx(0.5), "2": pytest.approx(2 / 3)}
    assert task["majority_vote"] == pytest.approx(0.5)
    assert list(task["groups"]) == ["easy", "medium", "hard"]
    assert [one["accuracy"] for one in task["groups"].values()] == [0.5, 0.0, 1.0]
    assert task["verdicts"] == {"correct": 3, "wrong": 1, "no_answer": 1, "timeout": 0, "error": 1}
    assert task["endings"]["truncated"] == {"samples": 1, "share": pytest.approx(1 / 6), "accuracy": 0.0}
    assert task["endings"]["looping"]["accuracy"] is None
    assert task["tokens"]["right"] == {"samples": 3, "mean": 100.0, "median": 100.0, "p90": 100.0, "max": 100}
    assert task["tokens"]["wrong"]["max"] == 900
    assert sum(task["tokens"]["histogram"]["right"]) == 3
    assert sum(task["tokens"]["histogram"]["wrong"]) == 3
    assert facts["budget_tokens"][-1] == 900
    assert task["budget_accuracy"][-1] == pytest.approx(0.5)
    assert task["paper_grader_accuracy"] is None
    assert facts["average"] is None
    assert facts["warnings"] == [
        "lcb: 1 of 6 samples could not be judged: the grader failed; they count as not right, which costs at most 16.7 points"
    ]


def test_what_the_papers_grader_says_stands_beside_the_accuracy() -> None:
    samples = [one | {"paper_correct": True} for one in evaluation("t", [2, 1, 0], 2)]
    samples[0]["paper_correct"] = False
    task = summarise(samples)["tasks"]["t"]
    assert task["accuracy"] == pytest.approx(0.5)
    assert task["paper_grader_accuracy"] == pytest.approx(5 / 6)


def test_the_accuracy_of_a_task_weighs_its_groups_by_their_problems() -> None:
    # 182 easy, 206 medium and 123 hard problems: the released set of which the paper reports one number.
    sizes, right = {"easy": 182, "medium": 206, "hard": 123}, {"easy": 150, "medium": 90, "hard": 10}
    samples = [
        sample("livecodebench", number, is_right=index < right[group], group=group)
        for start, (group, size) in zip((0, 182, 388), sizes.items(), strict=True)
        for index, number in enumerate(range(start, start + size))
    ]
    task = summarise(samples)["tasks"]["livecodebench"]
    assert task["accuracy"] == pytest.approx(250 / 511)
    assert {name: one["problems"] for name, one in task["groups"].items()} == sizes


def test_the_average_is_the_unweighted_mean_of_the_four_benchmarks_of_mathematics() -> None:
    rights = {"math500": [1] * 9 + [0], "aime24": [1, 0], "amc23": [1, 1, 0, 0], "olympiadbench": [0, 0, 0, 1]}
    samples = [one for task, listed in rights.items() for one in evaluation(task, listed)]
    average = summarise([*samples, *evaluation("gsm8k", [1, 1])])["average"]
    assert average["accuracy"] == pytest.approx((0.9 + 0.5 + 0.5 + 0.25) / 4)
    assert average["interval"][0] < average["accuracy"] < average["interval"][1]
    assert summarise(samples[:-4])["average"] is None


def test_an_evaluation_that_is_not_whole_or_has_refused_prompts_says_so() -> None:
    samples = evaluation("t", [1, 1], 2)[:-1]
    samples[0] |= {"ending": "refused", "correct": False, "verdict": "no_answer", "completion_tokens": 0}
    first, second = summarise(samples)["warnings"]
    assert first == "t: 1 of 3 prompts were refused, so nothing was generated; they count as not right"
    lengths = summarise(samples)["tasks"]["t"]["tokens"]
    assert (lengths["all"]["samples"], lengths["all"]["mean"], sum(lengths["histogram"]["wrong"])) == (2, 100.0, 1)
    assert second == "t: problems have between 1 and 2 samples; the evaluation is not whole"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ([{"task": "t"}], 'sample 1 has no "problem_id"'),
        ([sample("t", 1), sample("t", 1)], 'sample 0 of problem "p1" is there twice'),
        ([sample("t", 1, verdict="")], 'verdict must be one of correct, wrong, no_answer, timeout, error, got ""'),
        ([sample("t", 1, ending="eos")], 'ending must be one of finished, truncated, looping, refused, got "eos"'),
    ],
)
def test_samples_that_cannot_be_summed_up_are_refused(broken: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        summarise(broken)


def test_no_samples_and_no_tokens_are_facts_too() -> None:
    assert summarise([]) == {"samples": 0, "budget_tokens": [], "tasks": {}, "average": None, "warnings": []}
    task = summarise([sample("t", 1, completion_tokens=0)])["tasks"]["t"]
    assert task["budget_accuracy"] == []
    assert task["tokens"]["wrong"] is None


def test_a_comparison_says_in_words_which_model_is_better() -> None:
    a, b = evaluation("t", [1] * 20 + [0] * 10), evaluation("t", [0] * 12 + [1] * 8 + [0] * 12)
    facts = compare(a, b, "new", "old")["tasks"]["t"]
    assert (facts["problems"], facts["problems_of_one_only"], facts["only_a"], facts["only_b"]) == (30, 2, 12, 0)
    assert facts["p_value"] == pytest.approx(2 / 2**12)
    assert facts["verdict"] == "new is better (p = 0.00049)"
    assert facts["test"] == "McNemar's exact test"
    assert compare(b, a, "old", "new")["tasks"]["t"]["verdict"] == "new is better (p = 0.00049)"
    assert compare(a, a, "new", "old")["tasks"]["t"]["verdict"] == "within noise (p = 1)"
    assert compare(a, evaluation("other", [1]), "new", "old")["tasks"] == {}


def test_a_comparison_with_several_samples_counts_problems_and_not_samples() -> None:
    facts = compare(evaluation("t", [8, 0], 8), evaluation("t", [0, 0], 4), "a", "b")["tasks"]["t"]
    assert facts["test"] == "exact sign-flip test"
    assert facts["p_value"] == 1.0
    assert facts["difference"] == pytest.approx(0.5)


def test_the_average_is_compared_where_both_have_the_four_benchmarks() -> None:
    a = [one for task in MATHS_BENCHMARKS for one in evaluation(task, [1] * 90 + [0] * 10)]
    b = [one for task in MATHS_BENCHMARKS for one in evaluation(task, [1] * 80 + [0] * 20)]
    average = compare(a, b, "new", "old")["average"]
    assert average["difference"] == pytest.approx(0.1)
    assert average["verdict"] == "new is better (the interval excludes 0)"
    assert compare(a, a, "new", "old")["average"]["verdict"] == "within noise (the interval includes 0)"


def test_p_values_are_short() -> None:
    assert [p_text(p) for p in (1.0, 0.0341, 0.00012, 0.00001)] == ["p = 1", "p = 0.034", "p = 0.00012", "p < 0.0001"]


def test_golden_values_are_the_papers_and_their_average_is_computed() -> None:
    assert golden_of("aime24") == {"before training": 16.7, "17k of QwQ, LoRA": 33.3, "17k of R1": 56.7}
    assert golden_of("livecodebench") == {"before training": 48.9, "17k of QwQ, LoRA": 56.2, "17k of R1": 57.0}
    assert golden_of("gsm8k") == {}
    # The paper prints 56.7 there, which its own row contradicts.
    assert BEFORE.average == pytest.approx(54.15)
    assert [row.average is None for row in GOLDEN] == [False, False, True, False, False, False, False]
