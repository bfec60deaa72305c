"""One optimiser step of a real Learner, and the same step by the papers' formulas: float64, each path alone.

The step is one off the policy: the engine's numbers differ from the trainer's, and the weights have moved since the
batch was sampled (as between the optimiser steps of a batch) and since training began.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence

import torch
from policy_oracle import Batch, policy_oracle
from torch import Tensor
from trainer_toys import random_samples, tiny_model
from transformers import PreTrainedModel

from aepo.advantages import Sample
from aepo.config import Config, load_config
from aepo.learning.learner import Learner
from aepo.parallel import OneProcess
from aepo_kernels import PolicyObjective

TEMPERATURE, PATHS, MAX_TOKENS = 0.7, 12, 30
SETTINGS = (
    f"rollout.temperature={TEMPERATURE}",
    f"rollout.max_tokens={MAX_TOKENS}",
    "train.tokens_per_microbatch=25",  # so that there are several micro-batches
    "optimizer.max_grad_norm=1e9",
)


def config_of(*settings: str) -> Config:
    return load_config(overrides=[*SETTINGS, *settings])


def moved(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy after some training: ratios reach from about 0.2 to 4."""
    draw, model = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return model


START = tiny_model()  # the frozen reference
OLD = moved(START, 1)  # sampled the batch
NEW = moved(OLD, 2)  # before this optimiser step


def alone(model: PreTrainedModel, sample: Sample) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [R] of the tokens that the model wrote, through transformers' own attention."""
    written = torch.tensor(sample.trajectory.generated[1:])
    ids = torch.tensor([sample.trajectory.token_ids])
    rows = (model(input_ids=ids, use_cache=False).logits[0, :-1][written] / TEMPERATURE).log_softmax(-1)
    return rows.gather(1, ids[0, 1:][written][:, None])[:, 0], -(rows.exp() * rows).sum(-1)


@functools.cache
def frozen(model: PreTrainedModel, sample: Sample) -> tuple[Tensor, Tensor]:
    """The same of a model that no gradient is asked of."""
    with torch.no_grad():
        return alone(model, sample)


def engine_samples() -> list[Sample]:
    """As an engine with rounding of its own would deliver them."""
    noise = torch.Generator().manual_seed(3)
    samples = []
    for sample in random_samples(PATHS):
        numbers = [x + 0.2 * torch.randn(x.shape, generator=noise) for x in frozen(OLD, sample)]
        logprobs, entropies = (_spread(x, sample.trajectory.generated) for x in numbers)
        path = dataclasses.replace(sample.trajectory, logprobs=logprobs, entropies=entropies)
        samples.append(dataclasses.replace(sample, trajectory=path))
    return samples


def _spread(values: Tensor, generated: Sequence[bool]) -> tuple[float, ...]:
    of_token = iter(values.tolist())
    return tuple(next(of_token) if written else 0.0 for written in generated)


SAMPLES = engine_samples()


def learned(config: Config) -> tuple[float, Tensor, tuple[tuple[Sample, ...], ...]]:
    """Loss and gradient of the step as the Learner makes them, and how it cut the batch."""
    model = copy.deepcopy(START)
    learner = Learner(model, config, str, OneProcess())
    _become(model, OLD)
    batch = learner.add_log_probs(learner.pack_samples(SAMPLES, [f"q{i}" for i in range(PATHS // 4)]))
    stats = learner.entropy_stats(batch)
    _become(model, NEW)
    (minibatch,) = batch.minibatches
    metrics, _ = learner.backward(minibatch, stats, batch.question_ids)
    by_origin = {(sample.question, sample.path): sample for sample in SAMPLES}
    parts = tuple(tuple(by_origin[origin] for origin in rows.origins) for rows in minibatch)
    return sum(part["loss"] for part in metrics), gradient(model), parts


def _become(model: PreTrainedModel, other: PreTrainedModel) -> None:
    model.load_state_dict(other.state_dict())


def gradient(model: PreTrainedModel) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@functools.cache
def expected(
    objective: PolicyObjective, *, recompute: bool = False, parts: tuple[tuple[Sample, ...], ...] | None = None
) -> tuple[float, Tensor]:
    """Loss and gradient by the papers. parts: each has its own statistics of the entropy; None: the whole batch, under
    the old policy."""
    model = copy.deepcopy(NEW)
    whole = batch_of(model, SAMPLES, recompute)
    tokens = len(whole.logprobs)
    denominator = {"token-mean": tokens, "constant": PATHS * MAX_TOKENS}.get(objective.aggregation, PATHS)
    if parts is None:
        old = torch.cat([frozen(OLD, s)[1] for s in SAMPLES]) if recompute else _engine("entropies", SAMPLES)
        stats = (old.mean().item(), old.std().item())
        loss = policy_oracle(whole, objective, entropy_stats=stats, denominator=denominator)
    else:
        batches = [batch_of(model, part, recompute) for part in parts]
        loss = sum(policy_oracle(batch, objective, denominator=denominator) for batch in batches)
    loss.backward()
    return loss.item(), gradient(model)


def batch_of(model: PreTrainedModel, samples: Sequence[Sample], recompute: bool) -> Batch:
    now = [alone(model, sample) for sample in samples]
    sampled = _engine("logprobs", samples)
    old = torch.cat([frozen(OLD, sample)[0] for sample in samples])
    start = torch.cat([frozen(START, sample)[0] for sample in samples])
    return Batch(
        logprobs=torch.cat([logprobs for logprobs, _ in now]),
        old_logprobs=old if recompute else sampled,
        advantages=_of_written([sample.advantages for sample in samples], samples),
        mask=torch.ones(len(sampled), dtype=torch.bool),
        entropy=torch.cat([entropy for _, entropy in now]),
        ref_logprobs=start,
        rollout_logprobs=sampled,
        cu_seqlens=torch.tensor([0, *[len(logprobs) for logprobs, _ in now]]).cumsum(0),
    )


def _engine(name: str, samples: Sequence[Sample]) -> Tensor:
    return _of_written([getattr(sample.trajectory, name) for sample in samples], samples)


def _of_written(values: Sequence[Sequence[float]], samples: Sequence[Sample]) -> Tensor:
    found = [
        value
        for one, sample in zip(values, samples, strict=True)
        for value, written in zip(one, sample.trajectory.generated, strict=True)
        if written
    ]
    return torch.tensor(found, dtype=torch.float64)
