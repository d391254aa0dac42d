"""Kernel tests run the Triton code: compiled where there is a GPU, else interpreted (tests/conftest.py decides which)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from structcot_kernels.launch import INTERPRETED, use_backend


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    """Every operation of a kernel test runs Triton."""
    use_backend("triton")
    yield
    use_backend("torch")


@pytest.fixture(params=["triton", "torch"])
def backend(request) -> str:
    """A test that takes it runs on Triton, and again on PyTorch."""
    use_backend(request.param)
    return request.param


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def traffic():
    """`with traffic() as counted:` counts what interpreted kernels load and store; a compiled kernel cannot be looked into."""
    if not INTERPRETED:
        pytest.skip("needs the interpreter: a compiled kernel's loads cannot be counted")
    from tests.kernels.traffic import counted_traffic

    return counted_traffic
