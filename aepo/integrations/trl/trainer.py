"""AEPOTrainer: TRL's GRPOTrainer with our kernels under it and any of our objectives as its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer

from aepo.integrations.trl.advantages import of_rewards, per_token, step_level, turns
from aepo.integrations.trl.config import BRANCHING_PRESETS, LOSS_TYPES, AEPOConfig, policy_objective
from aepo.integrations.trl.head import linear_head
from aepo.integrations.trl.loss import Rows, StepSizes, function_loss, objective_loss
from aepo.integrations.trl.versions import check_overrides
from aepo.own_loss import ARGUMENTS, OwnLoss
from aepo.registry import resolve_function
from aepo_kernels.entropy_advantage import entropy_aware_advantages, entropy_statistics

VISUAL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
"""What a batch of TRL's has beside tokens where there are images."""
LOGGED = {"dual_clip_fraction": "dual_clip", "ratio_mean": "ratio_mean", "ratio_max": "ratio_max", "approx_kl": "approx_kl"}
"""The kernels' metrics that TRL does not measure itself, and how they are logged, after "policy/"."""


class AEPOTrainer(GRPOTrainer):
    """GRPOTrainer whose loss, advantages and rollouts are those of `args.preset` (AEPOConfig; docs/trl.md).

    Takes what GRPOTrainer takes, and `loss_fn`: a loss of your own, (logprobs [R], entropy [R], LossBatch) -> loss, as
    args.loss names one. Datasets, reward functions, tools, environments, PEFT, accelerate, callbacks and TRL's metrics
    stay as they are. TypeError: TRL's methods are not those that this was written against, or args is no AEPOConfig.
    """

    _tag_names = ["trl", "aepo"]  # noqa: RUF012  # as TRL declares it
    _name = "AEPO"
    _paper = {  # noqa: RUF012
        "title": "Agentic Entropy-Balanced Policy Optimization",
        "id": "2510.14545",
    }

    def __init__(self, *args: Any, loss_fn: OwnLoss | None = None, **kwargs: Any) -> None:
        check_overrides()
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        if config is None:
            config = kwargs["args"] = AEPOConfig("AEPO")
        if not isinstance(config, AEPOConfig):
            raise TypeError(f"args must be an AEPOConfig (aepo.integrations.trl); got {type(config).__name__}")
        self._function = _own_loss(config, loss_fn)
        self._objective = None if self._function else policy_objective(config)
        kind = config.advantage_kind
        self._advantage = (
            resolve_function(kind, "advantage", "rewards, questions") if ":" in kind else kind
        )
        self._passes: list[tuple[Tensor, Tensor]] | None = None
        super().__init__(*args, **kwargs)
        self._tell_trl_the_objective()
