"""AEPOAsyncTrainer: TRL's AsyncGRPOTrainer, whose worker samples while it trains, with our head and our objectives.

TRL packs the samples of a rank into one row, in which a prefix that several of them share stands once: a position may
be what several tokens are predicted from. A token of a sample is a term here, and terms are what losses and entropy
statistics are taken over, as if nothing were shared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

try:
    from trl import AsyncGRPOConfig, AsyncGRPOTrainer  # where 1.18 has them by its documentation
except ImportError:
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from aepo.integrations.trl.head import linear_head
from aepo.integrations.trl.loss import MicroLoss, Rows, StepSizes, chosen_function, function_loss, objective_loss
from aepo.integrations.trl.metrics import over_ranks
from aepo.integrations.trl.objective import ObjectiveSettings, policy_objective
from aepo.integrations.trl.shaping import shaped_advantages, statistics_over_ranks
from aepo.integrations.trl.trainer import AEPOTrainer
from aepo.integrations.trl.versions import check_async_overrides
from aepo.own_loss import OwnLoss

OTHER_ADVANTAGES = {
    "reinforce++": "its advantages are taken over a whole batch of rewards",
    "gigpo": "its advantages have a part per step",
}
"""Presets that are an estimate of the advantage, which is the worker's here."""
NOT_HERE = {
    "kl_coef": "TRL's asynchronous trainer keeps no reference model",
    "importance_cap": "the ratio is already taken against the log-probs of the server that sampled",
}


@dataclass
class AEPOAsyncConfig(ObjectiveSettings, AsyncGRPOConfig):
    """Arguments of AEPOAsyncTrainer: those of AsyncGRPOConfig, and what says which loss (docs/trl.md).

    The settings of an objective have the names that they have in AEPOConfig. ValueError, naming the setting, for one
    that would be ignored: advantages are the worker's, of a group's rewards, and there is no reference model.
    """

    _VALID_DICT_FIELDS = [*AsyncGRPOConfig._VALID_DICT_FIELDS, "objective"]  # noqa: RUF012  # as TRL declares it

    delta: float | None = field(
        default=None, metadata={"help": "Bound on the ratio of negative advantages. None: the preset's."}
    )
    beta = 0.0  # no field: there is no reference model

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset in OTHER_ADVANTAGES:
            raise ValueError(
                f"preset={self.preset!r} would be ignored: {OTHER_ADVANTAGES[self.preset]}, and "
                "here the worker makes them, of the rewards of a group (AEPOTrainer has this preset)"
            )
        for name, reason in NOT_HERE.items():
            if isinstance(self.objective, dict) and name in self.objective:
                raise ValueError(f"objective={{{name!r}: ...}} has no place in AEPOAsyncTrainer: {reason}")
        self.check_objective()


