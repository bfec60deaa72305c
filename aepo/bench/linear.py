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
from aepo.bench.harness import BASELINE, OURS, Ceiling, Problem, Provider, is_ours
from aepo.bench.inputs import (
    AEPO,
    GATE_TOKENS,
    GRPO,
    STATS,
    EntropyStats,
    Policy,
    aepo_loss,
    eager_stats,
    entropy_stats,
    gate_rows,
    make_labels,
    make_linear,
    make_policy,
    piece_of,
    plain_loss,
)
from aepo.bench.policy_loss import OBJECTIVES, loss_error, remembered
from aepo.bench.rates import fastest_dtype, slow_products
from aepo.bench.settings import QWEN3, Settings
from aepo.bench.token_stats import stats_error
from aepo_kernels import linear_logprobs_and_entropy, linear_loss, linear_policy_loss
from aepo_kernels.ops.linear import multiply

NOTE = """\
TFLOP/s counts one product forward and two for the gradients, whatever a provider really multiplies. Eager and compiled
rows make the logits [T, V] in memory. "recompute" and "keep" are the schedules of linear_policy_loss: four products and
the least memory, or three, with rows of logits kept; the latter is given mean and standard deviation of the entropy,
which the AEPO loss needs, as from an earlier pass. "a function": the eager row's few lines of PyTorch, handed to
linear_loss. "float32 operands": this processor has no fast products in the
dtype of the table, so hidden states and weight are float32 for all but aepo_kernels, which widens them itself."""
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
    entropy_stats: EntropyStats

    @functools.cached_property
    def widened(self) -> Inputs:
        """The same numbers with operands in float32."""
        hidden, weight = (x.detach().float().requires_grad_() for x in (self.hidden, self.weight))
        return dataclasses.replace(self, hidden=hidden, weight=weight)


def make_inputs(tokens: int, vocab: int, hidden: int, dtype: torch.dtype, device: str) -> Inputs:
    states, weight = make_linear(tokens, vocab, hidden, dtype, device)
    labels = make_labels(tokens, vocab, device)
    logprobs, entropy = linear_logprobs_and_entropy(states, weight, labels)
    policy = make_policy(labels, logprobs)
    stats = entropy_stats(entropy, policy)
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


def a_function(schedule: Schedule) -> Loss:
    """AEPO in a few lines of PyTorch, between the fused operations."""

    def loss(inputs: Inputs) -> Tensor:
        policy, keeps = inputs.policy, schedule == "keep"

        def loss_fn(logprobs: Tensor, entropy: Tensor) -> Tensor:
            return aepo_loss(logprobs, entropy, policy, inputs.entropy_stats if keeps else None)

        weights = (inputs.hidden, inputs.weight)
        return linear_loss(*weights, policy.labels, policy.mask, loss_fn, per_token=keeps, schedule=schedule).loss

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
        *((f"{OURS}, a function, {schedule}", AEPO, a_function(schedule)) for schedule in SCHEDULES),
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
        rows[4:4] = [(f"{OURS}, {schedule}", GRPO, ours(GRPO, schedule)) for schedule in SCHEDULES]
    return rows


def forward(function: Callable[..., Sequence[Tensor]]) -> Callable[[Inputs], Sequence[Tensor]]:
    """(hidden, weight, labels) -> statistics, as a provider's."""

    def run(inputs: Inputs) -> Sequence[Tensor]:
        with torch.no_grad():
            return function(inputs.hidden, inputs.weight, inputs.policy.labels)

    return run


def with_float32_operands(provider: Provider) -> Provider:
    """Ours widens its operands itself."""
    if is_ours(provider.name):
        return provider
    run = provider.run
    return dataclasses.replace(
        provider, name=f"{provider.name}, float32 operands", run=lambda inputs: run(inputs.widened)
    )


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


