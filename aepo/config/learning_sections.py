"""Which loss and advantage, and how the weights change: sections of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from aepo.config.setting_types import Section, key

NO_PRESETS = {
    "ppo": "PPO's clipped loss is that of policy.preset=reinforce++, with the batch's mean in place of a value model; "
    "policy.advantage=group takes the question's",
    "drgrpo": "Dr. GRPO's loss is policy.preset=grpo policy.aggregation=constant; its advantage, without std, is a "
    "function of one line for policy.advantage: aepo_kernels.advantages.group_advantages with scale=False",
    "rloo": "RLOO's leave-one-out advantage is policy.advantage=aepo_kernels.advantages:leave_one_out_advantages",
    "reinforce": "policy.preset=reinforce++ is REINFORCE, with the batch's mean as its baseline, where train.epochs=1 "
    "train.minibatches=1 leave every ratio at 1",
    **{
        name: f"{name.upper()}'s loss is one of your own here: policy.loss (docs/own_loss.md)"
        for name in ("sapo", "dppo", "gmpo", "trpo", "dpo")
    },
}
OBJECTIVE_KEYS = (
    "clip",
    "eps_low",
    "eps_high",
    "dual_clip",
    "ratio_level",
    "entropy_advantage",
    "clamp_entropy_factor",
    "entropy_bonus",
    "kl_coef",
    "kl_estimator",
    "aggregation",
    "importance_cap",
)
"""The settings of section policy that override the preset's objective."""


@dataclass(frozen=True)
class PolicyConfig(Section):
    """Which policy loss and which advantage; the numbers of the presets are in aepo_kernels.objective.PRESETS and
    aepo.advantages.PRESETS."""

    section: ClassVar[str] = "policy"
    preset: Literal["aepo", "arpo", "grpo", "dapo", "cispo", "gppo", "gspo", "gigpo", "reinforce++"] = key(
        "aepo",
        "the algorithm: its loss and its advantage; every field below overrides one part of it",
        instead=NO_PRESETS,
    )
    loss: str | None = key(
        None, "package.module:function, a loss of your own in place of the preset's (docs/own_loss.md); null: none"
    )
    reference: bool = key(False, "policy.loss also gets the log-probs of the frozen starting weights")
    clip: Literal["ppo", "aepo", "gppo", "cispo"] | None = key(None, "gradient of clipped tokens; null: the preset's")
    eps_low: float | None = key(None, "ratios below 1 - eps_low are clipped; null: the preset's", low=0, high=1)
    eps_high: float | None = key(None, "ratios above 1 + eps_high are clipped; null: the preset's", low=0)
    dual_clip: float | None = key(
        None, "bound on the ratio where A < 0, inf: none; null: the preset's", above=1, infinite=True
    )
    ratio_level: Literal["token", "sequence"] | None = key(None, "what a ratio is taken over; null: the preset's")
    entropy_advantage: float | None = key(None, "a in A (1 + a (H - mean H) / std H); null: the preset's", low=0)
    clamp_entropy_factor: bool | None = key(None, "keep that factor >= 0; null: the preset's")
    entropy_stats: Literal["batch", "micro_batch"] = key(
        "batch", "mean and std of H: rollout batch under the old policy, or each micro-batch as in the published code"
    )
    entropy_bonus: float | None = key(None, "coefficient of H in the objective; null: the preset's", low=0)
    kl_coef: float | None = key(None, "KL penalty to the frozen starting weights; null: the preset's", low=0)
    kl_estimator: Literal["k1", "k2", "k3"] | None = key(None, "of that KL; null: the preset's")
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"] | None = key(
        None, "from token losses to one number; constant divides by paths x rollout.max_tokens; null: the preset's"
    )
    importance_cap: float | None = key(
        None,
        "cap of the weight for an engine that differs from the trainer; null: no such weight",
        above=0,
        infinite=True,
    )
    old_logprobs: Literal["auto", "engine", "recompute"] = key(
        "auto",
        "old log-probs: as sampled, or by the trainer; auto: recompute where the engine is not the trainer's model",
    )
    advantage: str | None = key(
        None, "how rewards are normalised: group, batch, gigpo, or package.module:function; null: the preset's"
    )
    drop_equal_groups: bool | None = key(None, "leave questions with equal rewards out; null: the preset's")
    overlong_buffer: int | None = key(
        None, "rewards fall by up to 1 over the last so many of rollout.max_tokens; null: the preset's", low=0
    )
    step_weight: float = key(1.0, "GiGPO: weight of the step advantage", low=0)
    step_discount: float = key(0.95, "GiGPO: discount per step of the return", above=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss is None:
            if self.reference:
                raise ValueError(
                    "policy.reference = true: expected policy.loss, which gets it (a preset has policy.kl_coef)"
                )
            return
        given = [name for name in OBJECTIVE_KEYS if getattr(self, name) is not None]
        given += ["entropy_stats"] if self.entropy_stats != "batch" else []
        if given:
            raise ValueError(
                f"policy.{given[0]} = {getattr(self, given[0])!r}: expected not to be set with policy.loss, which "
                f"would not see it{''.join(f', nor policy.{name}' for name in given[1:])}"
            )


@dataclass(frozen=True)
class OptimizerConfig(Section):
    section: ClassVar[str] = "optimizer"
    learning_rate: float = key(1e-6, "peak learning rate of AdamW", low=0)
    betas: tuple[float, float] = key((0.9, 0.95), "AdamW", low=0, below=1)
    weight_decay: float = key(0.0, "AdamW, on matrices only", low=0)
    warmup_steps: int = key(0, "optimiser steps of linear warmup", low=0)
    schedule: Literal["constant", "linear"] = key("constant", "after warmup; linear falls to 0 at the last step")
    max_grad_norm: float = key(1.0, "gradients are scaled down to this norm; inf: never", above=0, infinite=True)


@dataclass(frozen=True)
class TrainConfig(Section):
    section: ClassVar[str] = "train"
    steps: int = key(40, "rollout batches", low=0)
    questions: int = key(8, "questions per rollout batch", low=1)
    epochs: int = key(1, "passes over each rollout batch", low=1)
    minibatches: int = key(1, "optimiser steps per pass; questions are divided among them", low=1)
    tokens_per_microbatch: int = key(8192, "packed tokens per forward and backward", low=1)
    gradient_checkpointing: bool = key(
        False, "keep what comes into each layer, compute the rest again in the backward: less memory, a third more time"
    )
