"""What pytest-benchmark writes is what `python -m bench` writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench.harness import default_device
from bench.report import Result, milliseconds_of, report


def pytest_benchmark_update_json(benchmarks: Sequence[Any], output_json: dict[str, Any]) -> None:
    """Put our report in place of pytest-benchmark's. Its timer is the wall clock on every device."""
    results: dict[tuple[str, str], Result] = {}
    for benchmark in benchmarks:
        facts = dict(benchmark.extra_info)
        side = facts.pop("side")
        result = results.setdefault((facts["operation"], facts["shape"]), Result(milliseconds={}, **facts))
        result.milliseconds[side] = milliseconds_of(benchmark.stats.data)
    output_json.clear()
    output_json.update(report(torch.device(default_device()), list(results.values()), {}) | {"timer": "wall clock"})
