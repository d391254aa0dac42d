"""The plan: every sample exactly when it should be seen, in even steps, laid evenly over ranks, the same wherever it is made."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structcot.config import TrainConfig
from structcot.data.plan import document_costs, imbalance, make_plan, spread
from structcot.errors import ConfigError, DataError
from tests.chat_tokenizers import SHARED, qwen_tokenizer

# A 32B model: 64 layers of width 5120, 31 billion weights that a token is multiplied with.
ATTENTION_RATIO_32B = 64 * 5120 / 31e9

quick = settings(max_examples=60)
# The number of samples is drawn first: lists of any size are mostly short.
lengths_of_a_run = st.integers(1, 120).flatmap(lambda size: st.lists(st.integers(1, 3000), min_size=size, max_size=size))
seeds = st.integers(0, 2**32 - 1)


@quick
@given(lengths_of_a_run, st.integers(1, 40), st.integers(1, 4), seeds)
def test_every_epoch_shows_every_sample_exactly_once(lengths: list[int], batch: int, num_epochs: int, seed: int) -> None:
    plan = make_plan(lengths, train(batch_sequences=batch, num_train_epochs=float(num_epochs)), seed)
    assert plan.steps_per_epoch == -(-len(lengths) // batch)
    assert plan.num_steps == num_epochs * plan.steps_per_epoch
    for epoch in range(num_epochs):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        assert sorted(chain.from_iterable(plan.samples_of(step) for step in steps)) == list(range(len(lengths)))


@quick
@given(lengths_of_a_run, st.integers(1, 40), seeds)
def test_sizes_of_steps_differ_by_at_most_one_and_none_is_over_the_batch(lengths: list[int], batch: int, seed: int) -> None:
    plan = make_plan(lengths, train(batch_sequences=batch, num_train_epochs=2.0), seed)
    sizes = np.diff(plan.starts_K1)
    assert sizes.max() - sizes.min() <= 1
    assert sizes.max() <= batch


@quick
@given(lengths_of_a_run, st.integers(1, 17), st.floats(0.0, 1e-2), st.data())
def test_spread_lays_each_sample_into_one_bin_under_the_cap_and_as_many_bins_on_every_rank(
    lengths: list[int], num_ranks: int, attention_ratio: float, data: st.DataObject
) -> None:
    max_tokens = data.draw(st.integers(max(lengths), 2 * max(lengths) + 100))
    samples = np.arange(len(lengths)) + 1000
    bins = spread(samples, lengths, num_ranks=num_ranks, max_tokens=max_tokens, attention_ratio=attention_ratio)
    assert len(bins) == num_ranks
    assert len({len(rank_bins) for rank_bins in bins}) == 1
    assert sorted(chain.from_iterable(chain.from_iterable(bins))) == samples.tolist()
    for rank_bins in bins:
        costs = [document_costs([lengths[sample - 1000] for sample in one], attention_ratio).sum() for one in rank_bins]
        assert costs == sorted(costs, reverse=True), "the costliest micro-batch should come first"
        assert all(sum(lengths[sample - 1000] for sample in one) <= max_tokens for one in rank_bins)


@quick
@given(lengths_of_a_run, seeds)
def test_on_one_rank_a_step_takes_no_more_bins_than_first_fit_decreasing(lengths: list[int], seed: int) -> None:
    max_tokens = max(lengths) + seed % 3000
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if length <= room]
        if fitting:
            rooms[fitting[0]] -= length
        else:
            rooms.append(max_tokens - length)
    (bins,) = spread(range(len(lengths)), lengths, num_ranks=1, max_tokens=max_tokens, attention_ratio=1e-4)
    assert len(bins) <= len(rooms)


@quick
@given(lengths_of_a_run, st.integers(1, 9))
def test_no_exchange_with_the_costliest_rank_lowers_its_cost(lengths: list[int], num_ranks: int) -> None:
    costs = document_costs(lengths, ATTENTION_RATIO_32B)
    bins = spread(range(len(lengths)), lengths, num_ranks=num_ranks, max_tokens=3000, attention_ratio=ATTENTION_RATIO_32B)
    shares = [[sample for one in rank_bins for sample in one] for rank_bins in bins]
    loads = [costs[share].sum() for share in shares]
    top = int(np.argmax(loads))
    for rank in set(range(num_ranks)) - {top}:
        gives = np.subtract.outer(costs[shares[top]], np.append(costs[shares[rank]], 0.0))
        assert np.maximum(loads[top] - gives, loads[rank] + gives).min() >= loads[top] * (1 - 1e-5)


def test_ranks_are_balanced_where_the_largest_first_to_the_cheapest_is_not_enough() -> None:
    bins = spread(range(5), [30, 30, 20, 20, 20], num_ranks=2, max_tokens=100, attention_ratio=0.0)
    assert sorted(sorted(chain.from_iterable(rank_bins)) for rank_bins in bins) == [[0, 1], [2, 3, 4]]


def test_microbatches_of_a_rank_alone_are_even_since_it_waits_for_nobody() -> None:
    (bins,) = spread(range(6), [19, 49, 54, 58, 15, 50], num_ranks=1, max_tokens=107, attention_ratio=0.1)
    assert bins == ((5, 1), (3, 4), (2, 0))  # costs of 589, 431 and 400


def test_bins_that_fit_only_tightly_are_filled_to_the_last_token() -> None:
    lengths = [50, 50, 40, 35, 25]  # laid evenly, 40 and 35 go beside one 50 each, and 25 fits nowhere
    (bins,) = spread(range(5), lengths, num_ranks=1, max_tokens=100, attention_ratio=0.0)
    assert sorted(sum(lengths[sample] for sample in one) for one in bins) == [100, 100]


@quick
@given(st.lists(st.integers(1, 3000), min_size=2, max_size=60), st.integers(1, 20), seeds)
def test_the_same_arguments_give_the_same_plan_and_others_another_hash(lengths: list[int], batch: int, seed: int) -> None:
    config = train(batch_sequences=batch)
    plan = make_plan(lengths, config, seed)
    again = make_plan(np.array(lengths), config, seed)
    assert plan.sha256 == again.sha256
    assert plan.order_N.tolist() == again.order_N.tolist()
    longer = make_plan([lengths[0] + 1, *lengths[1:]], config, seed)
    one_more = make_plan([*lengths, 7], config, seed)
    assert len({plan.sha256, longer.sha256, one_more.sha256}) == 3


def test_the_hash_sees_seed_order_and_borders_of_steps() -> None:
    lengths = [100 + 7 * number for number in range(40)]
    plans = [
        make_plan(lengths, train(batch_sequences=8), seed=0),
        make_plan(lengths, train(batch_sequences=8), seed=1),
        make_plan(lengths[::-1], train(batch_sequences=8), seed=0),
        make_plan(lengths, train(batch_sequences=10), seed=0),
        make_plan(lengths, train(batch_sequences=8, max_steps=3), seed=0),
    ]
    assert len({plan.sha256 for plan in plans}) == len(plans)


def test_the_plan_does_not_know_how_many_ranks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = set()
    for world_size in ("1", "8"):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        hashes.add(make_plan(range(1, 100), train(batch_sequences=8), seed=3).sha256)
    assert len(hashes) == 1


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_a_step_holds_the_same_samples_on_any_number_of_ranks(num_ranks: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 3000, 200)
    plan = make_plan(lengths, train(batch_sequences=96), seed=0)
    samples = plan.samples_of(1)
    bins = spread(samples, lengths[samples], num_ranks=num_ranks, max_tokens=4000, attention_ratio=ATTENTION_RATIO_32B)
    assert sorted(chain.from_iterable(chain.from_iterable(bins))) == sorted(samples)


def test_the_order_differs_from_epoch_to_epoch_and_does_not_follow_length() -> None:
    lengths = list(range(1, 101))
    plan = make_plan(lengths, train(batch_sequences=10, num_train_epochs=2.0), seed=0)
    first, second = plan.order_N[:100], plan.order_N[100:]
    assert first.tolist() != second.tolist()
    for order in (first, second):
        # Of 100 random numbers the rank correlation stays under 3.3 / sqrt(100) but once in a thousand seeds.
        assert abs(np.corrcoef(order, np.arange(100))[0, 1]) < 0.33


@pytest.mark.parametrize(("epochs", "steps"), [(0.1, 1), (0.5, 5), (1.0, 10), (1.25, 13), (2.5, 25)], ids=lambda value: f"{value:g}")
def test_fractional_epochs_end_after_that_share_of_steps(epochs: float, steps: int) -> None:
    plan = make_plan([10] * 100, train(batch_sequences=10, num_train_epochs=epochs), seed=0)
    assert (plan.num_steps, plan.steps_per_epoch) == (steps, 10)
    assert plan.epochs_K == pytest.approx(np.arange(1, steps + 1) / 10)
    whole = make_plan([10] * 100, train(batch_sequences=10, num_train_epochs=3.0), seed=0)
    assert plan.order_N.tolist() == whole.order_N[: plan.starts_K1[-1]].tolist()


@pytest.mark.parametrize("max_steps", [1, 9, 10, 23])
def test_max_steps_wins_over_epochs(max_steps: int) -> None:
    plan = make_plan([10] * 95, train(batch_sequences=10, num_train_epochs=1.0, max_steps=max_steps), seed=0)
    assert plan.num_steps == max_steps
    assert len(plan.order_N) == plan.starts_K1[-1] == 95 * (max_steps // 10) + plan.starts_K1[max_steps % 10]


@quick
@given(lengths_of_a_run, st.integers(1, 20_000), seeds)
def test_steps_of_batch_tokens_hold_each_sample_once_and_about_that_many_tokens(lengths: list[int], batch_tokens: int, seed: int) -> None:
    plan = make_plan(lengths, TrainConfig(batch_tokens=batch_tokens, num_train_epochs=1.0), seed)
    steps = [plan.samples_of(step) for step in range(plan.num_steps)]
    assert sorted(chain.from_iterable(steps)) == list(range(len(lengths)))
    assert all(len(step) for step in steps)
    assert all(sum(lengths[sample] for sample in step) <= batch_tokens + max(lengths) for step in steps)


def test_steps_of_batch_tokens_are_as_many_as_the_tokens_fill() -> None:
    plan = make_plan([100] * 64, TrainConfig(batch_tokens=1000, num_train_epochs=1.0), seed=0)
    assert plan.num_steps == 7
    assert set(np.diff(plan.starts_K1)) == {9, 10}


@pytest.mark.parametrize("weight", [0.25, 1.0, 2.0, 2.5], ids=lambda value: f"weight-{value:g}")
def test_weights_say_how_often_an_epoch_shows_a_sample(weight: float) -> None:
    weights = np.array([weight] * 400 + [1.0] * 100)
    plan = make_plan([10] * 500, train(batch_sequences=10, num_train_epochs=1.0), 0, weights)
    counts = Counter(plan.order_N.tolist())
    visits = [counts[sample] for sample in range(400)]
    assert [counts[sample] for sample in range(400, 500)] == [1] * 100
    assert set(visits) <= {int(weight), int(np.ceil(weight))}
    # 4 standard deviations of 400 draws.
    share = weight % 1.0
    assert abs(np.mean(visits) - weight) <= 4 * (share * (1 - share) / 400) ** 0.5


def test_a_fractional_weight_chooses_other_samples_in_every_epoch() -> None:
    plan = make_plan([10] * 100, train(batch_sequences=100, num_train_epochs=2.0), 0, np.full(100, 0.5))
    epochs = [frozenset(plan.samples_of(step).tolist()) for step in range(plan.num_steps)]
    assert len(epochs) == 2
    assert len(epochs[0] ^ epochs[1]) > 20


def test_documents_too_long_to_balance_are_dealt_out_evenly_over_the_steps() -> None:
    lengths = [100] * 90 + [6000] * 10
    plan = make_plan(lengths, train(batch_sequences=10, num_train_epochs=1.0), seed=0)
    giants = [sum(lengths[sample] > 100 for sample in plan.samples_of(step)) for step in range(10)]
    assert giants == [1] * 10


def test_dealing_out_loses_and_doubles_none_however_many_are_long() -> None:
    for num_samples, batch, num_short in product(range(5, 30), range(1, 7), range(5)):
        plan = make_plan([1] * num_short + [100] * (num_samples - num_short), train(batch_sequences=batch, num_train_epochs=1.0), seed=0)
        assert sorted(plan.order_N) == list(range(num_samples)), (num_samples, batch, num_short)


@pytest.mark.parametrize("num_ranks", [2, 8, 16])
def test_long_traces_lie_evenly_over_ranks(num_ranks: int) -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(8.3, 0.7, 960), 16384).astype(int)
    plan = make_plan(lengths, train(batch_sequences=96, num_train_epochs=1.0), seed=0)
    assert imbalance(plan, num_ranks=num_ranks, max_tokens=32768, attention_ratio=ATTENTION_RATIO_32B) <= 1.03


def test_real_traces_lie_evenly_over_eight_ranks() -> None:
    lengths = trace_lengths() * 3
    plan = make_plan(lengths, train(batch_sequences=96), seed=0)
    assert plan.steps_per_epoch == 20
    assert imbalance(plan, num_ranks=8, max_tokens=32768, attention_ratio=ATTENTION_RATIO_32B) <= 1.03


def test_imbalance_is_the_mean_of_the_costliest_rank_over_the_mean_rank() -> None:
    plan = make_plan([30, 10, 10], train(batch_sequences=3, num_train_epochs=1.0), seed=0)
    assert imbalance(plan, num_ranks=2, max_tokens=100, attention_ratio=0.0) == pytest.approx(30 / 25)
    assert imbalance(plan, num_ranks=2, max_tokens=100, attention_ratio=0.1) == pytest.approx(120 / 80)


def test_a_sample_longer_than_a_microbatch_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"got 50, but the longest sample has 51 tokens .* raise it to 51"):
        spread([0, 1], [51, 3], num_ranks=1, max_tokens=50, attention_ratio=0.0)


def test_no_sample_is_an_error() -> None:
    with pytest.raises(DataError, match=r"rejected\.jsonl"):
        make_plan([], train(), seed=0)


def test_weights_that_leave_no_sample_are_an_error() -> None:
    with pytest.raises(DataError, match="raise a weight"):
        make_plan([5], train(), 0, np.array([1e-9]))


def train(**values: Any) -> TrainConfig:
    return TrainConfig(**values)


def trace_lengths() -> list[int]:
    """Tokens of every response of the real traces; skips the test where they are not at hand."""
    texts = []
    for name, field in (("annotated", "response"), ("paper_outputs", "response"), ("r1_distill", "solution")):
        path = SHARED / "traces" / f"{name}.jsonl"
        if not path.exists():
            pytest.skip(f"the real traces are not at hand (../shared/data/traces/{name}.jsonl)")
        texts += [json.loads(line)[field] for line in path.read_text(encoding="utf-8").splitlines()]
    return [len(encoding.ids) for encoding in qwen_tokenizer().backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
