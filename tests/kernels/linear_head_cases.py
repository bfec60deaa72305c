"""Cases for several processes (ranks.py): a sharded (FSDP2) model whose head is a LinearHead, against one process that
sees all ranks' tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from aepo_kernels import LinearHead, PolicyObjective, linear_logprobs_and_entropy, linear_policy_loss

VOCAB, SIZE, TOKENS = 61, 8, 10
GRPO = PolicyObjective.preset("dapo")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Embedding(VOCAB, SIZE), nn.Linear(SIZE, SIZE), nn.Tanh())
        self.lm_head = LinearHead.of(nn.Linear(SIZE, VOCAB))

    def forward(self, tokens: Tensor, operation) -> object:
        return self.lm_head(self.body(tokens), operation)


def sharded(own_unit: bool, policy: MixedPrecisionPolicy | None = None) -> Model:
    model, mesh = Model(), init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    settings = {"mesh": mesh} | ({} if policy is None else {"mp_policy": policy})
    if own_unit:
        fully_shard(model.lm_head, **settings)
    fully_shard(model, **settings)
    return model


def batch(rank: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(100 + rank)
    tokens = torch.randint(VOCAB, (TOKENS + 1,), generator=g)
    old, advantages = torch.randn(2, TOKENS, generator=g)
    return {"tokens": tokens[:-1], "labels": tokens[1:], "old": old - 4, "advantages": advantages}


def stats_loss(model: Model, rank: int) -> Tensor:
    """A loss made outside of the head from what the head returns."""
    part = batch(rank)
    logprobs, entropy = model(part["tokens"], lambda h, w, b: linear_logprobs_and_entropy(h, w, part["labels"], b))
    return ((logprobs - part["old"]).exp() * part["advantages"] - 0.1 * entropy).mean()


def fused_loss(model: Model, rank: int, schedule: str) -> Tensor:
    """The whole loss inside the head's forward."""
    part = batch(rank)
    mask = torch.ones(TOKENS, dtype=torch.bool)

    def operation(hidden, weight, bias):
        return linear_policy_loss(
            hidden, weight, part["labels"], part["old"], part["advantages"], mask,
            objective=GRPO, bias=bias, schedule=schedule,
        )  # fmt: skip

    return model(part["tokens"], operation).loss


LOSSES = {
    "stats": stats_loss,
    "keep": lambda model, rank: fused_loss(model, rank, "keep"),
    "recompute": lambda model, rank: fused_loss(model, rank, "recompute"),
}


def gradients(model: Model) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return found


def check(ranks: Ranks, loss, model: Model, steps: int = 1, tolerance: float = 1e-5) -> None:
    whole = Model()
    for _ in range(steps):
        torch.stack([loss(whole, rank) for rank in range(ranks.world)]).mean().backward()
        loss(model, ranks.rank).backward()
    truth = gradients(whole)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, truth[name], rtol=tolerance, atol=tolerance * truth[name].abs().max().item())


def case_head_is_its_own_unit(ranks: Ranks) -> None:
    for loss in LOSSES.values():
        check(ranks, loss, sharded(own_unit=True))


def case_head_in_the_root_unit(ranks: Ranks) -> None:
    for loss in LOSSES.values():
        check(ranks, loss, sharded(own_unit=False))


def case_gradients_accumulate(ranks: Ranks) -> None:
    for loss in LOSSES.values():
        check(ranks, loss, sharded(own_unit=True), steps=2)


def case_mixed_precision_does_not_round_what_the_operation_captures(ranks: Ranks) -> None:
    """bfloat16 at the modules' boundaries would turn an old log-prob of -5.1235 into -5.125."""
    model = sharded(own_unit=True, policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    seen = []

    def operation(hidden, weight, bias):
        seen.append((hidden.dtype, weight.dtype, batch(ranks.rank)["old"].dtype))
        return linear_logprobs_and_entropy(hidden, weight, batch(ranks.rank)["labels"], bias)

    logprobs, entropy = model(batch(ranks.rank)["tokens"], operation)
    assert seen == [(torch.bfloat16, torch.bfloat16, torch.float32)]
    assert logprobs.dtype == entropy.dtype == torch.float32
    # 16-bit parameters and activations: a few roundings of 2**-8 each.
    check(ranks, stats_loss, model, tolerance=0.05)


def case_a_sharded_weight_is_refused(ranks: Ranks) -> None:
    model, part = sharded(own_unit=True), batch(ranks.rank)
    with pytest.raises(TypeError, match=r"weight is a DTensor.*LinearHead"):
        linear_logprobs_and_entropy(torch.zeros(TOKENS, SIZE), model.lm_head.weight, part["labels"])
