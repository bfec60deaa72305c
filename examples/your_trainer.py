"""One optimiser step in every way that docs/your_trainer.md shows: `python examples/your_trainer.py`, torch alone.

Log-probs, logits or hidden states in; one batch or micro-batches; one process or two ranks under FSDP2. Nothing is
trained: the loss and the gradients of all of them are asserted to be the same. Some ten seconds on two cores, most of
which go into importing torch three times.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aepo_kernels import (
    LinearHead,
    PolicyLoss,
    PolicyObjective,
    linear_policy_loss,
    logits_loss,
    logits_policy_loss,
    logprobs_and_entropy,
    next_token_targets,
    policy_loss,
)
from aepo_kernels.advantages import group_advantages
from aepo_kernels.entropy_advantage import entropy_aware_advantages, entropy_statistics

VOCAB, SIZE, ROWS, LENGTH, RANKS = 61, 16, 12, 14, 2
OBJECTIVE = PolicyObjective.preset("aepo", importance_cap=2.0, kl_coef=0.05)


@dataclass
class Batch:
    """Trajectories of one optimiser step on one rank, or some of them."""

    input_ids: Tensor  # [B, L]
    labels: Tensor  # [B, L]: the next token
    mask: Tensor  # [B, L]: 1 where the policy wrote the label
    advantages: Tensor  # [B]
    rollout_logprobs: Tensor  # [B, L]: as the engine that sampled says
    ref_logprobs: Tensor  # [B, L]: of a frozen reference
    old_logprobs: Tensor | None = None  # [B, L]: of the policy before this batch changed it
    old_entropy: Tensor | None = None  # [B, L]: of the same pass

    def rows(self, rows: slice) -> "Batch":
        return Batch(*(None if x is None else x[rows] for x in vars(self).values()))

    def parts(self, rows: int) -> Iterator["Batch"]:
        return (self.rows(slice(first, first + rows)) for first in range(0, len(self.labels), rows))


class Model(nn.Module):
    """A "language model" that looks at one token; with an operation its head runs that in place of making logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Embedding(VOCAB, SIZE), nn.Linear(SIZE, SIZE), nn.Tanh())
        self.lm_head = LinearHead.of(nn.Linear(SIZE, VOCAB, bias=False))
        nn.init.normal_(self.lm_head.weight)  # entropies that differ

    def forward(self, input_ids: Tensor, operation: Callable | None = None):
        return self.lm_head(self.body(input_ids), operation)


