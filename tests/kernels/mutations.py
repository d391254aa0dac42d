"""Errors that a kernel's tests must notice: each is one wrong line, put into a copy of the sources whose tests then have to fail.

`MUTATIONS` maps a file of `structcot_kernels/jit` to a kernel to what its source says, once, and what it is made to say. Where a test that
comes late notices, its name (as for pytest -k) is given too, so that the others need not run before it.
"""

from __future__ import annotations

import ast
import multiprocessing
import shlex
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
JIT = Path("kernels/structcot_kernels/jit")
OUTPUT = "output.txt"
LONGEST_SECONDS = 250

MUTATIONS: dict[str, dict[str, list[tuple[str, ...]]]] = {
    "rms_norm": {
        "forward_kernel": [
            ("/ num_columns + eps)", "/ num_columns)"),
            ("hidden_stride + columns, mask=inside, other=0.0)", "hidden_stride + columns, mask=rows < num_rows, other=0.0)"),
            ("rows * delta_stride", "rows * num_columns", "lie"),
            ("tl.store(rstd_ptr + rows, rstd,", "tl.store(rstd_ptr + rows, rstd * rstd,"),
        ],
        "backward_kernel": [
            ("weighted - scaled * along", "weighted + scaled * along"),
            ("keep_dims=True) / num_columns", "keep_dims=True)"),
            ("out += tl.load(residual_ptr", "out = tl.load(residual_ptr", "residual"),
            ("rows * residual_stride", "rows * num_columns", "lie"),
        ],
        "weight_grad_kernel": [
            ("total += tl.sum", "total = tl.sum"),
            ("chunk * ROWS + start", "start"),
            ("partial_ptr + chunk * num_columns + columns", "partial_ptr + columns"),
            ("hidden.to(tl.float32) * rstd", "hidden.to(tl.float32)"),
        ],
    },
    "rope": {
        "rope_kernel": [
            ("first * cos - second * sin", "first * cos + second * sin"),
            ("second * cos + first * sin", "second * cos - first * sin"),
            ("sin = -sin", "sin = sin"),
            ("cos_ptr + positions * width", "cos_ptr + tokens * width"),
            ("tokens * heads_stride", "tokens * num_heads * width", "lie"),
            ('mask=in_table, other=float("nan")', "mask=in_table, other=1.0"),
            ("(positions < num_positions) & ", ""),
        ],
    },
    "swiglu": {
        "forward_kernel": [
            ("gate * tl.sigmoid(gate) * up", "tl.sigmoid(gate) * up"),
            ("rows * gate_stride", "rows * num_columns", "lie"),
            ("rows * up_stride", "rows * num_columns", "lie"),
        ],
        "backward_kernel": [
            ("silu * (1.0 - sigmoid)", "silu * (1.0 + sigmoid)"),
            ("(grad * silu)", "(grad * sigmoid)"),
            ("(silu * up)", "silu", "again"),
            ("rows * grad_stride", "rows * num_columns", "lie"),
        ],
    },
    "swiglu_low_rank": {
        "forward_kernel": [
            (
                'tl.dot(s_gate, tl.trans(b_gate), input_precision="ieee") * scale',
                'tl.dot(s_gate, tl.trans(b_gate), input_precision="ieee")',
            ),
            ("(2 * rank) + rank + ranks", "(2 * rank) + ranks"),
            ("tl.trans(a_down), s_down,", "tl.trans(a_down),"),
            ("act = (gate * tl.sigmoid(gate) * up)", "act = (tl.sigmoid(gate) * up)"),
        ],
        "backward_kernel": [
            ("silu * (1.0 - sigmoid)", "silu * (1.0 + sigmoid)"),
            ("grad_act += tl.dot", "grad_act = tl.dot"),
            ("grad_b_up * scale", "grad_b_up"),
            ("chunk * rows_at_once + start", "chunk * rows_at_once"),
            ("grad_b_ptr + chunk * (2 * width * rank)", "grad_b_ptr + chunk * (width * rank)"),
            ("ds_down, grad_a,", "ds_down,"),
        ],
    },
    "low_rank": {
        "keep": [
            ("mixed >> 27", "mixed >> 28"),
            ("mixed >> 40", "mixed >> 39"),
            (">= threshold", "< threshold"),
        ],
        "down_kernel": [
            ("x = tl.where(keep(keys, columns[None, :], threshold), x, 0.0)", "x = tl.where(keep(keys, columns[None, :], 0), x, 0.0)"),
            ("(total * scale)", "total"),
            ("range(0, inner, BLOCK_K)", "range(0, BLOCK_K, BLOCK_K)"),
            ("rows * x_stride", "rows * inner", "lie"),
        ],
        "up_kernel": [
            ("total *= scale", "total *= 1.0"),
            ("range(0, rank, BLOCK_R)", "range(0, BLOCK_R, BLOCK_R)"),
            ("columns * b_stride_n", "columns * b_stride_r"),
            ("rows * start_stride", "rows * num_columns", "lie"),
            ("total += tl.load(start_ptr", "total = tl.load(start_ptr"),
            ("tl.where(keep(keys, columns, threshold), total, 0.0)", "tl.where(keep(keys, columns, threshold), 0.0, total)"),
        ],
        "grad_kernel": [
            ("chunk * rows_at_once + start", "start"),
            ("tl.trans(right), left, total,", "tl.trans(right), left,"),
            ("total * scale", "total"),
            ("partial_ptr + offsets", "partial_ptr + offsets - chunk * num_columns * rank"),
            ("tl.where(keep(keys, columns[None, :], threshold), right, 0.0)", "right"),
        ],
    },
    "linear_cross_entropy": {
        "target_kernel": [
            ("total += hidden", "total = hidden"),
            ("labels[:, None] * weight_stride", "labels[:, None] * inner", "lie"),
            ("rows[:, None] * hidden_stride", "rows[:, None] * inner", "lie"),
        ],
        "block_of_program": [
            ("within // together", "within % together"),
            ("(GROUP * column_blocks) * GROUP", "(GROUP * column_blocks)", "more_row_blocks"),
        ],
        "block_logits": [
            ("weight_ptrs += BLOCK_D", "weight_ptrs += 0"),
            ("hidden, weight, logits,", "hidden, weight,"),
            ("rows[:, None] * hidden_stride", "rows[:, None] * inner", "lie"),
        ],
        "exp_kernel": [
            ("tl.where(is_other, logits,", "tl.where((columns < num_columns)[None, :], logits,"),
            ("exponentials *= tl.exp(largest - ", "exponentials *= tl.exp("),
            ("rows[:, None] * exp_stride", "rows[:, None] * num_columns"),
        ],
        "log1p_small": [
            ("static_range(6, -1, -1)", "static_range(2, -1, -1)", "every_row"),
            ("x / (2.0 + x)", "x / (1.0 + x)"),
        ],
        "row_kernel": [
            ("sums * tl.exp(peaks - largest[None, :])", "sums"),
            ("+ log1p_small(ratio)", "+ ratio"),
            ("(-entry)", "entry"),
            ("whole * tl.where(many, 1.0, ratio) / (1.0 + ratio)", "whole - whole / (1.0 + others)", "every_row"),
            ("scale_ptr + rows, 1.0 / whole", "scale_ptr + rows, whole"),
            ("tl.where(far, entry / tl.maximum(total, 1.0), 0.0)", "tl.where(far, entry, 0.0)"),
        ],
        "repair_kernel": [
            (" * factor[:, None]", ""),
            ("tl.where(is_label, REPAIRED_TOTAL, 0.0)", "0.0"),
            ("(factor > 0.0)[:, None]", "(rows < num_rows)[:, None]"),
        ],
        "scale_kernel": [
            ("scale * tl.load(factor_ptr)", "scale"),
            ("rows * rows_stride", "rows * num_columns", "lie"),
        ],
    },
}


