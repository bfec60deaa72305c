"""The arguments that registered operations share, under their names: a schema cannot hold a structure, so they travel
flat, and are a structure again on the other side."""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    str | None: "str?",
    bool: "bool",
    int: "int",
    float: "float",
    float | None: "float?",
    list[bool]: "bool[]",
    list[float]: "float[]",
    torch.dtype | None: "ScalarType?",
}


def schema(arguments: type[tuple]) -> str:
    """The fields of a NamedTuple as they stand in an operation's schema."""
    return ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(arguments).items())


class PolicyCall(NamedTuple):
    """What every operation with an objective takes after its own tensors; per-token tensors are [..]."""

    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    weights: Tensor | None
    counts: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    cu_seqlens: Tensor | None
    entropy_stats: Tensor | None
    denominator: Tensor | None
    aggregation: str
    sequence_ratio: bool
    numbers: list[float]  # ObjectiveNumbers
    backend: str | None


class GradientCall(NamedTuple):
    """What the two forms of logits_grad take after the logits; per-token tensors are [..]."""

    labels: Tensor | None
    maximum: Tensor
    log_sum: Tensor
    entropy: Tensor
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    temperature: float
    ignore_index: int
    backend: str | None


class LinearGradientCall(NamedTuple):
    """What linear_grad takes after hidden states and weight; per-token tensors are [..]."""

    labels: Tensor
    bias: Tensor | None
    maximum: Tensor
    log_sum: Tensor
    entropy: Tensor
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    group: str | None
    sequence_parallel: bool
    wanted: list[bool]  # of hidden, weight, bias
    temperature: float
    softcap: float | None
    ignore_index: int
    operand_dtype: torch.dtype | None
    backend: str | None


POLICY_CALL, GRADIENT_CALL, LINEAR_GRADIENT_CALL = map(schema, (PolicyCall, GradientCall, LinearGradientCall))
