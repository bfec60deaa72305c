"""Seeded inputs on the device of the benchmark, and the losses in plain PyTorch that everything is compared with."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from aepo.bench.harness import Ceiling
from aepo.bench.rates import memory_rates

GATE_TOKENS = 16
SEQUENCES = 4
"""The tokens of a loss belong to this many sequences of equal length, each with one advantage, as some peers need it;
the last token of each does not count, because nothing follows that it could predict."""

AEPO, GRPO, NLL = "AEPO loss", "GRPO loss", "mean nll"
STATS, LOGPROB = "log-prob + entropy", "log-prob"


def generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def spread(tokens: int, device: str) -> Tensor:
    """Standard deviation [tokens, 1] of each row's logits, 1 to 4: entropies of ln V - 1/2 to ln V - 8 nats.

    With equal ones all entropies would be nearly equal, and what the AEPO loss makes of them mostly rounding error.
    """
    return 1 + 3 * (0.5 + 0.618 * torch.arange(tokens, device=device)[:, None]).frac()


def gate_rows(tokens: int, device: str) -> Tensor:
    """The rows, at most GATE_TOKENS and spread over all, by which the outputs for a whole problem are checked."""
    return torch.linspace(0, tokens - 1, min(tokens, GATE_TOKENS), device=device).long()


def make_logits(tokens: int, vocab: int, dtype: torch.dtype, device: str) -> Tensor:
    """[tokens, vocab] normal logits."""
    logits = torch.randn(tokens, vocab, generator=generator(device), device=device)
    return logits.mul_(spread(tokens, device)).to(dtype)


def make_linear(tokens: int, vocab: int, hidden: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Hidden states [tokens, hidden] and weight [vocab, hidden] whose products are such logits."""
    g = generator(device)
    states = torch.randn(tokens, hidden, generator=g, device=device).mul_(spread(tokens, device))
    weight = torch.randn(vocab, hidden, generator=g, device=device).div_(math.sqrt(hidden))
    return states.to(dtype), weight.to(dtype)


def make_labels(tokens: int, vocab: int, device: str) -> Tensor:
    return torch.randint(vocab, (tokens,), generator=generator(device), device=device)


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a policy loss takes beside logits or hidden states; [T] each."""

    labels: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    """bool"""
    sequences: int


def make_policy(labels: Tensor, logprobs: Tensor) -> Policy:
    """Old log-probs beside the present ones: half of the ratios are clipped, as many on either side.

    All ratios keep 8 % away from the bounds 0.8 and 1.2 at least, where the gradient jumps: the rounding of 16-bit
    logits would else decide on which side a token is, and no gate could tell that from an error.
    """
    tokens, device = len(labels), labels.device
    if tokens < 4:
        raise ValueError(f"tokens must be >= 4 where a loss is measured; got {tokens}")
    g = generator(device.type)
    sequences = math.gcd(tokens, SEQUENCES)
    if tokens // sequences < 2:
        sequences = 1
    advantages = torch.linspace(-1, 1.5, sequences, device=device).repeat_interleave(tokens // sequences)
    mask = torch.ones(sequences, tokens // sequences, dtype=torch.bool, device=device)
    mask[:, -1] = False
    log_ratios = torch.tensor([-0.4, -0.1, 0.1, 0.4], device=device)
    log_ratio = log_ratios[torch.randint(4, (tokens,), generator=g, device=device)]
    return Policy(labels, logprobs.detach().float() - log_ratio, advantages, mask.flatten(), sequences)


def eager_stats(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy by float32 log_softmax (float64 of float64), as a trainer without kernels writes it."""
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def logsumexp_stats(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same by logsumexp - E[logits], as verl writes it: cancels on confident rows, and compiles to other code."""
    x = logits.float()
    logsumexp = torch.logsumexp(x, dim=-1)
    return x.gather(-1, labels[:, None])[:, 0] - logsumexp, logsumexp - (torch.softmax(x, dim=-1) * x).sum(-1)


EntropyStats = tuple[float, float]
"""Mean and standard deviation over the tokens that count."""


def entropy_stats(entropy: Tensor, policy: Policy) -> EntropyStats:
    counted = entropy[policy.mask].double()
    return counted.mean().item(), counted.std().item()


def aepo_loss(logprobs: Tensor, entropy: Tensor, policy: Policy, stats: EntropyStats | None = None) -> Tensor:
    """Entropy-aware advantage (0.2), clip that keeps its gradient above (0.2), dual clip (3), mean over the tokens."""
    h, count = entropy.detach(), policy.mask.sum()
    mean = (h * policy.mask).sum() / count if stats is None else stats[0]
    std = (((h - mean) ** 2 * policy.mask).sum() / (count - 1)).sqrt() if stats is None else stats[1]
    a = policy.advantages * (1 + 0.2 * (h - mean) / std)
    ratio = (logprobs - policy.old_logprobs).exp()
    upper = 1.2 * ratio / ratio.detach()  # value 1.2, gradient 1.2 d logprob
    clipped = torch.where(ratio > 1.2, upper, ratio.clamp(min=0.8))
    loss = torch.maximum(-a * ratio, -a * clipped)
    loss = torch.where(a < 0, torch.minimum(loss, -3.0 * a), loss)
    return (loss * policy.mask).sum() / count


def grpo_loss(logprobs: Tensor, policy: Policy) -> Tensor:
    """Ratio clipped at 0.2 on both sides, mean over the tokens; needs no entropy."""
    ratio = (logprobs - policy.old_logprobs).exp()
    a = policy.advantages
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    return (loss * policy.mask).sum() / policy.mask.sum()


def plain_loss(computes: str, logprobs: Tensor, entropy: Tensor | None, policy: Policy) -> Tensor:
    """AEPO, GRPO or NLL on top of anyone's log-probs."""
    if computes == AEPO:
        assert entropy is not None
        return aepo_loss(logprobs, entropy, policy)
    return grpo_loss(logprobs, policy) if computes == GRPO else -logprobs.mean()


def piece_of(tokens: int, device: str) -> int | None:
    """How many of a problem's tokens show what a call will take; None where that is not asked: a few tokens take little
    time, and on a GPU everything does."""
    return tokens // 16 if device == "cpu" and tokens >= 64 else None


def read_ceilings(logits: Tensor) -> list[Ceiling]:
    """One read of as many bytes as the logits have."""
    size = logits.numel() * logits.element_size()
    if logits.device.type == "cuda":
        copy, read = memory_rates("cuda")
        beside = Ceiling("read once, at the rate of a sum", None, size, size / read, bound=False)
        return [Ceiling("read once, at the rate of a copy", None, size, size / copy), beside]
    columns = 1024
    rows = -(-size // (4 * columns))
    # Of all reductions that PyTorch has, the matrix-vector product came out as the fastest reader: 5.6 ms for 156 MB on
    # two threads, torch.dot 6.1, sum 6.9, amax 7.8 (2-core AVX-512 Xeon, Sapphire Rapids class VM).
    buffer, vector = torch.randn(rows, columns), torch.randn(columns)
    return [Ceiling("read the logits once", lambda: buffer @ vector, size)]


def rewrite_ceiling(logits: Tensor) -> Ceiling:
    """One read and one write of as many bytes as the logits have, in place."""
    size = logits.numel() * logits.element_size()
    name = "read and rewrite them in place"
    if logits.device.type == "cuda":
        return Ceiling(f"{name}, at the rate of a copy", None, 2 * size, 2 * size / memory_rates("cuda").copy)
    bits = torch.randint(2**62, (-(-size // 8),))
    return Ceiling(name, lambda: bits.bitwise_not_(), 2 * size)
