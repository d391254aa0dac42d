"""The ahead-of-time check: it compiles the real kernels, covers all of them, and refuses each kind of bad one."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from structcot_kernels import aot, jit
from structcot_kernels._production import OPERATIONS, production_launches
from structcot_kernels._sass import load_bytes
from structcot_kernels.launch import Launch

ROOT = Path(__file__).parents[2]
KEYS = {"registers", "spilled_bytes", "shared_memory_bytes", "shared_memory_limit_bytes", "matrix_instructions", "load_bytes", "violations"}


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A program in a process whose kernels are not interpreted, unless `variables` say so."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    variables = {**environment, "PYTHONPATH": paths, **variables}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def launched_kernels() -> Iterator[tuple[str, str]]:
    """Operation and kernel, of every launch that the sources of the kernels speak of."""
    for path in Path(jit.__file__).parent.glob("[!_]*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        yield from ((path.stem, ast.unparse(call.args[0])) for call in calls if ast.unparse(call.func) == "launch")


def test_every_kernel_of_every_operation_is_compiled() -> None:
    compiled = {(operation, launch.kernel.__name__) for operation, _, launch in production_launches(90)}
    assert set(launched_kernels()) == compiled
    assert {operation for operation, _ in compiled} == set(OPERATIONS)


def test_the_command_prints_and_writes_a_row_for_each_kernel(tmp_path: Path) -> None:
    ran = run("-m", "structcot_kernels.aot", "--arch", "90", "--operation", "rms_norm", "--json", str(tmp_path / "rows.json"))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    facts = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert facts["ok"]
    assert {row["kernel"] for row in facts["kernels"]} == {"forward_kernel", "backward_kernel", "weight_grad_kernel"}
    heading, *lines = ran.stdout.split("\n\n")[0].splitlines()
    assert heading.split()[:3] == ["kernel", "registers", "spilled"]
    for line, row in zip(lines, facts["kernels"], strict=True):
        assert row.keys() >= KEYS
        assert line.split()[:5] == ["sm_90", f"rms_norm.{row['kernel']}", str(row["registers"]), "0", str(row["shared_memory_bytes"])]
        assert 16 <= row["registers"] <= 255
        assert row["shared_memory_limit_bytes"] == 232448


@pytest.mark.slow
def test_setup_runs_the_same() -> None:
    ran = run("setup.py", "-q", "compile_kernels", "--operation=rms_norm")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "sm_90 rms_norm.forward_kernel" in ran.stdout


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, dict]]:
    """How the check of tests/kernels/bad_kernels.py ended, and its rows by use."""
    path = tmp_path_factory.mktemp("aot") / "rows.json"
    ran = run("tests/kernels/bad_kernels.py", str(path))
    facts = json.loads(path.read_text(encoding="utf-8"))
    assert not facts["ok"]
    return ran, {row["uses"][0]: row for row in facts["kernels"]}


def test_bad_kernels_end_it_with_status_1_after_all_rows(bad) -> None:
    ran, rows = bad
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout.count(" BAD ") == sum(bool(row["violations"]) for row in rows.values()) == 5
    assert "7 compilations" in ran.stdout
    assert all(violation in ran.stdout for row in rows.values() for violation in row["violations"])


def test_equal_compilations_are_made_once(bad) -> None:
    assert bad[1]["right"]["uses"] == ["right", "right once more"]


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("unaligned", "loads at most 2 bytes at once"),
        ("no power of 2", "does not compile"),
        ("too few registers", "spills"),
        ("too much shared memory", "bytes of shared memory; there are 232448"),
        ("too few rows for a warp group", "multiplies 16-bit matrices by HMMA; it must by HGMMA"),
    ],
)
def test_what_is_wrong_is_said(bad, use: str, words: str) -> None:
    (violation,) = bad[1][use]["violations"]
    assert words in violation


def test_what_is_right_passes(bad) -> None:
    assert bad[1]["right"]["violations"] == bad[1]["right dot"]["violations"] == []
    assert bad[1]["right"]["load_bytes"] == 16
    assert set(bad[1]["right dot"]["matrix_instructions"]) == {"HGMMA"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arch", "75"], "got '75'; use 80, 90, 100"),
        (["--arch", "90,"], "got ''; use 80, 90, 100"),
        (["--operation", "sgemm"], "invalid choice: 'sgemm'"),
    ],
)
def test_bad_usage_is_status_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        aot.main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_interpreted_kernels_are_not_compiled() -> None:
    ran = run("-m", "structcot_kernels.aot", "--arch", "90", TRITON_INTERPRET="1")
    assert ran.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in ran.stderr
    assert "Traceback" not in ran.stderr


def die(index: int) -> None:
    os._exit(1)


class Kernel:
    __name__ = "kernel"


def test_a_compiler_that_dies_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "compile_one", die)
    (row,) = aot.compile_all([aot.Job(90, "operation", Launch(Kernel(), (1,), (), {}), ["use"])])
    assert row.violations == ["not compiled: the compiler killed its process, at this kernel or at one compiled beside it"]


@pytest.mark.parametrize(
    ("mnemonic", "width_bytes"),
    [
        ("LDG.E.128", 16),
        ("LDGSTS.E.BYPASS.LTC128B.128", 16),
        ("LDG.E.ENL2.256", 32),
        ("LDG.E.64", 8),
        ("LDG.E", 4),
        ("LDG.E.LTC128B", 4),
        ("LDG.E.U16", 2),
        ("LDGSTS.E", 4),
        ("UTMALDG.2D", 16),
        ("LDGDEPBAR", 0),
        ("LDS.128", 0),
        ("STG.E.128", 0),
    ],
)
def test_the_width_of_a_load_is_read_from_its_name(mnemonic: str, width_bytes: int) -> None:
    assert load_bytes(mnemonic) == width_bytes
