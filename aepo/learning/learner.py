"""From scored trees to new weights: rows, log-probs of other policies, and optimiser steps that are all or none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from aepo.advantages import Sample, advantage_settings, make_samples
from aepo.config import Config
from aepo.learning.batch import Batch, LossRows, Update, entropy_statistics
from aepo.learning.forward import check_packing, is_compiled, layers_to_recompute, with_old_policy, with_reference
from aepo.learning.loss import loss_denominator, microbatch_loss, own_microbatch_loss, policy_objective
from aepo.learning.nonfinite import NonFiniteError, describe_tokens, first_nonfinite, is_finite, single_trajectories
from aepo.learning.optimizer import learning_rate, make_optimizer
from aepo.learning.pack_paths import microbatches, pack
from aepo.learning.snapshot import Snapshot
from aepo.models.adapters import refuse_adapters
from aepo.own_loss import OwnLossError, own_loss, try_own_loss
from aepo.parallel import Parallel, state_dtype
from aepo.types import ScoredTree
from aepo_kernels import PolicyLoss

EntropyStats = tuple[float, float]


class Learner:
    """Owns the optimizer of `model`, and a frozen copy of `model` as it is now if the loss has a use for one.

    interruptible: inside of it a signal may end an update, and no weight is being changed. ValueError: the model has
    adapters, or cannot be trained on packed paths, or an advantage or a loss of the user's own is none. OwnLossError:
    policy.loss does not work on made-up tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: Config,
        decode: Callable[[Sequence[int]], str],
        parallel: Parallel,
        interruptible: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        refuse_adapters(model)
        check_packing(model)
        if config.train.gradient_checkpointing and not layers_to_recompute(model):
            raise ValueError(
                "train.gradient_checkpointing = true: expected a model whose layers transformers can compute again "
                f"(GradientCheckpointingLayer), {type(model).__name__} has none"
            )
        if config.train.gradient_checkpointing and is_compiled(model):
            raise ValueError(
                "train.gradient_checkpointing = true: expected a model that torch.compile has not been asked for, as a "
                "compiled one cannot be told to attend in the backward as in the forward"
            )
        # Evaluation mode: dropout would make the ratio differ from 1 before any update.
        self.model = parallel.shard(model.eval())
        self._dtype = state_dtype(next(model.parameters()))  # of log-probs
        self.own_loss = None if config.policy.loss is None else own_loss(config.policy.loss)
        if self.own_loss is not None:
            try_own_loss(self.own_loss, config, self._dtype, model.device)
        self.objective = policy_objective(config.policy)  # the preset's: not used beside a loss of the user's own
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self._advantages = advantage_settings(config.policy)
        self._all_or_nothing = Snapshot(parallel, self.model, self.optimizer).all_or_nothing
        self._config, self._decode = config, decode
        self._parallel, self._interruptible = parallel, interruptible
        self._reference = None
        if config.policy.reference if self.own_loss is not None else self.objective.kl_coef != 0:
            self._reference = parallel.shard(model, frozen=True)

    @property
    def has_reference(self) -> bool:
        return self._reference is not None

    def pack(self, scored: Sequence[ScoredTree]) -> Batch:
        """Advantages, and the rows of the paths that have some."""
        samples = make_samples(scored, self._advantages, self._config.rollout.max_tokens)
        return self.pack_samples(samples, [one.tree.question.id for one in scored])

    def pack_samples(self, samples: Sequence[Sample], question_ids: Sequence[str]) -> Batch:
        """One minibatch per optimiser step of an epoch; whole questions stay together. An empty one is left out."""
        train = self._config.train
        parts: list[list[Sample]] = [[] for _ in range(train.minibatches)]
        for sample in samples:
            parts[sample.question * train.minibatches // len(question_ids)].append(sample)
        minibatches = (
            tuple(
                pack(micro, self.model.device, self._dtype) for micro in microbatches(part, train.tokens_per_microbatch)
            )
            for part in parts
            if part
        )
        return Batch(tuple(question_ids), tuple(samples), tuple(minibatches))

    def add_log_probs(self, batch: Batch) -> Batch:
        """With the log-probs that the configuration asks for beside those of the engine: old policy, reference."""
        temperature = self._config.rollout.temperature

        def completed(rows: LossRows) -> LossRows:
            if self._config.recomputes_old_logprobs:
                rows = with_old_policy(self.model, rows, temperature)
            return rows if self._reference is None else with_reference(self._reference, rows, temperature)

        return replace(batch, minibatches=tuple(tuple(map(completed, part)) for part in batch.minibatches))

    def update(self, step: int, batch: Batch) -> Update:
        """The optimiser steps of rollout batch `step` (from 1), all or none. A signal before the last one means none;
        after it, it waits until it is let through elsewhere.

        NonFiniteError names the tokens if a loss or a gradient is not finite; OwnLossError says what is wrong with the
        user's function.
        """
        stats = self.entropy_stats(batch)
        order = [index for _ in range(self._config.train.epochs) for index in range(len(batch.minibatches))]
        metrics, norms, rate = [], [], None
        with self._all_or_nothing():
            for count, index in enumerate(order):
                with self._interruptible():  # no weight changes there
                    part, norm = self.backward(batch.minibatches[index], stats, batch.question_ids)
                rate = self.apply(step, count)
                metrics.append(tuple(part))
                norms.append(norm)
        return Update(tuple(metrics), tuple(norms), rate)

    def entropy_stats(self, batch: Batch) -> EntropyStats | None:
        """Over the whole rollout batch, so that the loss does not depend on how it is cut; None: not used, or not known
        before."""
        used = self.own_loss is not None or self.objective.entropy_advantage != 0
        if not used or self._config.policy.entropy_stats == "micro_batch":
            return None
        return entropy_statistics([*batch.micro_batches()])

    def backward(
        self, minibatch: Sequence[LossRows], stats: EntropyStats | None, question_ids: Sequence[str]
    ) -> tuple[list[dict[str, float]], float]:
        """Gradients of a minibatch, clipped. Returns the metrics of its micro-batches and the norm before clipping;
        errors as `update`."""
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
        norm = self._parallel.clip(self.model, self._config.optimizer.max_grad_norm)
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
        self.optimizer.zero_grad()  # their memory is the rollout's: 28 GiB for 7 B
        if (name := first_nonfinite(self.model.named_parameters())) is not None:
            raise NonFiniteError(f"{name} is not finite after an optimiser step with learning rate {rate:g}")
        return rate

    def _loss(self, batch: LossRows, minibatch: Sequence[LossRows], stats: EntropyStats | None) -> PolicyLoss:
        trained, paths = sum(len(b.rows) for b in minibatch), sum(len(b.lengths) for b in minibatch)
        rollout, recompute = self._config.rollout, self._config.train.gradient_checkpointing
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
                gradient_checkpointing=recompute,
            )
        return microbatch_loss(
            self.model,
            batch,
            self.objective,
            temperature=rollout.temperature,
            denominator=loss_denominator(self.objective, trained, paths, rollout.max_tokens),
            entropy_stats=stats,
            gradient_checkpointing=recompute,
        )

    def _guilty(self, batch: LossRows, question_ids: Sequence[str]) -> str:
        return describe_tokens(self.model, batch, self._config.rollout.temperature, question_ids, self._decode)

    def _blame(self, minibatch: Sequence[LossRows], stats: EntropyStats | None, question_ids: Sequence[str]) -> str:
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