@dataclass(frozen=True, slots=True)
class Mutation:
    """One wrong line of a kernel."""

    file: str
    kernel: str
    old: str
    new: str
    tests: str = ""

    def __str__(self) -> str:
        """The kernel and the change."""
        return f"{self.file}.{self.kernel}: {self.old} -> {self.new or 'nothing'}"

    def applied(self) -> str:
        """The text of the file with the error in it.

        Raises:
            ValueError: if the kernel does not say `old` exactly once.
        """
        text = (ROOT / JIT / f"{self.file}.py").read_text(encoding="utf-8")
        kernel = kernels_of(text)[self.kernel]
        if kernel.count(self.old) != 1 or text.count(kernel) != 1:
            raise ValueError(f"{self}: the kernel says this {kernel.count(self.old)} times; it must once")
        return text.replace(kernel, kernel.replace(self.old, self.new))


def all_mutations() -> list[Mutation]:
    """Every one, in order."""
    return [
        Mutation(file, kernel, *words) for file, kernels in MUTATIONS.items() for kernel, entries in kernels.items() for words in entries
    ]


def kernels_of(text: str) -> dict[str, str]:
    """Source of each @triton.jit function, by its name."""
    return {
        node.name: ast.get_source_segment(text, node) or ""
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)
    }


def outcome_of(file: str, mutation: Mutation | None, directory: Path) -> tuple[int | None, str]:
    """Run the tests of `file` on a copy of the kernels in `directory`, with the error in it.

    They run in a new process that has the libraries imported but none of ours.

    Returns:
        Exit status of pytest, negative if it crashed, None if it took too long; and what it said.
    """
    copy = directory / "kernels"
    shutil.copytree(ROOT / "kernels", copy, ignore=shutil.ignore_patterns("__pycache__"))
    if mutation is not None:
        (directory / JIT / f"{file}.py").write_text(mutation.applied(), encoding="utf-8")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton.language", "triton.runtime.interpreter", "sympy", "pytest"])
    process = context.Process(target=run_tests, args=(file, mutation.tests if mutation else "", copy))
    process.start()
    process.join(LONGEST_SECONDS)
    status = process.exitcode
    process.kill()
    return status, (directory / OUTPUT).read_text(encoding="utf-8")


def run_tests(file: str, tests: str, copy: Path) -> None:
    """In a new process: run the tests of `file`, or those named `tests`, on the copied kernels, and end as pytest ends."""
    import pytest

    words = ["-x", "-q", "-k", tests, "-p", "no:cacheprovider", "-o", f"pythonpath={shlex.join([str(ROOT), str(copy)])}"]
    with (copy.parent / OUTPUT).open("w", encoding="utf-8") as output, redirect_stdout(output), redirect_stderr(output):
        status = pytest.main([*words, str(ROOT / "tests" / "kernels" / f"test_{file}.py")])
        used = Path(sys.modules["structcot_kernels"].__file__ or "")
        if not used.is_relative_to(copy):
            raise RuntimeError(f"the tests of {file} ran on {used}; they must on the copy in {copy}")
    sys.exit(status)
