"""The losses of a step by kind of token and by source, and the error that names whose loss is no number."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from structcot.data.batch import MicroBatch, pack
from structcot.data.render import KINDS
from structcot.losses import MeanLosses, Suspects, diverged, is_finite, loss_sums, mean_losses, suspects
from tests.tiny_models import random_samples

ORIGINS = ("math", "code", "math", "puzzles")


def test_means_are_over_the_labels_of_the_whole_step() -> None:
    batches, losses = step()
    assert means_of(batches, losses).total == pytest.approx(torch.cat(losses).double().mean().item(), rel=1e-12)


def test_losses_by_kind_and_by_source_are_those_of_their_own_labels() -> None:
    batches, losses = step()
    by_kind, by_source = defaultdict(list), defaultdict(list)
    for batch, losses_M in zip(batches, losses, strict=True):
        for kind, document, loss in zip(batch.kinds_M.tolist(), batch.documents_M.tolist(), losses_M.tolist(), strict=True):
            by_kind[KINDS[kind]].append(loss)
            by_source[batch.origins_S[document]].append(loss)
    means = means_of(batches, losses)
    assert means.by_kind == pytest.approx({name: math.fsum(values) / len(values) for name, values in by_kind.items()}, rel=1e-12)
    assert means.by_source == pytest.approx({name: math.fsum(values) / len(values) for name, values in by_source.items()}, rel=1e-12)
    assert set(means.by_kind) == {"thought", "solution", "end"}
    assert set(means.by_source) == set(ORIGINS)


def test_one_source_alone_is_not_told_apart() -> None:
    batches, losses = step(origins=("math",) * 4)
    assert means_of(batches, losses).by_source == {}


def test_a_source_of_one_microbatch_only_counts_there_only() -> None:
    batches, losses = step()
    losses[1] = torch.full_like(losses[1], 5.0)
    assert batches[1].origins_S == ("math", "puzzles")
    assert means_of(batches, losses).by_source["puzzles"] == 5.0


def test_a_hundred_thousand_equal_losses_keep_their_mean() -> None:
    batches, _ = step()
    rows = torch.zeros(100_000, dtype=torch.int64)
    wide = replace(batches[0], rows_M=rows, labels_M=rows, kinds_M=rows + 1, documents_M=rows)
    assert means_of([wide], [torch.full((100_000,), 0.1)]).total == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_finite_numbers_pass() -> None:
    batches, losses = step()
    assert is_finite(means_of(batches, losses), 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_records_whose_own_loss_is_no_number_are_named_and_no_others(value: float) -> None:
    batches, losses = step()
    guilty = batches[1].documents_M == 1
    losses[1][guilty] = value
    message = message_of(batches, losses, grad_norm=1.0)
    assert message.startswith(f"step 7: the loss is {value:g} and the gradient norm is 1; the weights were not changed.")
    assert "Records with a non-finite loss: random.jsonl:3. Look at these records or lower train.learning_rate" in message


def test_all_records_of_the_step_are_named_where_only_the_gradient_is_no_number() -> None:
    batches, losses = step()
    message = message_of(batches, losses, grad_norm=float("nan"))
    assert "the gradient norm is nan" in message
    assert "Records of this step: random.jsonl:0, random.jsonl:1, random.jsonl:2, random.jsonl:3. Look" in message


def test_of_many_records_eight_are_named_and_the_rest_counted() -> None:
    batch = pack(random_samples([7] * 11))
    losses = [torch.full((batch.num_supervised,), float("nan"))]
    named = ", ".join(f"random.jsonl:{number}" for number in range(8))
    assert f"loss: {named} and 3 more. Look" in message_of([batch], losses, grad_norm=1.0)


def step(origins: tuple[str, ...] = ORIGINS) -> tuple[list[MicroBatch], list[Tensor]]:
    """Two micro-batches of two documents each, and made-up losses of their labels."""
    samples = [replace(sample, origin=origin) for sample, origin in zip(random_samples([30, 12, 25, 40]), origins, strict=True)]
    batches = [pack(samples[:2]), pack(samples[2:])]
    generator = torch.Generator().manual_seed(0)
    return batches, [torch.rand(batch.num_supervised, generator=generator) for batch in batches]


def means_of(batches: list[MicroBatch], losses: list[Tensor]) -> MeanLosses:
    """Of one process."""
    origins = sorted(set(ORIGINS))
    return mean_losses(loss_sums(batches, losses, origins), origins)


def message_of(batches: list[MicroBatch], losses: list[Tensor], grad_norm: float) -> str:
    """The message of the error that step 7 ends with."""
    means = MeanLosses(total=float(torch.cat(losses).mean()), by_kind={}, by_source={})
    assert not is_finite(means, grad_norm)
    return str(diverged(7, means, grad_norm, [suspects(batches, losses)]))


def test_sums_of_two_ranks_add_up_to_those_of_one() -> None:
    batches, losses = step()
    origins = sorted(set(ORIGINS))
    parts = [loss_sums([batch], [losses_M], origins) for batch, losses_M in zip(batches, losses, strict=True)]
    assert mean_losses(parts[0] + parts[1], origins) == means_of(batches, losses)


def test_records_that_ranks_share_are_named_once() -> None:
    means = MeanLosses(total=float("nan"), by_kind={}, by_source={})
    found = [Suspects(["a:1", "a:2"], []), Suspects(["a:1", "a:2"], ["a:2"]), Suspects(["b:1"], ["a:2"])]
    assert "loss: a:2. Look" in str(diverged(3, means, 1.0, found))
