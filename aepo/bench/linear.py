"""The same from hidden states and the weight of the last layer: log-prob and entropy, and the loss with gradients.

The bound is the bare matrix products: one forward, two more for the gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from aepo.bench import peers
from aepo.bench.clock import CpuClock
from aepo.bench.harness import BASELINE, OURS, Ceiling, Problem, Provider
from aepo.bench.inputs import (
    AEPO,
    GATE_TOKENS,
    GRPO,
    STATS,
    Policy,
    eager_stats,
    gate_rows,
    make_labels,
    make_linear,
    make_policy,
    plain_loss,
)
from aepo.bench.policy_loss import OBJECTIVES, loss_error, remembered
from aepo.bench.settings import QWEN3, Settings
from aepo.bench.token_stats import stats_error, without_grad
from aepo_kernels import linear_logprobs_and_entropy, linear_policy_loss

NOTE = """\
TFLOP/s counts one product forward and two for the gradients, whatever a provider really multiplies. Eager and compiled
rows make the logits [T, V] in memory. "recompute" and "keep" are the schedules of linear_policy_loss: four products and
the least memory, or three, with rows of logits kept; the latter is given mean and standard deviation of the entropy,
which the AEPO loss needs, as from an earlier pass."""
CPU = [(512, QWEN3)]
CUDA = [(8192, 131072)]
QUICK = (64, 32000)
HIDDEN = {"cpu": 1024, "cuda": 4096}


@dataclasses.dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    """[T, D]"""
    weight: Tensor
    """[V, D]"""
    policy: Policy
    entropy_stats: tuple[float, float]
    """Mean and standard deviation over the tokens that count."""


def make_inputs(tokens: int, vocab: int, hidden: int, dtype: torch.dtype, device: str) -> Inputs:
    states, weight = make_linear(tokens, vocab, hidden, dtype, device)
    labels = make_labels(tokens, vocab, device)
    logprobs, entropy = linear_logprobs_and_entropy(states, weight, labels)
    policy = make_policy(labels, logprobs)
    counted = entropy[policy.mask]
    stats = (counted.mean().item(), counted.std().item())
    return Inputs(states.requires_grad_(), weight.requires_grad_(), policy, stats)


def eager_linear(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return eager_stats(hidden @ weight.T, labels)


Loss = Callable[[Inputs], Tensor]
Schedule = Literal["keep", "recompute"]
SCHEDULES: tuple[Schedule, ...] = ("keep", "recompute")


def ours(computes: str, schedule: Schedule) -> Loss:
    def loss(inputs: Inputs) -> Tensor:
        policy = inputs.policy
        return linear_policy_loss(
            inputs.hidden,
            inputs.weight,
            policy.labels,
            policy.old_logprobs,
            policy.advantages,
            policy.mask,
            objective=OBJECTIVES[computes],
            entropy_stats=inputs.entropy_stats if schedule == "keep" and computes == AEPO else None,
            schedule=schedule,
        ).loss

    return loss


def plain(computes: str, stats: Callable[..., tuple[Tensor, ...]]) -> Loss:
    """A loss in PyTorch on top of (hidden, weight, labels) -> log-prob, and entropy where `computes` needs it."""

    def loss(inputs: Inputs) -> Tensor:
        logprobs, *entropy = stats(inputs.hidden, inputs.weight, inputs.policy.labels)
        return plain_loss(computes, logprobs, entropy[0] if entropy else None, inputs.policy)

    return loss


def losses(device: str) -> list[tuple[str, str, Loss]]:
    """(name, what it computes, loss) of all providers."""
    rows = [
        *((f"{OURS}, {schedule}", AEPO, ours(AEPO, schedule)) for schedule in SCHEDULES),
        (BASELINE, AEPO, plain(AEPO, eager_linear)),
        ("torch.compile", AEPO, plain(AEPO, torch.compile(eager_linear, dynamic=False))),
    ]
    for peer in peers.available("linear", device):
        computes = AEPO if peer.computes == STATS else GRPO
        rows.append((peer.name, computes, plain(computes, peers.function(peer))))
    for peer in peers.available("linear loss", device):
        loss = peers.function(peer)
        rows.append((peer.name, peer.computes, lambda x, loss=loss: loss(x.hidden, x.weight, x.policy)))  # type: ignore[misc]
    if any(computes == GRPO for _, computes, _ in rows):  # to compare with
        rows[2:2] = [(f"{OURS}, {schedule}", GRPO, ours(GRPO, schedule)) for schedule in SCHEDULES]
    return rows


def loss_and_grads(loss: Loss) -> Callable[[Inputs], Sequence[Tensor]]:
    def run(inputs: Inputs) -> Sequence[Tensor]:
        value = loss(inputs)
        return value.detach(), *torch.autograd.grad(value, (inputs.hidden, inputs.weight))

    return run


def truth(inputs: Inputs, computes: str) -> Sequence[Tensor]:
    """In float64; the products too."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (inputs.hidden, inputs.weight))
    exact = dataclasses.replace(inputs, hidden=hidden, weight=weight)
    return loss_and_grads(plain(computes, eager_linear))(exact)


