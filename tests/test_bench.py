"""The benchmarks' harness: sides compared on equal terms, nothing timed that is wrong, one JSON however it is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import harness
from bench.__main__ import case_functions
from bench.harness import Case, execute, find_disagreement, find_red_tests, forward_backward, parser, race

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ONES = torch.ones(3)


def one_case(**sides: Callable[[], object]):
    """`cases` of a benchmark with one case."""

    def cases(device: torch.device):
        yield Case(operation="sum", shape="3", sides=sides)

    return cases


def run(cases, tmp_path: Path) -> tuple[int, dict]:
    """Exit status and JSON."""
    path = tmp_path / "new" / "results.json"
    status = execute([cases], parser("").parse_args(["--device", "cpu", "--repeats", "3", "--json", str(path)]))
    return status, json.loads(path.read_text(encoding="utf-8"))


def test_sides_get_the_same_gradients_and_return_outputs_and_theirs() -> None:
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    square, again = (forward_backward(lambda x, power=power: (x**power, ONES), x) for power in (2, 2.0))
    output, gradient = square()
    torch.testing.assert_close(output, x.detach() ** 2)
    first_seed = gradient / (2 * x.detach())
    torch.testing.assert_close(again()[1], gradient)
    torch.testing.assert_close(square()[1] / (2 * x.detach()), first_seed)


def test_sides_take_turns() -> None:
    turns: list[str] = []
    seconds = race({name: lambda name=name: turns.append(name) for name in "ab"}, CPU, repeats=3)
    assert turns == ["a", "b"] * 3
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_what_agrees_is_timed_and_written(tmp_path, capsys) -> None:
    status, report = run(one_case(structcot=lambda: ONES[None] @ ONES[:, None], torch=lambda: ONES.sum().view(1, 1)), tmp_path)
    assert status == 0
    assert report["blocked"] == {}
    assert report["device"].startswith(os.uname().machine)
    (case,) = report["cases"]
    assert (case["operation"], case["shape"], case["flops"], case["bytes"]) == ("sum", "3", 2 * 3, (3 + 3 + 1) * 4)
    for times in case["milliseconds"].values():
        assert 0 < times["min"] <= times["median"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["sum", "3", "structcot"], ["sum", "3", "torch"]]


@pytest.mark.parametrize(
    ("sides", "reason"),
    [
        ({"structcot": lambda: ONES, "torch": lambda: ONES * 1.06}, "structcot and torch differ in result 0 by 0.0566 of its norm"),
        ({"structcot": lambda: ONES * float("nan"), "torch": lambda: ONES}, "differ in result 0 by nan"),
        ({"structcot": lambda: (ONES, ONES), "torch": lambda: (ONES, -ONES)}, "differ in result 1 by 2"),
        ({"structcot": lambda: ONES, "torch": lambda: ONES[:2]}, r"structcot gives \[\(3,\)\], torch \[\(2,\)\]"),
        ({"torch": lambda: ONES, "structcot": lambda: ONES}, "torch comes first; it must be structcot"),
    ],
)
def test_what_disagrees_is_not_timed(sides, reason, tmp_path, capsys) -> None:
    status, report = run(one_case(**sides), tmp_path)
    assert status == 1
    assert report["cases"] == []
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report["blocked"]["sum 3"])
    assert "blocked: sum 3: " in capsys.readouterr().err


def too_large() -> None:
    raise torch.OutOfMemoryError


def test_a_side_that_does_not_fit_is_said_to(tmp_path, capsys) -> None:
    status, report = run(one_case(structcot=lambda: ONES, large=too_large, torch=lambda: ONES), tmp_path)
    assert status == 0
    assert [name for name, times in report["cases"][0]["milliseconds"].items() if times is None] == ["large"]
    assert "large                    out of memory" in capsys.readouterr().out
    status, report = run(one_case(structcot=too_large, torch=lambda: ONES), tmp_path)
    assert (status, report["blocked"]) == (1, {"sum 3": "out of memory"})


def test_red_tests_block_on_a_gpu(tmp_path, monkeypatch) -> None:
    def red(command, **_):
        assert command[-3:] == ["-m", "gpu", "tests/kernels/test_test_bench.py"]
        return subprocess.CompletedProcess(command, returncode=1, stdout="F\n1 failed in 3 s\n", stderr="")

    monkeypatch.setattr(subprocess, "run", red)
    assert find_red_tests("test_bench", CPU) is None
    assert find_red_tests("test_bench", torch.device("cuda")) == "tests/kernels/test_test_bench.py is red: 1 failed in 3 s"
    monkeypatch.setattr(harness, "find_red_tests", lambda name, device: f"{name} is red")
    status, report = run(one_case(structcot=lambda: ONES), tmp_path)
    assert (status, report["cases"], report["blocked"]) == (1, [], {"test_bench": "test_bench is red"})


@pytest.mark.parametrize("name", case_functions())
def test_sides_of_every_benchmark_agree(name) -> None:
    assert (ROOT / "tests" / "kernels" / f"test_{name}.py").exists()
    for case in case_functions()[name](CPU):
        assert len(case.sides) > 1
        assert find_disagreement(case, case.sides) is None


@pytest.mark.slow
def test_both_ways_to_run_write_the_same_cases(tmp_path) -> None:
    commands = {
        "own": ["-m", "bench", "--device", "cpu", "--repeats", "1", "--only", "rms_norm", "--json"],
        "pytest": ["-m", "pytest", "bench", "-q", "--benchmark-only", "-k", "rms_norm", "--benchmark-json"],
    }
    reports = {}
    for name, command in commands.items():
        path = tmp_path / f"{name}.json"
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, *command, str(path)], cwd=ROOT, env=environment, check=True, capture_output=True)
        reports[name] = json.loads(path.read_text(encoding="utf-8"))
        for case in reports[name]["cases"]:
            for times in case["milliseconds"].values():
                assert sorted(times) == ["median", "min"]
                times.clear()
    assert reports["own"]["cases"]
    assert reports["own"] == reports["pytest"]
