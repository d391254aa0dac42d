"""Every microbenchmark of the kernels, or those that `--only` names. Run as `python -m bench [--device cuda] [--only OP] [--json FILE]`.

On a GPU a whole run is also kept in bench/results/kernels_<device>.json. The exit status is 1 if a red test blocked something.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch

from bench.harness import CaseFunction, execute, parser
from bench.report import results_path


def case_functions() -> dict[str, CaseFunction]:
    """`cases` of every bench_NAME.py that has one, by NAME."""
    paths = sorted(Path(__file__).parent.glob("bench_*.py"))
    modules = {path.stem.removeprefix("bench_"): import_module(f"bench.{path.stem}") for path in paths}
    return {name: module.cases for name, module in modules.items() if hasattr(module, "cases")}


def main() -> None:
    """Run them."""
    functions = case_functions()
    options = parser((__doc__ or "").splitlines()[0])
    options.add_argument("--only", action="append", choices=functions, help="one operation; may be repeated")
    chosen = options.parse_args()
    whole_run = None if chosen.only else results_path(torch.device(chosen.device))
    sys.exit(execute([functions[name] for name in chosen.only or functions], chosen, whole_run))


if __name__ == "__main__":
    main()
