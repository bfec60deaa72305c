"""Every kernel test runs with poisoned memory, and where it takes `backend`, once per backend that this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from aepo_kernels import backend as backends
from aepo_kernels.testing import poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLE = torch.zeros(1, device=DEVICE)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poisoned_memory():
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        here = [name for name in backends.BACKENDS if backends.unserved(name, torch.zeros(1)) is None]
        metafunc.parametrize("backend", here)
