"""The optimizer: AdamW of the textbook, and a learning rate that is a function of the step alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from structcot.config import TrainConfig
from structcot.errors import ConfigError
from structcot.optim import learning_rate, make_optimizer, set_learning_rate
from tests.one_step import ROUNDED, relative_error


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("cosine", [0.5, 1.0, *(0.5 * (1.0 + math.cos(math.pi * step / 8)) for step in range(8))]),
    ],
)
def test_a_rate_warms_up_from_its_first_step_and_decays_to_zero_after_the_last(name: str, rates: list[float]) -> None:
    config = train(lr_scheduler_type=name, warmup_ratio=0.2, learning_rate=3.0)
    assert [learning_rate(config, step, 10) / 3.0 for step in range(10)] == pytest.approx(rates)
    assert learning_rate(config, 10, 10) == pytest.approx(3.0 if name == "constant" else 0.0)


@pytest.mark.parametrize(
    ("ratio", "num_steps", "warmup_steps"), [(0.0, 10, 0), (0.1, 10, 1), (0.1, 11, 2), (0.1, 1, 1), (1.0, 4, 4), (0.01, 20, 1)]
)
def test_warm_up_takes_its_share_of_the_steps_rounded_up(ratio: float, num_steps: int, warmup_steps: int) -> None:
    config = train(warmup_ratio=ratio, learning_rate=1.0, lr_scheduler_type="constant")
    rates = [learning_rate(config, step, num_steps) for step in range(num_steps)]
    assert rates == [min(1.0, (step + 1) / max(1, warmup_steps)) for step in range(num_steps)]


def test_no_step_is_made_at_rate_zero() -> None:
    for num_steps in range(1, 40):
        assert min(learning_rate(train(warmup_ratio=0.1), step, num_steps) for step in range(num_steps)) > 0.0


def test_a_step_is_that_of_adamw_written_out() -> None:
    matrix, vector = (nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))) for shape in ((4, 3), (5,)))
    optimizer = make_optimizer([matrix, vector], train(weight_decay=0.1, learning_rate=1e-2))
    wanted = [parameter.detach().double() for parameter in (matrix, vector)]
    first, second = ([torch.zeros_like(value) for value in wanted] for _ in range(2))
    for step in range(1, 6):
        rate = 1e-2 / step
        for index, parameter in enumerate((matrix, vector)):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + index))
            gradient = parameter.grad.double()
            wanted[index] = wanted[index] * (1.0 - rate * (0.1 if parameter is matrix else 0.0))
            first[index] = 0.9 * first[index] + 0.1 * gradient
            second[index] = 0.999 * second[index] + 0.001 * gradient**2
            size = (second[index] / (1.0 - 0.999**step)).sqrt() + 1e-8
            wanted[index] = wanted[index] - rate * first[index] / (1.0 - 0.9**step) / size
        set_learning_rate(optimizer, rate)
        optimizer.step()
    assert relative_error(matrix, wanted[0]) <= ROUNDED
    assert relative_error(vector, wanted[1]) <= ROUNDED


def test_state_is_there_before_the_first_step_and_only_for_what_is_trained() -> None:
    trained, frozen = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3), requires_grad=False)
    optimizer = make_optimizer([frozen, trained], train())
    assert list(optimizer.state) == [trained]
    state = optimizer.state[trained]
    assert {name: tuple(value.shape) for name, value in state.items()} == {"step": (), "exp_avg": (4, 3), "exp_avg_sq": (4, 3)}
    assert not any(value.any() for value in state.values())
    assert all(value.dtype == torch.float32 for value in state.values())


def test_matrices_alone_decay() -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    groups = make_optimizer([matrix, vector], train(weight_decay=0.3)).param_groups
    assert [(group["params"], group["weight_decay"]) for group in groups] == [([matrix], 0.3), ([vector], 0.0)]


def test_an_optimizer_that_is_not_here_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"adamw-8bit.* use adamw"):
        make_optimizer([nn.Parameter(torch.ones(2))], train(optimizer="adamw-8bit"))


def train(**values: Any) -> TrainConfig:
    return TrainConfig(**values)