def rollout() -> Batch:
    """Three questions with four answers each: three tokens of prompt, two of a tool's result, padding behind."""
    g = torch.Generator().manual_seed(1)
    input_ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=g)
    place, length = torch.arange(LENGTH), torch.randint(9, LENGTH + 1, (ROWS, 1), generator=g)
    written = (place >= 3) & (place != 6) & (place != 7) & (place < length)
    labels, mask = next_token_targets(input_ids, written)
    advantages = group_advantages(torch.randint(3, (ROWS,), generator=g).float(), torch.arange(ROWS) // 4)
    with torch.no_grad():
        sampled = logprobs_and_entropy(Model()(input_ids), labels)[0]
    rollout_logprobs, ref_logprobs = sampled + 0.5 * torch.randn(2, ROWS, LENGTH, generator=g)
    return Batch(input_ids, labels, mask, advantages, rollout_logprobs, ref_logprobs)


def with_old_policy(model: Model, batch: Batch, rows: int) -> Batch:
    """Before the first update, with the weights that sampled: log-probs, and the entropies of the same read."""
    found = []
    with torch.no_grad():
        for part in batch.parts(rows):
            logits = model(part.input_ids)
            found.append(logprobs_and_entropy(logits, part.labels))
    old_logprobs, old_entropy = map(torch.cat, zip(*found, strict=True))
    return dataclasses.replace(batch, old_logprobs=old_logprobs, old_entropy=old_entropy)


@dataclass
class Step:
    """What every micro-batch of an optimiser step must know of the whole step, all ranks together."""

    entropy_stats: tuple[Tensor, Tensor]
    denominator: Tensor


def step_of(batch: Batch) -> Step:
    group = dist.group.WORLD if dist.is_initialized() else None
    stats = entropy_statistics(batch.old_entropy, batch.mask, process_group=group)
    tokens = (batch.mask != 0).sum()
    if group is None:
        return Step(stats, tokens.clamp(min=1))
    dist.all_reduce(tokens)
    return Step(stats, tokens.clamp(min=1) / dist.get_world_size())  # DDP and FSDP average the ranks' gradients


def from_logprobs(model: Model, part: Batch, step: Step) -> PolicyLoss:
    logprobs, entropy = logprobs_and_entropy(model(part.input_ids), part.labels)  # in your trainer: what it hands over
    return policy_loss(
        logprobs,
        part.old_logprobs,
        part.advantages,
        part.mask,
        objective=OBJECTIVE,
        entropy=entropy.detach(),  # without an entropy bonus nothing needs its gradient
        ref_logprobs=part.ref_logprobs,
        rollout_logprobs=part.rollout_logprobs,
        entropy_stats=step.entropy_stats,
        denominator=step.denominator,
    )


def from_logits(model: Model, part: Batch, step: Step) -> PolicyLoss:
    return logits_policy_loss(
        model(part.input_ids),
        part.labels,
        part.old_logprobs,
        part.advantages,
        part.mask,
        objective=OBJECTIVE,
        inplace_backward=True,
        ref_logprobs=part.ref_logprobs,
        rollout_logprobs=part.rollout_logprobs,
        entropy_stats=step.entropy_stats,
        denominator=step.denominator,
    )


def from_hidden(model: Model, part: Batch, step: Step) -> PolicyLoss:
    def operation(hidden, weight, bias):
        return linear_policy_loss(
            hidden,
            weight,
            part.labels,
            part.old_logprobs,
            part.advantages,
            part.mask,
            objective=OBJECTIVE,
            bias=bias,
            ref_logprobs=part.ref_logprobs,
            rollout_logprobs=part.rollout_logprobs,
            entropy_stats=step.entropy_stats,
            denominator=step.denominator,
        )

    return model(part.input_ids, operation)


def from_logits_own(model: Model, part: Batch, step: Step) -> PolicyLoss:
    """The same loss once more, as a function of one's own that autograd differentiates."""
    mean, std = step.entropy_stats

    def aepo(logprobs, entropy):
        a = part.advantages[:, None] * (1 + 0.2 * (entropy.detach() - mean) / std)
        ratio = (logprobs - part.old_logprobs).exp()
        kept_above = 1.2 / ratio.detach() * ratio  # AEPO's clip: worth 1.2, and its gradient lives on
        loss = torch.maximum(-a * ratio, -a * torch.minimum(ratio.clamp(min=0.8), kept_above))
        loss = torch.where(a < 0, torch.minimum(loss, -3 * a), loss)
        engine = (part.old_logprobs - part.rollout_logprobs).exp().clamp(max=2)
        reference = part.ref_logprobs - logprobs
        loss = engine * loss + 0.05 * (reference.exp() - 1 - reference)
        return (loss * part.mask).sum() / step.denominator

    return logits_loss(model(part.input_ids), part.labels, part.mask, aepo, inplace_backward=True)


def without_entropy(model: Model, part: Batch, step: Step) -> PolicyLoss:
    """For a loss that is handed no entropy: AEPO's factor is in the advantages [B, L] before it, from the old policy.

    At the first update of a batch that is the same; later ones keep the factor of the first.
    """
    advantages = entropy_aware_advantages(part.advantages, part.old_entropy, step.entropy_stats)
    logprobs, _ = logprobs_and_entropy(model(part.input_ids), part.labels)  # in your trainer: what it hands over
    return policy_loss(
        logprobs,
        part.old_logprobs,
        advantages,
        part.mask,
        objective=dataclasses.replace(OBJECTIVE, entropy_advantage=0.0),
        ref_logprobs=part.ref_logprobs,
        rollout_logprobs=part.rollout_logprobs,
        denominator=step.denominator,
    )


SHAPES = (from_logprobs, from_logits, from_hidden, from_logits_own)


def optimiser_step(loss_of: Callable, model: Model, batch: Batch, rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss [], gradients) of the step on this rank, in micro-batches of so many rows."""
    step = step_of(batch)
    model.zero_grad()
    losses = []
    for part in batch.parts(rows):
        loss, _ = loss_of(model, part, step)  # and the metrics of these tokens
        loss.backward()  # not divided by the number of micro-batches: the denominator has done it
        losses.append(loss.detach())
    return torch.stack(losses).sum(), {name: parameter.grad for name, parameter in model.named_parameters()}


def prepared(model: Model, batch: Batch) -> Batch:
    """The batch with its old policy, and the model one update further: ratios that clip."""
    batch = with_old_policy(model, batch, rows=5)
    optimiser_step(from_logits, model, batch, rows=ROWS)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    return batch


def assert_same(found: tuple[Tensor, dict[str, Tensor]], truth: tuple[Tensor, dict[str, Tensor]], what: str) -> None:
    pairs = {"loss": (found[0], truth[0])} | {name: (found[1][name], truth[1][name]) for name in truth[1]}
    for name, (x, y) in pairs.items():
        scale = y.abs().max().item()
        assert scale > 1e-3, f"{what}: {name} says nothing"
        torch.testing.assert_close(
            x.to(y.dtype), y, rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{what}, {n}: {m}"
        )


def on_rank(rank: int, directory: str) -> None:
    """Every second trajectory, under FSDP2, against all of them in one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    truth_model = Model()
    truth = optimiser_step(from_logprobs, truth_model, prepared(truth_model, rollout()), ROWS)
    store = dist.FileStore(f"{directory}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    model = Model()  # its head is a LinearHead from the start: a model from elsewhere gets one before fully_shard
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = prepared(model, rollout().rows(slice(rank, None, RANKS)))
    for loss_of in SHAPES:
        loss, gradients = optimiser_step(loss_of, model, batch, rows=4)
        whole = {name: gradient.full_tensor() for name, gradient in gradients.items()}
        dist.all_reduce(loss)
        assert_same((loss / RANKS, whole), truth, f"{loss_of.__name__} on {RANKS} ranks")
    dist.destroy_process_group()


def main() -> None:
    model = Model()
    batch = with_old_policy(model, rollout(), rows=5)
    first = optimiser_step(from_logprobs, model, batch, ROWS)
    assert_same(optimiser_step(without_entropy, model, batch, rows=5), first, "without_entropy, first update")
    batch = prepared(model, batch)
    truth = optimiser_step(from_logprobs, model, batch, ROWS)
    for loss_of in SHAPES:
        for rows in (ROWS, 5):
            assert_same(
                optimiser_step(loss_of, model, batch, rows), truth, f"{loss_of.__name__}, {rows} rows at a time"
            )
    print(f"loss {truth[0].item():.6f}: the same from log-probs, logits and hidden states, whole and in micro-batches")
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(on_rank, (directory,), nprocs=RANKS)
    print(f"and on {RANKS} ranks under FSDP2")


if __name__ == "__main__":
    main()
