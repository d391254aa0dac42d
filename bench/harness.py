"""Microbenchmarks: what one is, when it may be timed, how its sides are timed, and what is written down.

Ours is first held against a baseline on the very tensors that will be timed; on a GPU the operation's own tests run before that. Where
either fails, the operation is blocked: not timed, named at the end, and the exit status is 1. The sides take turns, so that a change of
clock or load meets all of them. On a GPU, events around a side time it, after a write that sweeps the L2 cache; on a CPU the wall clock.
Arithmetic and bytes are those of our side by the cost formulas (structcot.counting), so rates are of work that counts, not of traffic seen.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.report import HEADER, OURS, Result, milliseconds_of, report, rows_of
from structcot.counting import Tally
from structcot_kernels._cost import Cost

ROOT = Path(__file__).parent.parent
TOLERANCE = 0.05
"""Largest relative difference (Frobenius) of two results in bf16: a block of a dozen products differs by a percent, a wrong kernel by 1."""
CACHE_BYTES = 256 << 20
"""More than any L2 cache holds."""
REPEATS = {"cuda": 50, "cpu": 20}

Side = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One shape of one operation.

    `sides` maps a name to something that runs forward and backward once and returns what it computed; the first is ours, `structcot`, and
    the second what ours is held against: as many results, in the same order.
    """

    operation: str
    shape: str
    sides: dict[str, Side]
    tolerance: float = TOLERANCE


CaseFunction = Callable[[torch.device], Iterator[Case]]


def forward_backward(function: Callable[..., Tensor | tuple[Tensor, ...]], *tensors: Tensor) -> Side:
    """Run `function(*tensors)` and its backward to every tensor that requires a gradient, and return differentiable outputs and gradients.

    The gradients of the outputs are made once, and are the same for every side whose outputs have the same shapes.
    """
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    seeds: list[Tensor] = []

    def run() -> Sequence[Tensor]:
        outputs = function(*tensors)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        differentiable = [output for output in outputs if output.requires_grad]
        if not seeds:
            generator = torch.Generator(tensors[0].device).manual_seed(0)
            for output in differentiable:
                seed = torch.randn(output.shape, generator=generator, device=output.device)
                seeds.append(seed.to(output.dtype))
        return (*differentiable, *torch.autograd.grad(differentiable, trained, seeds))

    return run


# May it be timed?


def find_red_tests(name: str, device: torch.device) -> str | None:
    """On a GPU, run the tests of an operation: how they failed, or None if they passed. On a CPU they would run in the interpreter."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    path = f"tests/kernels/test_{name}.py"
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", "gpu", path]
    tests = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = tests.stdout.strip().splitlines() or tests.stderr.strip().splitlines() or ["no output"]
    return None if tests.returncode == 0 else f"{path} is red: {lines[-1]}"


def find_disagreement(case: Case, sides: dict[str, Side]) -> str | None:
    """How the first two of `sides` differ, or None if they agree."""
    (our_name, ours), *others = sides.items()
    if our_name != OURS:
        return f"{our_name} comes first; it must be {OURS}"
    if not others:
        return None
    name, other = others[0]
    our_results, results = tensors_of(ours()), tensors_of(other())
    if [tensor.shape for tensor in our_results] != [tensor.shape for tensor in results]:
        return f"{OURS} gives {[tuple(t.shape) for t in our_results]}, {name} {[tuple(t.shape) for t in results]}"
    for index, (our_result, result) in enumerate(zip(our_results, results, strict=True)):
        error = relative_difference(our_result.detach(), result.detach())
        if not error <= case.tolerance:
            return f"{OURS} and {name} differ in result {index} by {error:.3g} of its norm; allowed is {case.tolerance}"
    return None


def tensors_of(results: object) -> list[Tensor]:
    """The results of a side as a list."""
    return [results] if isinstance(results, Tensor) else list(results)  # type: ignore[call-overload]


def relative_difference(values: Tensor, others: Tensor) -> float:
    """Norm of the difference over the norm of `others`; NaN where either is not finite."""
    difference, whole = float((values.float() - others.float()).norm()), float(others.float().norm())
    return difference / whole if whole else difference


def sides_that_fit(case: Case) -> dict[str, Side]:
    """Those that run within the memory of the device. Running them once also compiles what they compile."""
    fitting = {}
    for name, side in case.sides.items():
        try:
            side()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        else:
            fitting[name] = side
    return fitting


# Times and work


def race(sides: dict[str, Side], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each run of each side, the sides taking turns."""
    if device.type == "cuda":
        return race_on_gpu(sides, device, repeats)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def race_on_gpu(sides: dict[str, Side], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Everything is queued before anything is waited for, and the sweep gives the host time to queue a side before it starts."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            cache.zero_()
            start.record()
            side()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize(device)
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def work_of(case: Case) -> Cost:
    """Operations and bytes of one run of our side."""
    with Tally(lambda *_: "") as tally:
        case.sides[OURS]()
    return Cost(*(math.fsum(getattr(kernel.cost, field) for kernel in tally.kernels) for field in ("flops", "bytes")))


def result_of(case: Case, seconds: dict[str, list[float]]) -> Result:
    """What is written down of a case; a side without times is one that did not fit."""
    work = work_of(case)
    times = {name: milliseconds_of(seconds[name]) if name in seconds else None for name in case.sides}
    return Result(operation=case.operation, shape=case.shape, flops=work.flops, bytes=work.bytes, milliseconds=times)


# The run


def execute(functions: Sequence[CaseFunction], options: argparse.Namespace, default_json: Path | None = None) -> int:
    """Check, time and print every case; returns the exit status, 1 if something was blocked. Results are on disk after each operation."""
    device = torch.device(options.device)
    path = options.json or (default_json if device.type == "cuda" else None)
    results: list[Result] = []
    blocked: dict[str, str] = {}
    print(HEADER)
    for function in functions:
        name = Path(inspect.getfile(function)).stem.removeprefix("bench_")
        red = find_red_tests(name, device)
        if red:
            blocked[name] = red
        for case in function(device) if not red else ():
            label, sides = f"{case.operation} {case.shape}", sides_that_fit(case)
            disagreement = find_disagreement(case, sides) if OURS in sides else "out of memory"
            if disagreement:
                blocked[label] = disagreement
                continue
            results.append(result_of(case, race(sides, device, options.repeats or REPEATS[device.type])))
            print(rows_of(results[-1]), flush=True)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report(device, results, blocked), indent=2) + "\n", encoding="utf-8")
    for name, reason in blocked.items():
        print(f"blocked: {name}: {reason}", file=sys.stderr)
    return 1 if blocked else 0


def parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    options.add_argument("--repeats", type=int, help=f"runs of each side; {REPEATS['cuda']} on a GPU, {REPEATS['cpu']} on a CPU")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    return options


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def main(cases: CaseFunction) -> None:
    """Run the cases of one file."""
    sys.exit(execute([cases], parser((inspect.getmodule(cases).__doc__ or "").splitlines()[0]).parse_args()))
