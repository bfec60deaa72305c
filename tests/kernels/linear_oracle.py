"""Seeded hidden states and lm_heads, and what PyTorch makes of them with whole logits and autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from aepo_kernels import PolicyLoss, PolicyObjective, linear_policy_loss, logits_policy_loss
from aepo_kernels.ops import linear


class Problem(NamedTuple):
    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    labels: Tensor  # [T]
    temperature: float
    softcap: float | None

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Problem:
        """Fresh leaves that require a gradient."""
        bias = None if self.bias is None else self.bias.detach().to(device, dtype).requires_grad_()
        hidden, weight = (x.detach().to(device, dtype).requires_grad_() for x in (self.hidden, self.weight))
        return self._replace(hidden=hidden, weight=weight, bias=bias, labels=self.labels.to(device))

    def rounded(self, dtype: torch.dtype | None) -> Problem:
        """With hidden states and weight as numbers of this dtype, in theirs."""
        hidden, weight = (x.to(dtype).to(x.dtype) for x in (self.hidden, self.weight))
        return self._replace(hidden=hidden, weight=weight)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(x for x in (self.hidden, self.weight, self.bias) if x is not None)

    def logits(self) -> Tensor:
        z = torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def make_problem(
    tokens: int,
    vocab: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    seed: int = 0,
) -> Problem:
    """Logits spread over several nats, so that no distribution is flat."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    labels = torch.randint(vocab, (tokens,), generator=g)
    return Problem(
        2 * draw(tokens, size), draw(vocab, size), draw(vocab) if bias else None, labels, temperature, softcap
    )


def policy_batch(problem: Problem, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(old_logprobs, advantages, mask) [T] with ratios around 1 and beyond the clip bounds."""
    g = torch.Generator().manual_seed(seed)
    tokens = len(problem.labels)
    with torch.no_grad():
        log_p = (problem.to("cpu", torch.float64).logits() / problem.temperature).log_softmax(-1)
    noise = torch.randn(3, tokens, generator=g, dtype=torch.float64)
    old = log_p.gather(1, problem.labels[:, None])[:, 0] + 0.2 * noise[0]
    return old.float(), noise[1].float(), noise[2] > -0.5


def losses(
    problem: Problem, objective: PolicyObjective, backend: str, device: str, **settings: object
) -> tuple[tuple[PolicyLoss, tuple[Tensor, ...]], tuple[PolicyLoss, tuple[Tensor, ...]]]:
    """Loss, metrics and gradients of 0.3 * loss: ours from hidden states, and float64 truth from whole logits."""
    batch = policy_batch(problem)
    common = {name: value for name, value in settings.items() if name != "schedule"}
    ours = problem.to(device)
    out = linear_policy_loss(
        ours.hidden,
        ours.weight,
        ours.labels,
        *(x.to(device) for x in batch),
        objective=objective,
        bias=ours.bias,
        temperature=ours.temperature,
        softcap=ours.softcap,
        backend=backend,
        **{name: x.to(device) if isinstance(x, Tensor) else x for name, x in settings.items()},
    )
    exact = problem.to("cpu", torch.float64)
    truth = logits_policy_loss(
        exact.logits(),
        exact.labels,
        *batch,
        objective=objective,
        temperature=exact.temperature,
        backend="reference",
        **common,
    )
    return (
        (out, torch.autograd.grad(0.3 * out.loss, ours.leaves)),
        (truth, torch.autograd.grad(0.3 * truth.loss, exact.leaves)),
    )


@contextmanager
def operands_of_a_gpu() -> Iterator[None]:
    """On a CPU, products of operands as narrow as on a GPU, the gradient of the logits included, and float32 sums."""

    def multiply(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
        product = a.to(out.dtype) @ b.to(out.dtype)
        out.copy_(out + product if add else product)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "multiply", multiply)
        patch.setattr(linear.Head, "product_dtype", property(lambda head: head.rounded_dtype))
        yield
