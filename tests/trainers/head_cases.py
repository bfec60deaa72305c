"""Calls of TRL's head: their results and gradients by a function with its `apply`, and from whole logits in float64."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

BOTH = ("log_probs", "entropy")
CHUNK = 32768  # entries of the vocabulary in a tile of TRL's


class Case(NamedTuple):
    """A call, and the weights of the sum of its results that is differentiated."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    outputs: tuple[str, ...] = BOTH
    autocast: bool = False


def make_case(
    tokens=9, size=33, vocab=61, *, dtypes=(torch.float32, torch.float32), bias=True, seed=0, **others
) -> Case:
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(tokens, size, generator=g), torch.randn(vocab, size, generator=g) * 2 / size**0.5
    offset = torch.randn(vocab, generator=g).to(dtypes[1]) if bias else None
    targets = torch.randint(vocab, (tokens,), generator=g)
    return Case(hidden.to(dtypes[0]), weight.to(dtypes[1]), offset, targets, **others)


def of_sum(case: Case, leaves: dict[str, Tensor], logprobs: Tensor, entropy: Tensor | None) -> dict[str, Tensor]:
    """Results, and gradients of a sum of them with weights of different sizes and signs."""
    weights = torch.linspace(-1, 2, len(logprobs), dtype=torch.float64)
    total = (logprobs.double() * weights).sum()
    found = {"log_probs": logprobs.detach()}
    if entropy is not None:
        total = total + (entropy.double() * weights.flip(0) / 3).sum()
        found["entropy"] = entropy.detach()
    grads = torch.autograd.grad(total, list(leaves.values()))
    return found | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def leaves_of(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    given = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    return {n: x.to(dtype or x.dtype).clone().requires_grad_() for n, x in given.items() if x is not None}


def truth(case: Case) -> dict[str, Tensor]:
    leaves = leaves_of(case, torch.float64)
    z = (leaves["hidden"] @ leaves["weight"].T + leaves.get("bias", 0.0)) * case.logit_scale
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    logs = torch.log_softmax(z / case.temperature, -1)
    entropy = -(logs.exp() * logs).sum(-1) if "entropy" in case.outputs else None
    return of_sum(case, leaves, logs.gather(1, case.targets[:, None])[:, 0], entropy)


def by(function: Any, case: Case) -> dict[str, Tensor]:
    leaves = leaves_of(case)
    with torch.autocast("cpu", torch.bfloat16) if case.autocast else contextlib.nullcontext():
        logprobs, entropy, *others = function.apply(
            leaves["hidden"],
            leaves["weight"],
            leaves.get("bias"),
            case.targets,
            case.temperature,
            CHUNK,
            case.softcap,
            case.logit_scale,
            case.outputs,
        )
    assert others == [None, None, None]
    assert (entropy is None) == ("entropy" not in case.outputs)
    return of_sum(case, leaves, logprobs, entropy)
