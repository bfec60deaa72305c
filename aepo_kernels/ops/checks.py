"""Checks of arguments, shared by the operations. They read shapes and dtypes only, so torch.compile can trace them;
those that read values (`check_labels`, `check_mask`, `check_counts`, `check_cu_seqlens`) run inside the registered
operations, and only for CPU tensors, where they cost no synchronisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aepo_kernels.objective import LARGEST

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_float_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be bfloat16, float16, float32 or float64; got {x.dtype}")


def check_logits(logits: Tensor, *, inplace: str | None = None) -> None:
    """`inplace`: the argument that lets the gradient be written over them."""
    check_float_tensor("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [.., V] with V >= 1; got shape {tuple(logits.shape)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1 and logits.numel() > 0:
        raise ValueError(
            f"logits must have a contiguous last dimension; got strides {logits.stride()}. "
            "They are not copied behind your back: call .contiguous() if a copy is what you want"
        )
    if inplace and any(isinstance(x, torch.nn.Parameter) for x in (logits, logits._base)):
        raise ValueError(
            f"{inplace}=True would write the gradient over a parameter; got logits that are one, or a view"
        )
    if inplace and not torch.compiler.is_compiling() and _overlaps(logits):  # a graph writes over a copy
        raise ValueError(
            f"{inplace}=True needs rows of their own; got expanded or overlapping logits, shape "
            f"{tuple(logits.shape)}, strides {logits.stride()}"
        )


def _overlaps(x: Tensor) -> bool:
    """Whether two elements may share memory: a step in some dimension is shorter than what lies inside it."""
    reach = 1
    for step, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and step < reach:
            return x.numel() > 0
        reach += (size - 1) * step
    return False


def check_like(name: str, x: Tensor, like_name: str, shape: torch.Size, device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)} like {like_name}; got {tuple(x.shape)}")
    check_device(name, x, like_name, device)


def check_device(name: str, x: Tensor, like_name: str, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like {like_name}; got {x.device}")


def check_integer(name: str, x: Tensor) -> None:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype; got {x.dtype}")


def check_temperature(temperature: float) -> None:
    if isinstance(temperature, (bool, Tensor)) or not isinstance(temperature, (int, float, torch.SymFloat)):
        raise TypeError(f"temperature must be a float; got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite; got {temperature}")
    check_divisor("temperature", temperature)


def check_divisor(name: str, x: float) -> None:
    """Of logits: float32 holds its inverse."""
    if not 1 / LARGEST <= x <= LARGEST:
        raise ValueError(f"{name} must be in [{1 / LARGEST:g}, {LARGEST:g}]; got {x}")


def check_mask_tensor(mask: Tensor, shape: torch.Size, device: torch.device) -> None:
    check_like("mask", mask, "the tokens", shape, device)
    if mask.is_complex():
        raise TypeError(f"mask must be bool, integer or floating point with zeros and ones; got {mask.dtype}")


def check_mask(mask: Tensor) -> None:
    """A floating-point mask holds zeros and ones alone. Reads values: CPU tensors only."""
    wrong = mask[(mask != 0) & (mask != 1)]
    if len(wrong):
        raise ValueError(
            f"mask must hold 0 and 1 alone where it is floating point; got {wrong[0].item()}. "
            "A token's weight in the loss is what weights= takes"
        )


def check_counts(counts: Tensor) -> None:
    """Whole numbers >= 0. Reads values: CPU tensors only."""
    wrong = ~((counts >= 0) & (counts == counts.floor()) & counts.isfinite())
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(f"counts must be whole numbers >= 0; got {counts[at].item()} at position {at}")


def check_labels(labels: Tensor, skipped: Tensor, vocab: int) -> None:
    """Every label [..] that is not skipped [..] lies in [0, vocab). Reads values: CPU tensors only."""
    wrong = ((labels < 0) | (labels >= vocab)) & ~skipped
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise ValueError(f"label {int(labels[tuple(at)])} at position {at} is outside [0, V) with V = {vocab}")


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    """Bounds [N + 1] run from 0 to the number of tokens without going back. Reads values: CPU tensors only."""
    if len(cu_seqlens) < 1 or cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"cu_seqlens must start at 0, end at the number of tokens ({tokens}) and never decrease; "
            f"got {cu_seqlens.tolist() if len(cu_seqlens) <= 16 else f'{len(cu_seqlens)} bounds'}"
        )
