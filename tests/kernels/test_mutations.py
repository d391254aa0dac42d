"""Is each kernel watched? A wrong line in any of them makes its tests fail."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.kernels.mutations import JIT, MUTATIONS, ROOT, Mutation, all_mutations, kernels_of, outcome_of

FAILED_TESTS = 1
PROCESSES = 2

Runs = dict[Mutation | str, Future[tuple[int | None, str]]]


def test_every_kernel_has_two_errors_to_be_noticed() -> None:
    sources = (ROOT / JIT).glob("[!_]*.py")
    wanted = {(path.stem, kernel) for path in sources for kernel in kernels_of(path.read_text(encoding="utf-8"))}
    assert wanted == {(file, kernel) for file, kernels in MUTATIONS.items() for kernel, entries in kernels.items() if len(entries) >= 2}


@pytest.mark.parametrize("mutation", all_mutations(), ids=str)
def test_every_error_fits_the_code(mutation: Mutation) -> None:
    compile(mutation.applied(), mutation.file, "exec")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The tests of each file, and of each mutation, as they run side by side."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        started: Runs = {file: pool.submit(outcome_of, file, None, tmp_path_factory.mktemp(file)) for file in MUTATIONS}
        for mutation in all_mutations():
            started[mutation] = pool.submit(outcome_of, mutation.file, mutation, tmp_path_factory.mktemp(mutation.file))
        yield started
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("file", MUTATIONS)
def test_without_an_error_the_tests_pass(file: str, runs: Runs) -> None:
    status, output = runs[file].result()
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("mutation", all_mutations(), ids=str)
def test_an_error_is_noticed(mutation: Mutation, runs: Runs) -> None:
    status, output = runs[mutation].result()
    assert status == FAILED_TESTS, output
