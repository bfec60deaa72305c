"""Which backends exist here, and which one serves a call.

A backend is a place that offers stages, the functions behind the operations, with the same meaning and the same
positional arguments as the others: `token_stats`, `policy_terms`, `logits_grad` and `single_pass` for training,
`decode_entropy` and `sample_with_entropy` for decode time. BACKENDS has a row for each.

Without a request the fastest one that serves the tensor is taken. An explicit request never falls back.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aepo_kernels.objective import METRICS, ObjectiveNumbers


@dataclass(frozen=True)
class Backend:
    """Where stages are found, and whom they serve."""

    find: Callable[[str], Any]
    """The stage of that name."""
    missing: Callable[[], str | None] = lambda: None
    """Why it cannot run in this process at all."""
    devices: Mapping[str, str | None] | None = None
    """Types of devices, each with the environment variable that must be 1 there; None: every device."""
    stages: frozenset[str] | None = None
    """None: all of them."""
    float64: bool = True
    problem: Callable[[torch.device], str | None] = lambda device: None
    """Why it cannot run on one of its devices."""


def _module(package: str) -> Callable[[str], Any]:
    """Stages that are functions of a package, each in a module of its name."""
    return lambda name: getattr(importlib.import_module(f"aepo_kernels.{package}.{name}"), name)


def _native(name: str) -> Any:
    return getattr(torch.ops.aepo_native, name)


@functools.cache
def _extension_missing() -> str | None:
    try:
        extension = importlib.import_module("aepo_kernels._C")
    except ModuleNotFoundError:
        return "the compiled extension aepo_kernels._C is not built"
    except (ImportError, OSError) as error:  # built, but for another torch or machine
        return _unusable(f"the compiled extension aepo_kernels._C does not load: {error}")
    here, there = (Path(str(file)).resolve().parent for file in (__file__, extension.__file__))
    if here != there:  # with an editable installation of another checkout, say
        return f"the compiled extension aepo_kernels._C is not built; that of {there} belongs to another copy"
    if _built_for() != _asked_of_it():
        return _unusable(
            "the compiled extension aepo_kernels._C is of another version than aepo_kernels: build it again"
        )
    return None


TRAINING_STAGES = ("token_stats", "policy_terms", "logits_grad", "single_pass")


def _asked_of_it() -> dict[str, list[str]]:
    """What travels by position: an objective's numbers, the metrics, and the arguments of the stages, by name."""
    stages = {name: list(inspect.signature(stage("reference", name)).parameters) for name in TRAINING_STAGES}
    return {"numbers": list(ObjectiveNumbers._fields), "metrics": list(METRICS), **stages}


def _built_for() -> dict[str, list[str]] | None:
    """The same of the extension; None where it is too old to say."""
    native = torch.ops.aepo_native
    try:
        stages = {name: [x.name for x in getattr(native, name).default._schema.arguments] for name in TRAINING_STAGES}
        return {"numbers": native.objective_numbers(), "metrics": native.policy_metrics(), **stages}
    except AttributeError:
        return None


def _unusable(reason: str) -> str:
    """Somebody built it, so this is worth more than silence."""
    warnings.warn(f"{reason}. CPU tensors are served by the slow reference.", stacklevel=4)
    return reason


def _cuda_missing() -> str | None:
    if reason := _extension_missing():
        return reason
    if not torch.ops.aepo_native.cuda_targets():
        return "the compiled extension was built without CUDA code (no nvcc was found, or AEPO_CUDA=0)"
    return None


@functools.cache
def _cuda_problem(device: torch.device) -> str | None:
    """Why the CUDA code of the extension does not run on a device: an old driver, or a GPU it was not built for."""
    with torch.cuda.device(device):
        problem = torch.ops.aepo_native.cuda_problem()
    targets = torch.ops.aepo_native.cuda_targets()
    return f"the CUDA code of the extension ({targets}) does not run on {device}: {problem}" if problem else None


def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "the package triton is not installed"


BACKENDS = {
    # Plain PyTorch, any dtype up to float64: the specification.
    "reference": Backend(_module("reference")),
    # The compiled extension.
    "cpu": Backend(_native, _extension_missing, {"cpu": None}),
    # On the CPU Triton's interpreter, a debugging aid.
    "triton": Backend(_module("kernels"), _triton_missing, {"cuda": None, "cpu": "TRITON_INTERPRET"}, float64=False),
    # CUDA C++ kernels in the compiled extension.
    "cuda": Backend(
        _module("cuda"),
        _cuda_missing,
        {"cuda": None},
        stages=frozenset({"decode_entropy", "sample_with_entropy"}),
        float64=False,
        problem=_cuda_problem,
    ),
}
FASTEST_FIRST = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
"""By type of device; where none of them serves, the reference does."""


def missing(name: str) -> str | None:
    """Why a backend cannot run in this process at all, or None if it can. Loads the extension, never Triton."""
    return BACKENDS[name].missing()


def unserved(name: str, tensor: Tensor, stage: str = "token_stats") -> str | None:
    """Why a backend cannot take this tensor for this stage, or None if it can."""
    backend, device = BACKENDS[name], tensor.device
    if backend.stages is not None and stage not in backend.stages:
        return "it has no kernels for this operation; CUDA tensors are served by backend='triton'"
    if backend.devices is not None:
        served = next(iter(backend.devices)).upper()
        if device.type not in backend.devices:
            return f"it serves {served} tensors, these are on {device}"
        switch = backend.devices[device.type]
        if switch and os.environ.get(switch) != "1":
            return f"it serves {served} tensors, these are on {device} (where it runs only under {switch}=1)"
    if not backend.float64 and tensor.dtype == torch.float64:
        return "it has no float64 kernels; use backend='reference', or backend='cpu' for CPU tensors"
    return backend.missing() or backend.problem(device)


def resolve(name: str | None, tensor: Tensor, stage: str = "token_stats") -> str:
    """The name of the backend that serves this call of a stage. ValueError where an explicit request cannot be met."""
    if name is None:
        fastest_first = FASTEST_FIRST.get(tensor.device.type, ())
        return next((each for each in fastest_first if unserved(each, tensor, stage) is None), "reference")
    if name not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}; got {name!r}")
    reason = unserved(name, tensor, stage)
    if reason:
        raise ValueError(f"backend={name!r} cannot serve this call: {reason}")
    return name


def stage(backend: str, name: str) -> Any:
    """A stage of a resolved backend, by its name."""
    return BACKENDS[backend].find(name)
