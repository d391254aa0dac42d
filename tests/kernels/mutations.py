"""Errors that a kernel's tests must notice: each is one wrong line, put into a copy of the sources whose tests then have to fail.

`MUTATIONS` maps a file of `structcot_kernels/jit` to a kernel to pairs of what its source says, once, and what it is made to say.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
JIT = Path("kernels/structcot_kernels/jit")
IGNORED = shutil.ignore_patterns("__pycache__")

MUTATIONS: dict[str, dict[str, list[tuple[str, str]]]] = {
    "rms_norm": {
        "forward_kernel": [
            ("/ num_columns + eps)", "/ num_columns)"),
            ("hidden_stride + columns, mask=inside, other=0.0)", "hidden_stride + columns, mask=rows < num_rows, other=0.0)"),
            ("rows * delta_stride", "rows * num_columns"),
            ("(wide * rstd).to(x.dtype)", "wide * rstd"),
            ("tl.store(rstd_ptr + rows, rstd,", "tl.store(rstd_ptr + rows, rstd * rstd,"),
        ],
        "backward_kernel": [
            ("weighted - scaled * along", "weighted + scaled * along"),
            ("keep_dims=True) / num_columns", "keep_dims=True)"),
            ("out += tl.load(residual_ptr", "out = tl.load(residual_ptr"),
            ("rows * residual_stride", "rows * num_columns"),
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
            ("tokens * heads_stride", "tokens * num_heads * width"),
            ('mask=in_table, other=float("nan")', "mask=in_table, other=1.0"),
            ("(positions < num_positions) & ", ""),
        ],
    },
    "swiglu": {
        "forward_kernel": [
            ("gate * tl.sigmoid(gate) * up", "tl.sigmoid(gate) * up"),
            ("rows * gate_stride", "rows * num_columns"),
            ("rows * up_stride", "rows * gate_stride"),
        ],
        "backward_kernel": [
            ("silu * (1.0 - sigmoid)", "silu * (1.0 + sigmoid)"),
            ("(grad * silu)", "(grad * sigmoid)"),
            ("(silu * up)", "silu"),
            ("rows * grad_stride", "rows * num_columns"),
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
            ("rows * x_stride", "rows * inner"),
        ],
        "up_kernel": [
            ("total *= scale", "total *= 1.0"),
            ("range(0, rank, BLOCK_R)", "range(0, BLOCK_R, BLOCK_R)"),
            ("columns * b_stride_n", "columns * b_stride_r"),
            ("rows * start_stride", "rows * num_columns"),
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
            ("labels[:, None] * weight_stride", "rows[:, None] * weight_stride"),
            ("rows[:, None] * hidden_stride", "rows[:, None] * inner"),
        ],
        "block_of_program": [
            ("within // together", "within % together"),
            ("(GROUP * column_blocks) * GROUP", "(GROUP * column_blocks)"),
        ],
        "relative_logits": [
            ("weight_ptrs += BLOCK_D", "weight_ptrs += 0"),
            ("hidden, weight, logits,", "hidden, weight,"),
            ("left[None, :], other=0.0", "left[None, :], other=1.0"),
        ],
        "exp_kernel": [
            ("d = tl.where(is_other, d,", "d = tl.where((columns < num_columns)[None, :], d,"),
            ("exponentials *= tl.exp(tl.minimum(top, LOG_BOUND))[:, None]", "exponentials *= 1.0"),
            ("tl.maximum(tl.max(d, axis=1), LOWEST)", "tl.max(d, axis=1) * 0.0"),
            ("rows[:, None] * exp_stride", "rows[:, None] * num_columns"),
        ],
        "log1p_small": [
            ("static_range(6, -1, -1)", "static_range(2, -1, -1)"),
            ("x / (2.0 + x)", "x / (1.0 + x)"),
        ],
        "row_kernel": [
            ("sums * tl.exp(tops - top[None, :])", "sums"),
            ("+ log1p_small(ratio)", "+ ratio"),
            ("(-whole * share)", "-share"),
            ("tl.where(far, losses - LOG_BOUND, 0.0)", "tl.where(far, 0.0, 0.0)"),
            ("1.0 / whole", "whole"),
        ],
        "repair_kernel": [
            ("d - shift[:, None]", "d"),
            ("tl.where(is_label, BOUND, 0.0)", "tl.where(is_label, 1.0, 0.0)"),
            ("(shift > 0.0)[:, None] & ", ""),
        ],
        "scale_kernel": [
            ("scale * tl.load(factor_ptr)", "scale"),
            ("rows * rows_stride", "rows * num_columns"),
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
    return [Mutation(file, kernel, *pair) for file, kernels in MUTATIONS.items() for kernel, pairs in kernels.items() for pair in pairs]


def kernels_of(text: str) -> dict[str, str]:
    """Source of each @triton.jit function, by its name."""
    return {
        node.name: ast.get_source_segment(text, node) or ""
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)
    }


def run_tests(file: str, mutated: str | None, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run the tests of `file` on a copy of the sources, in which its text is `mutated`."""
    shutil.copytree(ROOT / "kernels", directory / "kernels", ignore=IGNORED)
    shutil.copytree(ROOT / "tests", directory / "tests", ignore=IGNORED)
    shutil.copy(ROOT / "pyproject.toml", directory)
    if mutated is not None:
        (directory / JIT / f"{file}.py").write_text(mutated, encoding="utf-8")
    words = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/kernels/test_{file}.py"]
    variables = {**os.environ, "PYTHONPATH": str(directory / "kernels")}
    return subprocess.run([sys.executable, *words], cwd=directory, env=variables, capture_output=True, text=True, check=False)
