"""The conventions of the code base, as tests: who imports whom, how long files and functions are, what is never written."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("structcot", "kernels", "bench") for path in (ROOT / folder).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 320, 60, 8
COMMANDS = {"structcot.train", "structcot.cli"}

# What each part may import of ours, by prefix of the module's name; the longest prefix that fits decides.
ALLOWED = {
    "structcot_kernels": ("structcot_kernels",),
    "structcot.errors": (),
    "structcot.files": ("structcot.errors",),
    "structcot.tags": (),
    "structcot.answers": ("structcot.tags",),
    "structcot.traces": ("structcot.errors", "structcot.tags"),
    "structcot.parallel": ("structcot.errors",),
    "structcot.grading": ("structcot.errors", "structcot.tags", "structcot.answers", "structcot.grading"),
    "structcot.grading.code": ("structcot.tags", "structcot.sandbox", "structcot.eval.problem", "structcot.grading.case"),
    "structcot.sandbox": ("structcot.errors", "structcot.sandbox"),
    "structcot.page": (),
    "structcot.eval.statistics": (),
    "structcot.eval.endings": ("structcot.structure",),
    "structcot.eval.golden": (),
    "structcot.eval.summary": ("structcot.errors", "structcot.grading.case", "structcot.eval"),
    "structcot.eval.report": ("structcot.errors", "structcot.files", "structcot.report_charts", "structcot.page", "structcot.eval"),
    "structcot.eval.__main__": ("structcot.cli",),
    "structcot.perturb": (
        "structcot.errors",
        "structcot.files",
        "structcot.parallel",
        "structcot.answers",
        "structcot.tags",
        "structcot.traces",
        "structcot.server",
        "structcot.structure",
        "structcot.report_charts",
        "structcot.page",
        "structcot.grading",
        "structcot.perturb",
    ),
    "structcot.perturb.__main__": ("structcot.cli",),
    "structcot.structure": ("structcot.errors", "structcot.tags", "structcot.answers", "structcot.server", "structcot.structure"),
    "structcot.config": ("structcot.errors",),
    "structcot.config_file": ("structcot.errors", "structcot.config"),
    "structcot.data": (
        "structcot.errors",
        "structcot.config",
        "structcot.files",
        "structcot.model_files",
        "structcot.tags",
        "structcot.hub",
        "structcot.data",
    ),
    "structcot.model": (
        "structcot_kernels",
        "structcot.errors",
        "structcot.config",
        "structcot.data.batch",
        "structcot.model_files",
        "structcot.offload",
        "structcot.model",
    ),
    "structcot.offload": ("structcot.errors",),
    "structcot.distributed": ("structcot.errors", "structcot.config", "structcot.signals"),
    "structcot.ledger": ("structcot_kernels",),
    "structcot.counting": ("structcot_kernels",),
    "structcot.model_files": ("structcot.errors",),
    "structcot.clock": ("structcot.errors", "structcot.files", "structcot.tags", "structcot.clock"),
    "structcot.clock.skills": ("structcot.eval",),
    "structcot.completion": (),
    "structcot.server": ("structcot.errors", "structcot.completion"),
    "structcot.curate": (
        "structcot.errors",
        "structcot.files",
        "structcot.config",
        "structcot.config_file",
        "structcot.console",
        "structcot.parallel",
        "structcot.rundir",
        "structcot.page",
        "structcot.tags",
        "structcot.answers",
        "structcot.traces",
        "structcot.completion",
        "structcot.structure",
        "structcot.grading",
        "structcot.sandbox",
        "structcot.data.rows",
        "structcot.eval",
        "structcot.curate",
    ),
    "structcot.curate.__main__": ("structcot.cli",),
    "structcot.countdown": ("structcot.errors", "structcot.files", "structcot.countdown"),
    "bench": ("structcot", "structcot_kernels", "bench"),
    "structcot.report": ("structcot.errors", "structcot.files", "structcot.page", "structcot.report"),
    "structcot.study.config": (
        "structcot.errors",
        "structcot.config",
        "structcot.config_file",
        "structcot.fetch",
        "structcot.perturb.spec",
    ),
    "structcot.study.resolved": (
        "structcot.errors",
        "structcot.config",
        "structcot.config_file",
        "structcot.eval.config",
        "structcot.eval.prompts",
        "structcot.eval.tasks",
        "structcot.study.config",
    ),
    "structcot.study.cells": ("structcot.errors", "structcot.files", "structcot.config", "structcot.eval.config", "structcot.rundir"),
    "structcot.study.sources": (
        "structcot.errors",
        "structcot.files",
        "structcot.tags",
        "structcot.traces",
        "structcot.answers",
        "structcot.study.config",
    ),
    "structcot.study.grid": (
        "structcot.errors",
        "structcot.config",
        "structcot.model_files",
        "structcot.perturb.spec",
        "structcot.study.config",
        "structcot.study.resolved",
        "structcot.study.cells",
        "structcot.study.sources",
    ),
    "structcot.study.progress": ("structcot.console",),
    "structcot.study.slurm": ("structcot.study.cells",),
    "structcot.study.__main__": ("structcot.cli",),
    "structcot.study.statistics": ("structcot.eval.statistics",),
    "structcot.study.paper_table": ("structcot.eval.golden", "structcot.eval.statistics", "structcot.study.statistics"),
    "structcot.study.conclusions": ("structcot.eval.report_page", "structcot.study.report_order"),
    "structcot.study.report": (
        "structcot.files",
        "structcot.report_charts",
        "structcot.page",
        "structcot.eval.report_page",
        "structcot.eval.report_samples",
        "structcot.eval.endings",
        "structcot.study.report",
        "structcot.study.statistics",
    ),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, f"{'.' * node.level}{node.module or ''}"


def functions_of(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


def is_ours(module: str) -> bool:
    return module.split(".")[0] in ("structcot", "structcot_kernels", "bench", "tests")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_each_part_imports_only_what_lies_below_it(path: Path) -> None:
    module = name_of(path)
    rules = [prefix for prefix in ALLOWED if module == prefix or module.startswith((f"{prefix}.", f"{prefix}_"))]
    allowed = ALLOWED[max(rules, key=len)] if rules else ("structcot", "structcot_kernels")
    for line, imported in imports_of(path):
        assert not imported.startswith("."), f"{path}:{line}: imports relatively; write the whole name"
        if is_ours(imported) and imported != "structcot":  # which has the version
            fits = any(imported == name or imported.startswith((f"{name}.", f"{name}_")) for name in allowed)
            assert fits, f"{path}:{line}: {module} imports {imported}; it may import {allowed}"


def test_nobody_imports_the_training_loop() -> None:
    for path in SOURCES:
        for line, imported in imports_of(path):
            assert imported != "structcot.train" or name_of(path) in COMMANDS, f"{path}:{line}: imports structcot.train"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_holds_one_thing(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES, f"{path}: {lines} lines"
    assert path.stem not in {"utils", "util", "common", "helpers", "misc", "base", "types"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_function_fits_on_a_screen(path: Path) -> None:
    is_kernel = path.is_relative_to(ROOT / "kernels")
    for function in functions_of(path):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        arguments = function.args
        count = len(arguments.args) + len(arguments.kwonlyargs) + len(arguments.posonlyargs)
        assert length <= MAX_FUNCTION_LINES, f"{path}:{function.lineno}: {function.name} has {length} lines"
        assert count <= (20 if is_kernel else MAX_PARAMETERS), f"{path}:{function.lineno}: {function.name} has {count} parameters"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_is_swallowed_asserted_or_left_for_later(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}: a bare assert; raise an error that helps"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            assert caught not in {"", "Exception", "BaseException"}, f"{path}:{node.lineno}: catches everything"
    assert not re.search(r"#\s*(TODO|FIXME|XXX|HACK)\b", text), f"{path}: holds a note for later"


def test_the_instrument_of_structure_needs_no_torch() -> None:
    code = (
        "import sys, structcot.perturb.command, structcot.segment, structcot.view; print([name for name in sys.modules if name == 'torch'])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_remote_code_is_never_asked_for() -> None:
    for path in SOURCES:
        assert "trust_remote_code=True" not in path.read_text(encoding="utf-8"), path
        assert not re.search(r"\b(pickle|torch)\.load\(", path.read_text(encoding="utf-8")), f"{path}: unpickles a file"


def test_every_operation_has_a_reference_of_the_same_signature() -> None:
    import inspect

    import structcot_kernels
    from structcot_kernels import reference

    for name in structcot_kernels.__all__:
        assert inspect.signature(getattr(structcot_kernels, name)) == inspect.signature(getattr(reference, name)), name


def test_the_kernels_folder_does_not_shadow_the_package_of_that_name() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