def products(hidden: Tensor, weight: Tensor) -> list[Ceiling]:
    """The three products, logits = hidden weight^T and both gradients, in the dtype that is fastest here.

    On a GPU also as linear_policy_loss makes them, with float32 sums that the gradients add up in: beside the bound.
    """
    hidden, weight = hidden.detach(), weight.detach()
    if hidden.device.type == "cpu":
        dtype = fastest_dtype(hidden.dtype)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    logits = hidden @ weight.T
    flops, name = 2.0 * logits.numel() * hidden.shape[1], str(hidden.dtype).removeprefix("torch.")
    found = [
        Ceiling(f"{name} product: logits", lambda: hidden @ weight.T, flops),
        Ceiling(f"{name} product: gradient of hidden", lambda: logits @ weight, flops),
        Ceiling(f"{name} product: gradient of weight", lambda: logits.T @ hidden, flops),
    ]
    if hidden.device.type == "cuda" and hidden.dtype != torch.float32:
        found += float32_sums(hidden, weight, logits)
    return found


def float32_sums(hidden: Tensor, weight: Tensor, logits: Tensor) -> list[Ceiling]:
    """The same three of 16-bit operands on a GPU, written to float32 and, the gradients, added to it."""
    out = torch.empty_like(logits, dtype=torch.float32)
    to_hidden, to_weight = (torch.zeros_like(x, dtype=torch.float32) for x in (hidden, weight))
    flops = 2.0 * logits.numel() * hidden.shape[1]
    calls: list[tuple[str, Callable[[], None]]] = [
        ("to float32: logits", lambda: multiply(out, hidden, weight.T)),
        ("added to float32: gradient of hidden", lambda: multiply(to_hidden, logits, weight, add=True)),
        ("added to float32: gradient of weight", lambda: multiply(to_weight, logits.T, hidden, add=True)),
    ]
    return [Ceiling(name, call, flops, bound=False) for name, call in calls]


def problems(settings: Settings) -> Iterator[Problem]:
    device, dtype = settings.device, settings.dtype or torch.bfloat16
    hidden = settings.hidden or (256 if settings.quick else HIDDEN[device])
    functions: list[tuple[str, str, Callable[..., Any]]] = [
        (OURS, STATS, linear_logprobs_and_entropy),
        (BASELINE, STATS, eager_linear),
        ("torch.compile", STATS, torch.compile(eager_linear, dynamic=False)),
        *((peer.name, peer.computes, peers.function(peer)) for peer in peers.available("linear", device)),
    ]
    stats = [Provider(name, forward(function), computes) for name, computes, function in functions]
    rows = [Provider(name, loss_and_grads(loss), computes) for name, computes, loss in losses(device)]
    if device == "cpu" and slow_products(dtype):
        stats, rows = ([with_float32_operands(one) for one in providers] for providers in (stats, rows))
    for tokens, vocab in settings.shapes(CPU, CUDA, QUICK):
        inputs, gate = (make_inputs(n, vocab, hidden, dtype, device) for n in (tokens, GATE_TOKENS))
        ceilings, labels, part = products(inputs.hidden, inputs.weight), inputs.policy.labels, piece_of(tokens, device)
        some = gate_rows(tokens, device)
        with torch.no_grad():
            exact = eager_linear(inputs.hidden[some].double(), inputs.weight.double(), labels[some])
        of_stats = Problem(
            question="linear",
            title="log-prob + entropy of each token from hidden states",
            tokens=tokens,
            vocab=vocab,
            hidden=hidden,
            dtype=dtype,
            inputs=inputs,
            gate_inputs=inputs,
            error=functools.partial(stats_error, some, exact),
            providers=stats,
            ceilings=[one for one in ceilings if one.name.endswith("logits")],
            work=ceilings[0].work,
            unit="TFLOP/s",
            piece=part and make_inputs(part, vocab, hidden, dtype, device),
            piece_share=(part or tokens) / tokens,
        )
        yield of_stats
        yield dataclasses.replace(
            of_stats,
            title="policy loss from hidden states, forward + backward",
            inputs=inputs,
            gate_inputs=gate,
            error=functools.partial(loss_error, remembered(truth, gate)),
            providers=rows,
            ceilings=ceilings,
            work=3 * ceilings[0].work,
        )