def fastest_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """That of the inputs or float32, which a CPU without matrix units for 16 bits can multiply faster.

    48 against 27 GFLOP/s for [512, 1024] x [4096, 1024] on one thread of a 2-core AVX-512 Xeon (Sapphire Rapids class)
    VM that had other load.
    """
    if hidden.device.type != "cpu" or hidden.dtype == torch.float32:
        return hidden.dtype
    clock, part = CpuClock(), weight[:4096]

    def seconds(dtype: torch.dtype) -> float:
        a, b = hidden.to(dtype), part.to(dtype)
        return min(clock.seconds(lambda: a @ b.T, lambda: None, 1) for _ in range(3))

    return min((hidden.dtype, torch.float32), key=seconds)


def products(inputs: Inputs) -> list[Ceiling]:
    """The three products, logits = hidden weight^T and both gradients, in the dtype that is fastest here."""
    dtype = fastest_dtype(inputs.hidden.detach(), inputs.weight.detach())
    hidden, weight = inputs.hidden.detach().to(dtype), inputs.weight.detach().to(dtype)
    logits = hidden @ weight.T
    flops, name = 2.0 * logits.numel() * hidden.shape[1], str(dtype).removeprefix("torch.")
    return [
        Ceiling(f"{name} product: logits", lambda: hidden @ weight.T, flops),
        Ceiling(f"{name} product: gradient of hidden", lambda: logits @ weight, flops),
        Ceiling(f"{name} product: gradient of weight", lambda: logits.T @ hidden, flops),
    ]


def problems(settings: Settings) -> Iterator[Problem]:
    device, dtype = settings.device, settings.dtype or torch.bfloat16
    hidden = settings.hidden or (256 if settings.quick else HIDDEN[device])
    functions: list[tuple[str, str, Callable[..., Any]]] = [
        (OURS, STATS, linear_logprobs_and_entropy),
        (BASELINE, STATS, eager_linear),
        ("torch.compile", STATS, torch.compile(eager_linear, dynamic=False)),
        *((peer.name, peer.computes, peers.function(peer)) for peer in peers.available("linear", device)),
    ]
    stats = [Provider(name, without_grad(function), computes) for name, computes, function in functions]
    rows = [Provider(name, loss_and_grads(loss), computes) for name, computes, loss in losses(device)]
    for tokens, vocab in settings.shapes(CPU, CUDA, QUICK):
        inputs, gate = (make_inputs(n, vocab, hidden, dtype, device) for n in (tokens, GATE_TOKENS))
        ceilings, labels = products(inputs), inputs.policy.labels
        some = gate_rows(tokens, device)
        with torch.no_grad():
            exact = eager_linear(inputs.hidden[some].double(), inputs.weight.double(), labels[some])
        forward = Problem(
            question="linear",
            title="log-prob + entropy of each token from hidden states",
            tokens=tokens,
            vocab=vocab,
            hidden=hidden,
            dtype=dtype,
            inputs=(inputs.hidden, inputs.weight, labels),
            gate_inputs=(inputs.hidden, inputs.weight, labels),
            error=functools.partial(stats_error, some, exact),
            providers=stats,
            ceilings=ceilings[:1],
            work=ceilings[0].work,
            unit="TFLOP/s",
        )
        yield forward
        yield dataclasses.replace(
            forward,
            title="policy loss from hidden states, forward + backward",
            inputs=inputs,
            gate_inputs=gate,
            error=functools.partial(loss_error, remembered(truth, gate)),
            providers=rows,
            ceilings=ceilings,
            work=sum(ceiling.work for ceiling in ceilings),
        )
