"""One thread for all tests, and runs that are made once and read by many: no test may write into those."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# The same examples every time, however busy the machine is.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# On tiny matrices more threads only wait for one another, and sums would depend on how many there are.
# Read by torch when it is first imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU the Triton kernels are interpreted. Triton reads this when a kernel is defined, so it must stand before any import of them.
if not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"

if TYPE_CHECKING:
    from tests.tiny_run import Launcher, Outcome, Site


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU the kernels are compiled, so their tests are tests of it; elsewhere a test that needs one is skipped."""
    import torch

    for item in items:
        if torch.cuda.is_available():
            if Path(__file__).parent / "kernels" in item.path.parents:
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def plain_operations() -> None:
    """Operations run as PyTorch unless a test asks for the kernels, which are slow when interpreted."""
    from structcot_kernels.launch import use_backend

    use_backend("torch")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A tiny model and its demonstrations."""
    from tests.tiny_run import make_site

    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def finished(site: Site) -> tuple[Path, Outcome]:
    """An undisturbed run of configs/tiny.toml: its directory, and how it ended."""
    from tests.tiny_run import DONE

    run_dir = site.directory / "finished"
    outcome = site.train(run_dir)
    assert outcome.status == DONE, outcome.err
    return run_dir, outcome


@pytest.fixture(scope="session")
def finished_run(finished: tuple[Path, Outcome]) -> Path:
    """The directory of an undisturbed run of configs/tiny.toml."""
    return finished[0]


@pytest.fixture(scope="session")
def half_run(site: Site) -> Path:
    """The directory of the same run, stopped by a signal after step 5 of 8: it holds checkpoints of steps 4 and 5."""
    from structcot import train
    from tests.tiny_run import STOPPED, signalling

    run_dir = site.directory / "half"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", signalling(train.train_step, signal.SIGTERM, call=6))
        outcome = site.train(run_dir)
    assert outcome.status == STOPPED, outcome.err
    return run_dir


@pytest.fixture(scope="session")
def launcher(site: Site) -> Launcher:
    """Starts processes that have everything imported."""
    from tests.tiny_run import Launcher

    return Launcher(site)