class AEPOAsyncTrainer(AsyncGRPOTrainer):
    """AsyncGRPOTrainer whose loss is that of `args.preset` (AEPOAsyncConfig; docs/trl.md).

    Takes what AsyncGRPOTrainer takes, and `loss_fn`: a loss of your own, (logprobs [R], entropy [R], LossBatch) ->
    loss, as args.loss names one. Workers, the packing of shared prefixes, weight transfer, PEFT, accelerate, callbacks
    and TRL's metrics stay as they are. TypeError: TRL's methods are not those that this was written against, or args
    is no AEPOAsyncConfig.
    """

    _tag_names = ["trl", "aepo"]  # noqa: RUF012  # as TRL declares them
    _name = "AEPO"
    _paper = AEPOTrainer._paper

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: AEPOAsyncConfig | None = None,
        *others: Any,
        loss_fn: OwnLoss | None = None,
        **named: Any,
    ) -> None:
        check_async_overrides(AsyncGRPOTrainer)
        config = AEPOAsyncConfig("AEPO") if args is None else args
        if not isinstance(config, AEPOAsyncConfig):
            raise TypeError(
                f"args must be an AEPOAsyncConfig (aepo.integrations.trl.asynchronous); got {type(config).__name__}"
            )
        self._function = chosen_function(config, loss_fn)
        self._objective = policy_objective(config)
        super().__init__(model, reward_funcs, config, *others, **named)
        # TRL's own loss still runs, for its metrics: with these bounds.
        self.epsilon_low = self._objective.eps_low
        self.epsilon_high = self._objective.eps_high

    # Statistics of an optimiser step, from all of its micro-batches

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Trainer's micro-batches of one optimiser step, each of which learns what it needs of the others."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        shared = {
            "step_tokens": sum(batch["global_n_tokens"][0] for batch in batches),
            "step_samples": sum((batch["global_n_forward_tokens"] / batch["mean_seq_len"])[0] for batch in batches),
        }
        if self._needs_statistics and len(batches) > 1:  # of one, its own forward has them
            start = time.perf_counter()
            shared["entropy_mean"], shared["entropy_std"] = self._statistics(
                torch.cat([self._entropy_of(batch) for batch in batches])
            )
            self._log("perf/entropy_pass_s", time.perf_counter() - start)
        for batch in batches:
            batch.update(shared)
        return batches, items

    @property
    def _needs_statistics(self) -> bool:
        return self._function is not None or self._objective.entropy_advantage != 0

    @torch.no_grad()
    def _entropy_of(self, batch: dict[str, Any]) -> Tensor:
        """[R] of the weights as they are before the step."""
        batch = self._prepare_inputs(batch)
        try:
            super().compute_loss(_stop_before, batch)
        except _ForwardCall as call:
            with self.compute_loss_context_manager(), linear_head():
                outputs = self.model_wrapped(**call.keywords)
            return _terms(outputs.entropy, batch)
        raise TypeError("AsyncGRPOTrainer.compute_loss does not call the model")

    def _statistics(self, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std) of entropies [R] and those of the other ranks."""
        mean, std = statistics_over_ranks(self.accelerator, entropy, torch.ones_like(entropy, dtype=torch.bool))
        self._log("policy/entropy_std", std.item())
        return mean, std

    # The loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        with _outputs_of(model) as passes, linear_head():
            super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # its metrics; its loss is not used
        (outputs,) = passes
        entropy = _terms(outputs.entropy, inputs)
        statistics: tuple[Tensor, Tensor] | None = None
        if "entropy_mean" in inputs:
            statistics = inputs["entropy_mean"], inputs["entropy_std"]
        elif self._needs_statistics:
            statistics = self._statistics(entropy.detach())
        rows = _rows(_terms(outputs.log_probs, inputs), entropy, inputs)
        found = self._loss_of(rows, self._step_sizes(inputs), statistics)
        self._replace_clip_ratios()
        for name, value in over_ranks(found).items():
            self._log(name, value)
        loss = found.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        return loss

    def _step_sizes(self, inputs: dict[str, Any]) -> StepSizes:
        """Of all micro-batches of the step, where TRL takes each one's mean, and the mean of these."""
        ranks = self.accelerator.num_processes
        return StepSizes(
            tokens=inputs["step_tokens"].clamp(min=1) / ranks,
            rows=round(inputs["step_samples"].item()) / ranks,
            max_tokens=self.args.max_completion_length,
            ranks=ranks,
        )

    def _loss_of(self, rows: Rows, sizes: StepSizes, statistics: tuple[Tensor, Tensor] | None) -> MicroLoss:
        if self._function is not None:
            assert statistics is not None
            mean, std = statistics
            given = {
                "rollout_logprobs": rows.old_logprobs,
                "old_entropy": rows.entropy.detach(),
                "entropy_stats": (mean.item(), std.item()),
            }
            return function_loss(self._function, 0.0, rows, sizes, given, self.temperature)
        if statistics is not None:
            rows = self._with_entropy_factor(rows, statistics)
        return objective_loss(self._objective, rows, sizes)

    def _with_entropy_factor(self, rows: Rows, statistics: tuple[Tensor, Tensor]) -> Rows:
        shaped, flips = shaped_advantages(
            self.accelerator, self._objective, rows.advantages, rows.entropy, rows.mask, statistics
        )
        self._log("policy/advantage_flips", flips)
        return replace(rows, advantages=shaped)

    # Metrics

    def _log(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)

    def _replace_clip_ratios(self) -> None:
        """TRL's are those of one ratio per token. Of another loss they would say what did not happen, so they go."""
        if self._function is not None or self._objective.ratio_level == "sequence":
            metrics = self._metrics["train"]
            for name in [name for name in metrics if name.startswith("clip_ratio/")]:
                del metrics[name]


class _ForwardCall(Exception):
    """No error: it carries what TRL would hand to the model."""

    def __init__(self, keywords: dict[str, Any]) -> None:
        self.keywords = keywords


def _stop_before(**keywords: Any) -> None:
    """In the place of a model: nothing of TRL's loss runs that comes after it, its metrics least of all."""
    raise _ForwardCall(keywords)


@contextmanager
def _outputs_of(model: torch.nn.Module) -> Iterator[list[Any]]:
    """What the model returns within the block, call by call."""
    found: list[Any] = []
    handle = model.register_forward_hook(lambda _model, _args, outputs: found.append(outputs))
    try:
        yield found
    finally:
        handle.remove()


def _terms(values: Tensor, inputs: dict[str, Any]) -> Tensor:
    """[R] of values at the positions [1, N] of a packed row."""
    index = inputs["token_index"]
    return values.flatten()[index[index >= 0]]


def _rows(logprobs: Tensor, entropy: Tensor, inputs: dict[str, Any]) -> Rows:
    """Terms [R], which come sample by sample, as a row per sample."""
    selected = inputs["token_index"] >= 0
    lengths = inputs["segment_id"][selected].bincount().tolist()

    def padded(values: Tensor) -> Tensor:
        return pad_sequence(list(values.split(lengths)), batch_first=True)

    return Rows(
        logprobs=padded(logprobs),
        entropy=padded(entropy),
        mask=padded(selected[selected]),
        old_logprobs=padded(inputs["old_log_probs"][selected]),
        advantages=padded(inputs["advantages"][selected]),
        ref_logprobs=None,
    )
