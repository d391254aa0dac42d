"""Is each kernel watched? A wrong line in any of them makes its tests fail."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kernels.mutations import JIT, MUTATIONS, ROOT, Mutation, all_mutations, kernels_of, run_tests

FAILED_TESTS = 1
PROCESSES = 2

Runs = dict[Mutation | str, Future[subprocess.CompletedProcess[str]]]


def test_every_kernel_has_two_errors_to_be_noticed() -> None:
    sources = (ROOT / JIT).glob("[!_]*.py")
    wanted = {(path.stem, kernel) for path in sources for kernel in kernels_of(path.read_text(encoding="utf-8"))}
    assert wanted == {(file, kernel) for file, kernels in MUTATIONS.items() for kernel, pairs in kernels.items() if len(pairs) >= 2}


@pytest.mark.parametrize("mutation", all_mutations(), ids=str)
def test_every_error_fits_the_code(mutation: Mutation) -> None:
    compile(mutation.applied(), mutation.file, "exec")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The tests of each file, and of each mutation, as they run side by side."""
    with ThreadPoolExecutor(PROCESSES) as pool:

        def start(file: str, mutated: str | None) -> Future[subprocess.CompletedProcess[str]]:
            return pool.submit(run_tests, file, mutated, tmp_path_factory.mktemp(file))

        started: Runs = {file: start(file, None) for file in MUTATIONS}
        started |= {mutation: start(mutation.file, mutation.applied()) for mutation in all_mutations()}
        yield started
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("file", MUTATIONS)
def test_without_an_error_the_tests_pass(file: str, runs: Runs) -> None:
    ran = runs[file].result()
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", all_mutations(), ids=str)
def test_an_error_is_noticed(mutation: Mutation, runs: Runs) -> None:
    ran = runs[mutation].result()
    assert ran.returncode == FAILED_TESTS, f"{mutation}: pytest ended with {ran.returncode}\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}"
