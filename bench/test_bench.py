"""The cases of `python -m bench` under pytest-benchmark: `pytest bench --benchmark-only [--benchmark-json FILE]`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch

from bench.__main__ import case_functions
from bench.harness import CACHE_BYTES, REPEATS, Case, default_device, find_disagreement, find_red_tests, sides_that_fit, work_of
from bench.report import OURS

DEVICE = torch.device(default_device())

red_tests = functools.cache(find_red_tests)


def sides_of_all_cases() -> list:
    """One test for each side of each case. Tensors are made to know the names, and dropped."""
    tests = []
    for name, function in case_functions().items():
        for index, case in enumerate(function(DEVICE)):
            tests += [pytest.param(name, index, side, id=f"{case.operation} {case.shape} {side}") for side in case.sides]
    return tests


@functools.lru_cache(maxsize=1)
def checked_case(name: str, index: int) -> tuple[Case, dict, str | None]:
    """A case, its sides that fit into memory, and why it must not be timed."""
    case = next(itertools.islice(case_functions()[name](DEVICE), index, None))
    sides = sides_that_fit(case)
    return case, sides, find_disagreement(case, sides) if OURS in sides else "out of memory"


@pytest.mark.timeout(0)
@pytest.mark.parametrize(("name", "index", "side"), sides_of_all_cases())
def test_side(name: str, index: int, side: str, benchmark) -> None:
    """Time one side, unless a test of its operation is red."""
    red = red_tests(name, DEVICE)
    if red:
        pytest.fail(red)
    case, sides, disagreement = checked_case(name, index)
    if disagreement:
        pytest.fail(disagreement)
    if side not in sides:
        pytest.skip("out of memory")
    work = work_of(case)
    benchmark.group = f"{case.operation} {case.shape}"
    benchmark.extra_info.update(operation=case.operation, shape=case.shape, side=side, flops=work.flops, bytes=work.bytes)
    run, sweep = on_device(sides[side])
    benchmark.pedantic(run, setup=sweep, rounds=REPEATS[DEVICE.type], warmup_rounds=1)


def on_device(side: Callable[[], object]) -> tuple[Callable[[], object], Callable[[], None]]:
    """What the wall clock can time, and what comes before each round: on a GPU both wait for it, and the second sweeps its cache."""
    if DEVICE.type == "cpu":
        return side, lambda: None
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=DEVICE)

    def run() -> None:
        side()
        torch.cuda.synchronize(DEVICE)

    def sweep() -> None:
        cache.zero_()
        torch.cuda.synchronize(DEVICE)

    return run, sweep
