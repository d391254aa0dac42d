"""Compile every kernel as training runs launch it, without a GPU, and say what each takes: `python -m structcot_kernels.aot --arch 90`.

A launch is specialised by Triton's own code, as on a GPU: types, alignment, and which numbers are 1 or multiples of 16 come from the
recorded arguments. One row is printed for each distinct compilation. Exit status 1 if one of them does not compile, spills registers, takes
more shared memory than there is, multiplies 16-bit matrices by another instruction than the architecture's own, or nowhere loads 16 bytes
at once.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError

from structcot_kernels._production import OPERATIONS, production_launches
from structcot_kernels._sass import WIDEST_BYTES, Resources, resources_of
from structcot_kernels.launch import INTERPRETED, Launch

SHARED_LIMIT_BYTES = {80: 166912, 90: 232448, 100: 232448}
"""Shared memory that one program can have, by compute capability. Source: CUDA C++ Programming Guide, table of technical specifications."""

MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""What 16-bit matrices are multiplied with, by compute capability. Newer architectures still know the older, slower instruction."""

NARROW_DOT = re.compile(r"tt\.dot .*: tensor<\d+x\d+xb?f16>")


@dataclass(frozen=True, slots=True)
class Job:
    """One distinct compilation, and every launch that it serves."""

    arch: int
    operation: str
    launch: Launch
    uses: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the compilation of one kernel gave; `constants` are its upper-case arguments and compile options."""

    arch: int
    operation: str
    kernel: str
    constants: dict[str, Any]
    uses: list[str]
    registers: int = 0
    spilled_bytes: int = 0
    shared_memory_bytes: int = 0
    shared_memory_limit_bytes: int
    matrix_instructions: dict[str, int] = field(default_factory=dict)
    global_loads: dict[int, int] = field(default_factory=dict)
    load_bytes: int = 0
    violations: list[str]


class Target:
    """Stands in for the driver of a GPU that is not there: Triton asks it what to compile for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """An Nvidia GPU of this compute capability."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """A number under which compiled kernels are kept apart from those of another architecture."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """The default stream; nothing is started on it."""
        return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 something is wrong with a kernel, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m structcot_kernels.aot", description="Compile every kernel without a GPU and check it.")
    known = ", ".join(map(str, SHARED_LIMIT_BYTES))
    parser.add_argument("--arch", default="90", help=f"compute capabilities, separated by commas, of {known}; default 90")
    parser.add_argument("--operation", choices=list(OPERATIONS), help="compile only this operation's kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    options = parser.parse_args(arguments)
    architectures = options.arch.split(",")
    for arch in architectures:
        if arch not in map(str, SHARED_LIMIT_BYTES):
            parser.error(f"--arch: got {arch!r}; use {known}, or several of them separated by commas")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set, so the kernels of this process are interpreted and cannot be compiled; unset it")
    return report({int(arch): production_launches(int(arch), options.operation) for arch in architectures}, options.json)


def report(launches: Mapping[int, Iterable[tuple[str, str, Launch]]], json_path: Path | None) -> int:
    """Compile the launches (operation, use, launch) for each compute capability, print a row each, write them to `json_path`.

    Returns 1 if a row has a violation, else 0.
    """
    rows = compile_all(jobs_of(launches))
    print(table(rows))
    violations = [f"{title(row)} ({row.uses[0]}): {violation}" for row in rows for violation in row.violations]
    print(f"\n{len(rows)} compilations by Triton {triton.__version__}, {len(violations)} violations", *violations, sep="\n")
    if json_path is not None:
        facts = {"triton": triton.__version__, "ok": not violations, "kernels": [asdict(row) for row in rows]}
        json_path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 1 if violations else 0


# Compile


def jobs_of(launches: Mapping[int, Iterable[tuple[str, str, Launch]]]) -> list[Job]:
    """The distinct compilations that `launches` need, in order."""
    jobs: dict[tuple[int, str, str], Job] = {}
    for arch, listed in launches.items():
        for operation, use, launch in listed:
            job = jobs.setdefault((arch, *specialization(launch, arch)), Job(arch, operation, launch))
            if use not in job.uses:
                job.uses.append(use)
    return list(jobs.values())


def specialization(launch: Launch, arch: int) -> tuple[str, str]:
    """The kernel's full name, and Triton's own key of what it would compile; the hook that is told both stops it from compiling."""
    found: list[tuple[str, str]] = []

    def note(*, key: str, fn: Any, **_: Any) -> bool:
        found.append((f"{fn.module}.{fn.name}", key))
        return True

    triton.runtime.driver.set_active(Target(arch))
    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
    return found[0]


def compile_all(jobs: list[Job]) -> list[Row]:
    """Rows in the order of `jobs`, compiled side by side in a process for each processor."""
    _jobs[:] = jobs  # forked processes find them here: a kernel cannot be sent to another process
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("fork")) as pool:
        futures = [pool.submit(compile_one, index) for index in range(len(jobs))]
        return [row_of(future, job) for future, job in zip(futures, jobs, strict=True)]


_jobs: list[Job] = []


def row_of(future: Future[Row], job: Job) -> Row:
    """What a process found out; or that it died, as a compiler sometimes does."""
    try:
        return future.result()
    except BrokenProcessPool:
        return failed(job, "not compiled: the compiler killed its process, at this kernel or at one compiled beside it")


def compile_one(index: int) -> Row:
    """Compile a job and look at what came out."""
    job = _jobs[index]
    triton.runtime.driver.set_active(Target(job.arch))
    try:
        with redirect_stdout(io.StringIO()):  # where Triton puts the whole program if the assembler refuses it
            compiled = job.launch.kernel.warmup(*job.launch.args, grid=job.launch.grid, **job.launch.meta)
    except (TritonError, RuntimeError) as error:
        return failed(job, f"does not compile: {' '.join(str(error).split())[:400]}")
    resources, shared_bytes = resources_of(compiled.asm["cubin"]), compiled.metadata.shared
    has_dot = NARROW_DOT.search(compiled.asm["ttir"]) is not None
    return Row(
        **identity(job),
        registers=resources.registers,
        spilled_bytes=resources.spilled_bytes,
        shared_memory_bytes=shared_bytes,
        matrix_instructions=resources.matrix_instructions,
        global_loads=resources.global_loads,
        load_bytes=widest(resources),
        violations=violations_of(job.arch, resources, shared_bytes, has_dot),
    )


def failed(job: Job, why: str) -> Row:
    """A row without numbers."""
    return Row(**identity(job), violations=[why])


def identity(job: Job) -> dict[str, Any]:
    """The part of a row that is known before it is compiled."""
    return {
        "arch": job.arch,
        "operation": job.operation,
        "kernel": job.launch.kernel.__name__,
        "constants": job.launch.meta,
        "uses": job.uses,
        "shared_memory_limit_bytes": SHARED_LIMIT_BYTES[job.arch],
    }


def violations_of(arch: int, resources: Resources, shared_bytes: int, has_dot: bool) -> list[str]:
    """What is wrong with a kernel; `has_dot` if it multiplies matrices of 16-bit numbers."""
    limit_bytes, wanted = SHARED_LIMIT_BYTES[arch], MATRIX_INSTRUCTION[arch]
    found = []
    if resources.spilled_bytes:
        found.append(f"spills {resources.spilled_bytes} bytes a thread")
    if shared_bytes > limit_bytes:
        found.append(f"takes {shared_bytes} bytes of shared memory; there are {limit_bytes}")
    if has_dot and set(resources.matrix_instructions) != {wanted}:
        found.append(
            f"multiplies 16-bit matrices by {', '.join(resources.matrix_instructions) or 'no matrix instruction'}; it must by {wanted}"
        )
    if widest(resources) < WIDEST_BYTES:
        found.append(f"loads at most {widest(resources)} bytes at once; it must load {WIDEST_BYTES}")
    return found


def widest(resources: Resources) -> int:
    """Bytes of the widest global load."""
    return max(resources.global_loads, default=0)


# Show


def title(row: Row) -> str:
    """Architecture and kernel."""
    return f"sm_{row.arch} {row.operation}.{row.kernel}"


def table(rows: list[Row]) -> str:
    """The rows in columns of equal width."""
    lines = [("kernel", "registers", "spilled B", "shared B", "matrix", "loads", "", "constants", "first used for")]
    for row in rows:
        matrix = " ".join(f"{count} {name}" for name, count in row.matrix_instructions.items())
        constants = " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.constants.items()
        )
        loads = " ".join(f"{count}x{width_bytes}B" for width_bytes, count in row.global_loads.items())
        numbers = (row.registers, row.spilled_bytes, row.shared_memory_bytes)
        verdict = "BAD" if row.violations else "ok"
        lines.append((title(row), *map(str, numbers), matrix or "-", loads, verdict, constants, row.uses[0]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
