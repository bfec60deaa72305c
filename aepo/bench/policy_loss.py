"""Policy loss from logits, forward and backward: time and memory of the part after the model's last layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from aepo.bench import peers
from aepo.bench.harness import BASELINE, OURS, Problem, Provider, max_error
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
    make_labels,
    make_logits,
    make_policy,
    piece_of,
    plain_loss,
    read_ceilings,
    rewrite_ceiling,
)
from aepo.bench.settings import LLAMA3, QWEN3, SMOLLM2, Settings
from aepo_kernels import PolicyObjective, logits_loss, logits_policy_loss, logprobs_and_entropy

NOTE = """\
GB/s counts two reads and one write of the logits. "in place": the gradient is written over the logits. "single pass":
there too, and in the forward, while each row is in cache; given mean and standard deviation of the entropy, as from an
earlier pass. "a function": the eager row's few lines of PyTorch, handed to logits_loss, in place. Nearly every
token counts here; in an agent's batch most do not, and aepo_kernels skips those. Peers without a loss of their own
supply log-prob (and entropy), with the same few lines of PyTorch as in the eager row on top; "float32": on a float32
copy of the logits, because the peer's log-probs of 16-bit logits have 16 bits, too coarse for the gate."""
CPU = [(512, QWEN3), (2048, SMOLLM2)]
CUDA = [(8192, QWEN3), (8192, LLAMA3)]
QUICK = (64, 32000)
OBJECTIVES = {AEPO: PolicyObjective.preset("aepo"), GRPO: PolicyObjective(clip="ppo", eps_low=0.2, eps_high=0.2)}


@dataclasses.dataclass(frozen=True)
class Inputs:
    logits: Tensor
    """[T, V], overwritten by in-place providers."""
    pristine: Tensor
    policy: Policy
    entropy_stats: EntropyStats

    def restore(self) -> None:
        with torch.no_grad():
            self.logits.copy_(self.pristine)


def make_inputs(tokens: int, vocab: int, dtype: torch.dtype, device: str) -> Inputs:
    logits = make_logits(tokens, vocab, dtype, device)
    labels = make_labels(tokens, vocab, device)
    logprobs, entropy = logprobs_and_entropy(logits, labels)
    policy = make_policy(labels, logprobs)
    return Inputs(logits.clone().requires_grad_(), logits, policy, entropy_stats(entropy, policy))


Loss = Callable[[Inputs], Tensor]


def ours(computes: str, inplace: bool = False, single_pass: bool = False) -> Loss:
    def loss(inputs: Inputs) -> Tensor:
        policy = inputs.policy
        return logits_policy_loss(
            inputs.logits,
            policy.labels,
            policy.old_logprobs,
            policy.advantages,
            policy.mask,
            objective=OBJECTIVES[computes],
            inplace_backward=inplace,
            single_pass=single_pass,
            entropy_stats=inputs.entropy_stats if single_pass and computes == AEPO else None,
        ).loss

    return loss


def a_function(inputs: Inputs) -> Tensor:
    """AEPO in a few lines of PyTorch, between the fused operations."""
    policy = inputs.policy

    def loss_fn(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return aepo_loss(logprobs, entropy, policy)

    return logits_loss(inputs.logits, policy.labels, policy.mask, loss_fn, inplace_backward=True).loss


def plain(computes: str, stats: Callable[..., tuple[Tensor, ...]], float32: bool = False) -> Loss:
    """A loss in PyTorch on top of (logits, labels) -> log-prob, and entropy where `computes` needs it."""

    def loss(inputs: Inputs) -> Tensor:
        logits, policy = inputs.logits, inputs.policy
        logprobs, *entropy = stats(logits.float() if float32 else logits, policy.labels)
        return plain_loss(computes, logprobs, entropy[0] if entropy else None, policy)

    return loss


def losses(device: str, dtype: torch.dtype) -> list[tuple[str, str, Loss]]:
    """(name, what it computes, loss) of all providers."""
    rows = [
        (f"{OURS}, in place", AEPO, ours(AEPO, inplace=True)),
        (OURS, AEPO, ours(AEPO)),
        *([(f"{OURS}, single pass", AEPO, ours(AEPO, single_pass=True))] if dtype != torch.float16 else []),
        (f"{OURS}, a function", AEPO, a_function),
        (BASELINE, AEPO, plain(AEPO, eager_stats)),
        ("torch.compile", AEPO, torch.compile(plain(AEPO, eager_stats), dynamic=False)),
    ]
    for peer in peers.available("logits", device):
        computes = AEPO if peer.computes == STATS else GRPO
        float32 = device in peer.float32_loss and dtype != torch.float32
        name = f"{peer.name}, float32" if float32 else peer.name
        rows.append((name, computes, plain(computes, peers.function(peer), float32)))
    own_losses = peers.available("logits loss", device)
    rows += [(f"{peer.name}, in place", peer.computes, of_peer(peers.function(peer))) for peer in own_losses]
    if any(computes == GRPO for _, computes, _ in rows):  # to compare with
        rows.insert(4, (f"{OURS}, in place", GRPO, ours(GRPO, inplace=True)))
    return rows


def of_peer(function: Callable[..., Tensor]) -> Loss:
    """A peer's own loss of (logits, policy)."""
    return lambda inputs: function(inputs.logits, inputs.policy)


def loss_and_grad(loss: Loss) -> Callable[[Inputs], Sequence[Tensor]]:
    def run(inputs: Inputs) -> Sequence[Tensor]:
        value = loss(inputs)
        return value.detach(), torch.autograd.grad(value, inputs.logits)[0]

    return run


def truth(inputs: Inputs, computes: str) -> Sequence[Tensor]:
    exact = dataclasses.replace(inputs, logits=inputs.pristine.double().requires_grad_())
    return loss_and_grad(plain(computes, eager_stats))(exact)


def remembered(truth: Callable[[Any, str], Sequence[Tensor]], inputs: Any) -> Callable[[str], Sequence[Tensor]]:
    """The truth by what is computed, kept until another is asked for: float64 gradients are large."""
    return functools.lru_cache(maxsize=1)(functools.partial(truth, inputs))


def loss_error(truth: Callable[[str], Sequence[Tensor]], computes: str, outputs: Sequence[Tensor]) -> float:
    """Of loss and gradients."""
    return max_error(outputs, truth(computes))


def problems(settings: Settings) -> Iterator[Problem]:
    dtype, device = settings.dtype or torch.bfloat16, settings.device
    rows = losses(device, dtype)
    for tokens, vocab in settings.shapes(CPU, CUDA, QUICK):
        inputs, gate = (make_inputs(n, vocab, dtype, device) for n in (tokens, GATE_TOKENS))
        part = piece_of(tokens, device)
        size = inputs.logits.numel() * inputs.logits.element_size()
        yield Problem(
            question="policy-loss",
            title="policy loss from logits, forward + backward",
            tokens=tokens,
            vocab=vocab,
            hidden=None,
            dtype=dtype,
            inputs=inputs,
            gate_inputs=gate,
            error=functools.partial(loss_error, remembered(truth, gate)),
            providers=[Provider(name, loss_and_grad(loss), computes) for name, computes, loss in rows],
            ceilings=[*read_ceilings(inputs.logits), rewrite_ceiling(inputs.logits)],
            work=3 * size,
            unit="GB/s",
            restore=Inputs.restore,
            piece=part and make_inputs(part, vocab, dtype, device),
            piece_share=(part or tokens) / tokens,
        )
