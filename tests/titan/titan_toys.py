"""Small batches as torchtitan's RL trainer hands them to a loss, and the loss that the papers print, in float64."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from dataclasses import dataclass, replace

import torch
from policy_oracle import Batch, policy_oracle
from torch import Tensor, nn
from torchtitan.components.loss import ChunkedLossWrapper

from aepo.integrations.titan import AEPOLoss
from aepo_kernels import PolicyObjective

VOCAB, WIDTH = 11, 6


def rl_package() -> None:
    """Make torchtitan.experiments.rl importable without its __init__, which imports vLLM for the generator alone."""
    name = "torchtitan.experiments.rl"
    if name not in sys.modules:
        found = importlib.util.find_spec("torchtitan.experiments")
        package = types.ModuleType(name)
        package.__path__ = [f"{folder}/rl" for folder in found.submodule_search_locations]
        sys.modules[name] = package


@dataclass
class Step:
    """The tokens of an optimiser step, or of a part of it: B rows of L tokens."""

    hidden: Tensor  # [B, L, D]
    head: nn.Linear
    labels: Tensor  # [B, L]
    generator_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor

    def inputs(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("generator_logprobs", "advantages", "loss_mask")}

    def rows(self, rows: slice) -> Step:
        cut = {name: getattr(self, name)[rows] for name in ("hidden", "labels")}
        cut |= {name: x[rows] for name, x in self.inputs().items()}
        return replace(self, **cut)

    def counted(self) -> Tensor:
        return self.loss_mask & self.generator_logprobs.isfinite() & (self.labels != -100)

    def tokens(self) -> int:
        return int(self.counted().sum())


def make_step(seed=0, rows=4, length=8, spread=0.5):
    """Log-ratios wide enough for every clip rule; some log-probs that vLLM could not give, one ignored label, and
    tokens of a prompt. The last row has no token that counts."""
    g = torch.Generator().manual_seed(seed)
    head = nn.Linear(WIDTH, VOCAB, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, WIDTH, generator=g))
    hidden = torch.randn(rows, length, WIDTH, generator=g)
    labels = torch.randint(VOCAB, (rows, length), generator=g)
    logprobs = head(hidden).detach().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    old = logprobs + spread * torch.randn(rows, length, generator=g)
    old[0, 2], old[1, 3] = torch.nan, -torch.inf
    mask = torch.rand(rows, length, generator=g) < 0.7
    mask[0, 2] = mask[1, 3] = mask[2, 1] = True
    mask[rows - 1] = False
    labels[2, 1] = -100
    advantages = torch.randn(rows, length, generator=g)
    return Step(hidden, head, labels, old, advantages, mask)


def exact(step, objective, *, entropy_stats=None, denominator=None):
    """(loss, gradient in hidden, gradient in the head's weight, log-probs, entropies) in float64, of the whole step."""
    hidden = step.hidden.double().requires_grad_()
    weight = step.head.weight.detach().double().requires_grad_()
    rows = (hidden @ weight.T).log_softmax(-1)
    entropy = -(rows.exp() * rows).sum(-1)
    logprobs = rows.gather(-1, step.labels.clamp(min=0)[..., None])[..., 0]
    tokens = step.labels.numel()
    batch = Batch(
        logprobs=logprobs.flatten(),
        old_logprobs=step.generator_logprobs.double().flatten(),
        advantages=step.advantages.double().flatten(),
        mask=step.counted().flatten(),
        entropy=entropy.flatten(),
        ref_logprobs=torch.zeros(tokens, dtype=torch.float64),
        rollout_logprobs=torch.zeros(tokens, dtype=torch.float64),
        cu_seqlens=torch.tensor([0, tokens]),
    )
    loss = policy_oracle(batch, objective, entropy_stats=entropy_stats, denominator=denominator)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, logprobs.detach(), entropy.detach()


def entropy_stats(step):
    entropy = exact(step, PolicyObjective())[-1][step.counted()]
    return entropy.mean(), entropy.std()


def run(loss, step, tokens, *, rows=None):
    """(loss, gradient in hidden, gradient in the head's weight, metrics) of what torchtitan would call."""
    part = step if rows is None else step.rows(rows)
    hidden = part.hidden.clone().requires_grad_()
    head = nn.Linear(WIDTH, VOCAB, bias=False)
    with torch.no_grad():
        head.weight.copy_(step.head.weight)
    chunked = isinstance(loss, ChunkedLossWrapper)
    if chunked:
        loss.set_lm_head(head)
    value, metrics = loss(hidden if chunked else head(hidden), part.labels, tokens, **part.inputs())
    value.backward()
    return value.detach(), hidden.grad, head.weight.grad, metrics


def build(chunks=None, stats=None, **config):
    """An AEPOLoss, in torchtitan's chunks if asked, with the entropy statistics that it needs."""
    inner = AEPOLoss.Config(**config)
    loss = inner.build() if chunks is None else ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=inner).build()
    if stats is not None:
        (loss if chunks is None else loss.loss_fn).set_entropy_stats(*stats)
    return loss


def together(parts):
    """The metrics of several calls, as torchtitan puts those of chunks together; those of micro-batches and ranks, too,
    where no name ends in /min."""
    assert not any(name.endswith("/min") for part in parts for name in part)
    return functools.reduce(ChunkedLossWrapper._combine_chunk_metrics, parts, {})
