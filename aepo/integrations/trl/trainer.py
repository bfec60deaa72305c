"""AEPOTrainer: TRL's GRPOTrainer with our kernels under it, and any of our objectives, or the user's, as its loss."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer

from aepo.integrations.trl.advantages import of_rewards, per_token, step_level, turns
from aepo.integrations.trl.branching.rollout import BranchingTrainer
from aepo.integrations.trl.config import AEPOConfig
from aepo.integrations.trl.head import linear_head
from aepo.integrations.trl.loss import MicroLoss, Rows, StepSizes, chosen_function, function_loss, objective_loss
from aepo.integrations.trl.metrics import over_ranks
from aepo.integrations.trl.objective import LOSS_TYPES, policy_objective
from aepo.integrations.trl.shaping import shaped_advantages, statistics_over_ranks
from aepo.integrations.trl.versions import check_overrides
from aepo.integrations.trl.written import OnlyWritten, of_tool_masks
from aepo.own_loss import OwnLoss
from aepo.registry import resolve_function

VISUAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
"""What a batch of TRL's has for the model beside tokens, where there are images."""


class AEPOTrainer(BranchingTrainer):
    """GRPOTrainer whose loss, advantages and rollouts are those of `args.preset` (AEPOConfig; docs/trl.md).

    Takes what GRPOTrainer takes, and `loss_fn`: a loss of your own, (logprobs [R], entropy [R], LossBatch) -> loss, as
    args.loss names one. Datasets, reward functions, tools, environments, PEFT, accelerate, callbacks and TRL's metrics
    stay as they are. TypeError: TRL's methods are not those that this was written against, or args is no AEPOConfig.
    """

    _tag_names = ["trl", "aepo"]  # noqa: RUF012  # as TRL declares them
    _name = "AEPO"
    _paper = {  # noqa: RUF012
        "title": "Agentic Entropy-Balanced Policy Optimization",
        "id": "2510.14545",
        "citation": "@article{aepo, title={Agentic Entropy-Balanced Policy Optimization}, eprint={arXiv:2510.14545}}",
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: AEPOConfig | None = None,
        *others: Any,
        loss_fn: OwnLoss | None = None,
        **named: Any,
    ) -> None:
        check_overrides(GRPOTrainer)
        config = AEPOConfig("AEPO") if args is None else args
        if not isinstance(config, AEPOConfig):
            raise TypeError(f"args must be an AEPOConfig (aepo.integrations.trl); got {type(config).__name__}")
        self._function = chosen_function(config, loss_fn)
        self._objective = policy_objective(config)
        kind = config.advantage_kind
        self._advantage = resolve_function(kind, "advantage", "rewards, questions") if ":" in kind else kind
        self._passes: list[tuple[Tensor, Tensor | None]] | None = None  # of TRL's scoring, while it is kept
        self._written: Tensor | None = None  # of the batch that is scored, where completions have results of tools
        super().__init__(model, reward_funcs, config, *others, **named)
        # TRL's own loss still runs, for its metrics: with these bounds.
        self.epsilon_low = self._objective.eps_low
        self.epsilon_high = self._objective.eps_high
        self.importance_sampling_level = self._objective.ratio_level
        self.loss_type = LOSS_TYPES[self._objective.aggregation]
        if self._function is not None:
            self.loss_type = "sapo"  # of which TRL logs nothing that only a clipped ratio has
        elif self._objective.clip == "cispo":
            self.loss_type, self.epsilon_high = "cispo", 1 + self._objective.eps_high
        if config.branches(places=bool(self.tools) and self.rollout_func is None):
            self.branch_with(config.branch_settings())

    # Scoring: log-probs and entropies by our head, and those of the policy that sampled

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # The reference model of TRL's has a head without entropies.
        kept = self._passes is not None and model is not self.ref_model
        scored = model if self._written is None else OnlyWritten(model, self._written, logits_to_keep)
        with linear_head():
            logprobs, entropy, aux_loss = super()._get_per_token_logps_and_entropies(
                scored, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy or kept, **kwargs
            )
        if self._passes is not None:
            self._passes.append((logprobs, entropy))
        self._scored = logprobs, entropy, aux_loss
        return logprobs, entropy if compute_entropy else None, aux_loss

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        self._written = of_tool_masks(generated[2])
        return generated

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        needs_entropy = self._function is not None or self._objective.entropy_advantage != 0
        self._passes = [] if needs_entropy else None
        try:
            batch = super()._generate_and_score_completions(inputs)
            passes, self._passes = self._passes or [], None
            self._replace_advantages(batch)
            if needs_entropy:
                self._use_old_entropies(batch, passes)
        finally:
            self._passes = self._written = None
        return batch

    def _use_old_entropies(self, batch: dict[str, Any], passes: list[tuple[Tensor, Tensor | None]]) -> None:
        """Entropies of the policy that sampled, and their statistics over the generation batch of all ranks, which are
        known before its first update: so no cut into micro-batches changes them."""
        mask = _loss_mask(batch)
        entropy = self._old_entropies(batch, passes)
        mean, std = statistics_over_ranks(self.accelerator, entropy, mask)
        self._log("policy/entropy_std", std.item())
        if self._function is not None:
            batch |= {"old_entropy": entropy, "entropy_mean": mean, "entropy_std": std}
            return
        plain = batch["advantages"] if batch["advantages"].dim() > 1 else batch["advantages"][:, None]
        batch["advantages"], flips = shaped_advantages(
            self.accelerator, self._objective, plain, entropy, mask, (mean, std)
        )
        self._log("policy/advantage_flips", flips)

    def _old_entropies(self, batch: dict[str, Any], passes: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """[B, T], from the pass in which TRL scored the policy that sampled; where it had no need to, from one here."""
        old = batch.get("old_per_token_logps")
        for logprobs, entropy in passes:
            if logprobs is old and entropy is not None:
                return entropy
        per_device = self.args.per_device_train_batch_size
        with torch.no_grad():
            _, entropy, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat((batch["prompt_ids"], batch["completion_ids"]), dim=1),
                torch.cat((batch["prompt_mask"], batch["completion_mask"]), dim=1),
                batch["completion_ids"].size(1),
                batch_size=per_device if self.model.training else self.args.per_device_eval_batch_size,
                compute_entropy=True,
                **{name: batch[name] for name in VISUAL if name in batch},
            )
        assert entropy is not None
        return entropy

    # Advantages

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _replace_advantages(self, batch: dict[str, Any]) -> None:
        """TRL's estimate by the one that is asked for."""
        if self._advantage == "group":
            return
        weights = self.reward_weights.to(self._rewards.device)
        rewards = (self._rewards * weights).nansum(dim=1)
        rewards[self._rewards.isnan().all(dim=1)] = torch.nan
        generations = self.num_generations if self.model.training else self.num_generations_eval
        local = len(batch["advantages"])
        mine = slice(self.accelerator.process_index * local, (self.accelerator.process_index + 1) * local)
        if self._advantage == "gigpo":
            steps = self._step_advantages(batch, rewards.tolist(), generations, mine)
            batch["advantages"] = batch["advantages"][:, None] + self.args.step_weight * steps
            return
        advantages = of_rewards(self._advantage, rewards, generations)
        batch["advantages"] = advantages[mine]
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())

    def _step_advantages(self, batch: dict[str, Any], rewards: list[float], generations: int, mine: slice) -> Tensor:
        """GiGPO's [B, T], whose groups of equal anchors are looked for among all ranks' completions."""
        prompts = [ids[m != 0].tolist() for ids, m in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
        kept = batch["completion_mask"] != 0
        written = _loss_mask(batch)
        paths = [
            turns(prompt, ids[k].tolist(), w[k].tolist())
            for prompt, ids, k, w in zip(prompts, batch["completion_ids"], kept, written, strict=True)
        ]
        found = step_level(gather_object(paths), rewards, generations, self.args.step_discount)[mine]
        steps = torch.zeros(kept.shape, device=kept.device)
        for row, (path, prompt, values) in enumerate(zip(paths, prompts, found, strict=True)):
            steps[row, kept[row]] = torch.tensor(per_token(path, values, len(prompt)), device=kept.device)
        return steps

    # The loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._shares: list[Tensor] = []
        self._written = inputs.get("tool_mask")
        try:
            super()._compute_loss(model, inputs)  # its metrics; its loss is not used, and costs O(B T)
        finally:
            self._written = None
        logprobs, entropy, aux_loss = self._scored
        del self._scored
        mode = "train" if self.model.training else "eval"
        old = inputs.get("old_per_token_logps")
        advantages = inputs["advantages"] if inputs["advantages"].dim() > 1 else inputs["advantages"][:, None]
        for share in (inputs.get("importance_sampling_ratio"), *self._shares):
            advantages = advantages if share is None else advantages * share
        rows = Rows(
            logprobs=logprobs,
            entropy=entropy,
            mask=_loss_mask(inputs),
            old_logprobs=logprobs.detach() if old is None else old,
            advantages=advantages.expand_as(logprobs),
            ref_logprobs=inputs.get("ref_per_token_logps"),
        )
        accumulated = self.current_gradient_accumulation_steps if mode == "train" else 1
        found = self._loss_of(rows, self._step_sizes(inputs, accumulated, mode), inputs)
        for name, value in over_ranks(found).items():
            self._log(name, value)
        loss = found.loss
        return loss + self.router_aux_loss_coef * aux_loss / accumulated if self.aux_loss_enabled else loss

    def _step_sizes(self, inputs: dict[str, Any], accumulated: int, mode: str) -> StepSizes:
        """What TRL divides by, too: of a generation batch that several optimiser steps share, each counts as many
        tokens as they have on average."""
        ranks = self.accelerator.num_processes
        tokens = inputs["num_items_in_batch"].clamp(min=1) / ranks
        if mode == "train":
            tokens = tokens * accumulated / self.args.steps_per_generation
        rows = len(inputs["completion_ids"]) * accumulated
        return StepSizes(tokens=tokens, rows=rows, max_tokens=self.max_completion_length, ranks=ranks)

    def _loss_of(self, rows: Rows, sizes: StepSizes, inputs: dict[str, Any]) -> MicroLoss:
        if self._function is None:
            return objective_loss(self._objective, rows, sizes)
        sampled = inputs.get("sampling_per_token_logps", rows.old_logprobs)
        given = {
            "rollout_logprobs": torch.where(sampled.isnan(), rows.old_logprobs, sampled),  # vLLM may not know one
            "old_entropy": inputs["old_entropy"],
            "entropy_stats": (inputs["entropy_mean"].item(), inputs["entropy_std"].item()),
        }
        return function_loss(self._function, self.beta, rows, sizes, given, self.temperature)

    def get_high_entropy_mask(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._share(super().get_high_entropy_mask(*args, **kwargs))

    def get_off_policy_mask(self, *args: Any, **kwargs: Any) -> Tensor:  # static in TRL
        return self._share(super().get_off_policy_mask(*args, **kwargs))

    def _share(self, mask: Tensor) -> Tensor:
        """A mask by which TRL multiplies the policy term. That term is proportional to the advantage in every
        objective, so the advantage is multiplied."""
        self._shares.append(mask)
        return mask

    # Metrics

    def _log(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)


def _loss_mask(batch: dict[str, Any]) -> Tensor:
    """[B, T] not 0 where the model wrote the token."""
    return batch["completion_mask"] * batch["tool_mask"] if "tool_mask" in batch else batch["completion_mask"]
