"""From samples to new weights: packing, the losses of the micro-batches, and AdamW."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from aepo.advantages import Sample
from aepo.config import Config, OptimizerConfig
from aepo.learning.loss import (
    check_packing,
    loss_denominator,
    microbatch_loss,
    own_microbatch_loss,
    policy_objective,
    with_old_policy,
    with_reference,
)
from aepo.learning.nonfinite import NonFiniteError, describe_tokens, first_nonfinite, is_finite, single_trajectories
from aepo.learning.pack_paths import PackedBatch, entropy_statistics, microbatches, pack
from aepo.learning.snapshot import Snapshot
from aepo.models.adapters import refuse_adapters
from aepo.own_loss import OwnLossError, own_loss, try_own_loss
from aepo_kernels import PolicyLoss

Minibatch = list[PackedBatch]  # the micro-batches of one optimiser step
EntropyStats = tuple[float, float]


class Learner:
    """Owns the optimizer of `model`, and a frozen copy of `model` as it is now if the loss has a use for one.

    ValueError: the model has adapters. OwnLossError: policy.loss does not work on made-up tokens.
    """

    def __init__(self, model: PreTrainedModel, config: Config, decode: Callable[[Sequence[int]], str]) -> None:
        refuse_adapters(model)
        check_packing(model)
        # Evaluation mode: dropout would make the ratio differ from 1 before any update.
        self.model = model.eval()
        self._dtype = torch.float64 if model.dtype == torch.float64 else torch.float32  # of log-probs
        self.own_loss = None if config.policy.loss is None else own_loss(config.policy.loss)
        if self.own_loss is not None:
            try_own_loss(self.own_loss, config, self._dtype, model.device)
        self.objective = policy_objective(config.policy)  # the preset's: not used beside a loss of the user's own
        self.optimizer = make_optimizer(model, config.optimizer)
        self.all_or_nothing = Snapshot(self.optimizer).all_or_nothing
        self._config = config
        self._decode = decode
        self._reference = None
        if config.policy.reference if self.own_loss is not None else self.objective.kl_coef != 0:
            self._reference = copy.deepcopy(model).requires_grad_(False)

    @property
    def has_reference(self) -> bool:
        return self._reference is not None

    def pack(self, samples: Sequence[Sample], questions: int) -> list[Minibatch]:
        """One minibatch per optimiser step of an epoch; whole questions stay together. An empty one is left out."""
        train = self._config.train
        parts: list[list[Sample]] = [[] for _ in range(train.minibatches)]
        for sample in samples:
            parts[sample.question * train.minibatches // questions].append(sample)
        return [
            [pack(micro, self.model.device, self._dtype) for micro in microbatches(part, train.tokens_per_microbatch)]
            for part in parts
            if part
        ]

    def add_log_probs(self, minibatches: Sequence[Minibatch]) -> list[Minibatch]:
        """With the log-probs that the configuration asks for beside those of the engine: old policy, reference."""
        temperature = self._config.rollout.temperature
        result = [list(minibatch) for minibatch in minibatches]
        if self._config.recomputes_old_logprobs:
            result = [[with_old_policy(self.model, b, temperature) for b in minibatch] for minibatch in result]
        if self._reference is not None:
            result = [[with_reference(self._reference, b, temperature) for b in minibatch] for minibatch in result]
        return result

    def entropy_stats(self, minibatches: Sequence[Minibatch]) -> EntropyStats | None:
        """Over the whole rollout batch, so that the loss does not depend on how it is cut; None: not used, or not known
        before."""
        used = self.own_loss is not None or self.objective.entropy_advantage != 0
        if not used or self._config.policy.entropy_stats == "micro_batch":
            return None
        return entropy_statistics([batch for minibatch in minibatches for batch in minibatch])

    def backward(
        self, minibatch: Minibatch, stats: EntropyStats | None, question_ids: Sequence[str]
    ) -> tuple[list[dict[str, float]], float]:
        """Gradients of a minibatch, clipped. Returns the metrics of its micro-batches and the norm before clipping.

        NonFiniteError names the tokens if a loss or a gradient is not finite; OwnLossError says what is wrong with the
        user's function.
        """
        self.optimizer.zero_grad()
        metrics = []
        for batch in minibatch:
            try:
                result = self._loss(batch, minibatch, stats)
            except OwnLossError as error:
                if is_finite(batch):
                    raise
                raise NonFiniteError(f"{error}; {self._guilty(batch, question_ids)}") from error  # not its fault
            if not result.loss.isfinite():
                raise NonFiniteError(f"the loss is {result.loss.item()}; {self._guilty(batch, question_ids)}")
            result.loss.backward()
            metrics.append(dict(zip(result.metrics, torch.stack([*result.metrics.values()]).tolist(), strict=True)))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.optimizer.max_grad_norm).item()
        if not norm < float("inf"):
            raise NonFiniteError(f"the gradient norm is {norm}; {self._blame(minibatch, stats, question_ids)}")
        return metrics, norm

    def apply(self, step: int, index: int) -> float:
        """The optimiser step with this index among those of rollout batch `step`; returns its learning rate.

        NonFiniteError: it made a weight that is not finite.
        """
        train = self._config.train
        per_batch = train.epochs * train.minibatches
        rate = learning_rate(self._config.optimizer, (step - 1) * per_batch + index, train.steps * per_batch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if (name := first_nonfinite(self.model.named_parameters())) is not None:
            raise NonFiniteError(f"{name} is not finite after an optimiser step with learning rate {rate:g}")
        return rate

    def _loss(self, batch: PackedBatch, minibatch: Minibatch, stats: EntropyStats | None) -> PolicyLoss:
        trained, paths = sum(b.trained_tokens for b in minibatch), sum(len(b.lengths) for b in minibatch)
        rollout = self._config.rollout
        if self.own_loss is not None:
            assert stats is not None, "made for every loss of the user's own"
            return own_microbatch_loss(
                self.model,
                batch,
                self.own_loss,
                temperature=rollout.temperature,
                tokens=trained,
                paths=paths,
                max_tokens=rollout.max_tokens,
                entropy_stats=stats,
            )
        return microbatch_loss(
            self.model,
            batch,
            self.objective,
            temperature=rollout.temperature,
            denominator=loss_denominator(self.objective, trained, paths, rollout.max_tokens),
            entropy_stats=stats,
        )

    def _guilty(self, batch: PackedBatch, question_ids: Sequence[str]) -> str:
        return describe_tokens(self.model, batch, self._config.rollout.temperature, question_ids, self._decode)

    def _blame(self, minibatch: Minibatch, stats: EntropyStats | None, question_ids: Sequence[str]) -> str:
        """Which trajectories have a gradient that is not finite: found by running them one by one."""
        for single in (single for batch in minibatch for single in single_trajectories(batch)):
            self.optimizer.zero_grad()
            try:
                self._loss(single, minibatch, stats).loss.backward()
            except OwnLossError:  # one that needs several trajectories
                continue
            if not all(p.grad is None or p.grad.isfinite().all() for p in self.model.parameters()):
                return self._guilty(single, question_ids)
        return "no single trajectory has such a gradient, only their sum"


def make_optimizer(model: PreTrainedModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, not on biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas)


def learning_rate(config: OptimizerConfig, index: int, total: int) -> float:
    """Of optimiser step `index` of `total`: linear warmup, then constant, or linear to 0 after the last step."""
    if index < config.warmup_steps:
        return config.learning_rate * (index + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * max(total - index, 0) / max(total - config.warmup_steps, 1)
