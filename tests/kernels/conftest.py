"""Every kernel test runs with poisoned memory; a test that takes `backend` and `device` runs once per pair that exists:
CPU tensors on reference, cpu and (without a GPU, in its interpreter) triton; CUDA tensors on reference, triton, cuda.
A test that takes `backend` alone is about CPU tensors. A module about another stage than token_stats names it in STAGE.

Inputs are made on `device`; truth in float64 always stays on the CPU (aepo_kernels/testing.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# PyTorch's deterministic mode, which poisoned_memory needs, refuses matrix products on CUDA without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from aepo_kernels import backend as backends
from aepo_kernels.testing import poisoned_memory

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poisoned_memory():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="only tests that run a kernel on a GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--gpu", default=False):
        config.hook.pytest_deselected(items=[item for item in items if not on_gpu(item)])
        items[:] = [item for item in items if on_gpu(item)]


def on_gpu(item: pytest.Item) -> bool:
    """Whether its device, a parameter or its module's DEVICE, is a GPU and its backend not the plain PyTorch one."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    device = parameters.get("device", getattr(item.module, "DEVICE", "cpu"))
    return device == "cuda" and parameters.get("backend") != "reference"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if any(mark.args[0] == "backend" for mark in metafunc.definition.iter_markers("parametrize")):
        return  # it chooses its backends itself
    names = metafunc.fixturenames
    if "backend" not in names:
        if "device" in names:
            metafunc.parametrize("device", DEVICES)
        return
    stage = getattr(metafunc.module, "STAGE", "token_stats")
    pairs = [
        pytest.param(name, device, id=name if device == "cpu" else f"{name}-{device}")
        for device in (DEVICES if "device" in names else ("cpu",))
        for name in backends.BACKENDS
        if backends.unserved(name, torch.zeros(1, device=device), stage) is None
    ]
    if "device" in names:
        metafunc.parametrize(("backend", "device"), pairs)
    else:
        metafunc.parametrize("backend", [pytest.param(pair.values[0], id=pair.id) for pair in pairs])
