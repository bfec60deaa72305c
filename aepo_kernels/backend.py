"""Which backends exist here, and which one serves a call.

A backend is a place that offers stages, the functions behind the operations, with the same meaning and the same
positional arguments as the others: `token_stats`, `logits_grad` and `policy_terms` for training, `decode_entropy` and
`sample_with_entropy` for decode time.

    reference   plain PyTorch, any device and dtype: the specification
    cpu         the compiled extension, for CPU tensors
    triton      Triton kernels, for CUDA tensors (for CPU tensors under TRITON_INTERPRET=1, a debugging aid)
    cuda        CUDA C++ kernels in the compiled extension, for CUDA tensors: CUDA_STAGES alone

Without a request the fastest one that serves the tensor is taken: cuda before triton. An explicit request never falls
back.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "triton", "cuda")
CUDA_STAGES = frozenset({"decode_entropy", "sample_with_entropy"})


@functools.cache
def _extension_missing() -> str | None:
    try:
        extension = importlib.import_module("aepo_kernels._C")
        here, there = (Path(str(file)).resolve().parent for file in (__file__, extension.__file__))
        if here != there:  # with an editable installation of another checkout, say
            return f"the compiled extension aepo_kernels._C is not built; that of {there} belongs to another copy"
    except ModuleNotFoundError:
        return "the compiled extension aepo_kernels._C is not built"
    except (ImportError, OSError) as error:  # built, but for another torch or machine: worth more than silence
        reason = f"the compiled extension aepo_kernels._C does not load: {error}"
        warnings.warn(f"{reason}. CPU tensors are served by the slow reference.", stacklevel=3)
        return reason
    return None


def missing(name: str) -> str | None:
    """Why a backend cannot run in this process at all, or None if it can. Loads the extension, never Triton."""
    if name in ("cpu", "cuda"):
        reason = _extension_missing()
        if reason is None and name == "cuda" and not torch.ops.aepo_native.cuda_targets():
            return "the compiled extension was built without CUDA code (no nvcc was found, or AEPO_CUDA=0)"
        return reason
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def unserved(name: str, tensor: Tensor, stage: str = "token_stats") -> str | None:
    """Why a backend cannot take this tensor for this stage, or None if it can."""
    device, dtype = tensor.device.type, tensor.dtype
    if name == "reference":
        return None
    if name == "cpu" and device != "cpu":
        return f"it serves CPU tensors, these are on {tensor.device}"
    if name == "triton":
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it serves CUDA tensors, these are on the CPU (where Triton runs only under TRITON_INTERPRET=1)"
        if device not in ("cpu", "cuda"):
            return f"it serves CUDA tensors, these are on {tensor.device}"
    if name == "cuda":
        if stage not in CUDA_STAGES:
            return "there are no CUDA C++ kernels for this operation; CUDA tensors are served by backend='triton'"
        if device != "cuda":
            return f"it serves CUDA tensors, these are on {tensor.device}"
    if name in ("triton", "cuda") and dtype == torch.float64:
        return "it has no float64 kernels; use backend='reference', or backend='cpu' for CPU tensors"
    return missing(name) or (_device_problem(tensor.device) if name == "cuda" else None)


@functools.cache
def _device_problem(device: torch.device) -> str | None:
    """Why the CUDA code of the extension does not run on a device: an old driver, or a GPU it was not built for."""
    with torch.cuda.device(device):
        problem = torch.ops.aepo_native.cuda_problem()
    targets = torch.ops.aepo_native.cuda_targets()
    return f"the CUDA code of the extension ({targets}) does not run on {device}: {problem}" if problem else None


def resolve(name: str | None, tensor: Tensor, stage: str = "token_stats") -> str:
    """The name of the backend that serves this call of a stage. ValueError where an explicit request cannot be met."""
    if name is None:
        fastest_first = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(tensor.device.type, ())
        return next((each for each in fastest_first if unserved(each, tensor, stage) is None), "reference")
    if name not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}; got {name!r}")
    reason = unserved(name, tensor, stage)
    if reason:
        raise ValueError(f"backend={name!r} cannot serve this call: {reason}")
    return name


def stage(backend: str, name: str) -> Any:
    """A stage of a resolved backend, by its name."""
    if backend == "cpu":
        return getattr(torch.ops.aepo_native, name)
    package = {"reference": "reference", "triton": "kernels", "cuda": "cuda"}[backend]
    return getattr(importlib.import_module(f"aepo_kernels.{package}.{name}"), name)
