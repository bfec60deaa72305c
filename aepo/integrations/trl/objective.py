"""Which objective a configuration of TRL's means: a preset, what overrides parts of it, or a function of the user's.

TRL's defaults are those of one method. Here None means "as the preset has it", so whatever a script sets by TRL's names
is honoured, and what no preset would look at is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aepo_kernels.objective import PRESETS, PolicyObjective

AGGREGATIONS = {
    "dapo": "token-mean",
    "grpo": "seq-mean-token-mean",
    "luspo": "seq-mean-token-sum",
    "dr_grpo": "constant",
}
"""TRL's loss types that are one clipped ratio, added up differently."""
LOSS_TYPES = {aggregation: loss_type for loss_type, aggregation in AGGREGATIONS.items()}
OTHER_LOSS_TYPES = {
    "bnpo": "it divides by the tokens of a micro-batch, so gradients depend on how a batch is cut: loss_type='dapo' "
    "divides by those of the whole",
    "sapo": "it has a loss of its own: loss='examples.own_losses:sapo', from a checkout, is how it is written",
    "vespo": "it has a loss of its own, a function for loss= (docs/own_loss.md)",
}
TRL_NAMES = {
    "eps_low": "epsilon",
    "eps_high": "epsilon_high (or epsilon)",
    "dual_clip": "delta",
    "ratio_level": "importance_sampling_level",
    "kl_coef": "beta",
    "aggregation": "loss_type",
}
"""Of fields of PolicyObjective."""
OBJECTIVE_NAMES = ("loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "objective")


@dataclass
class ObjectiveSettings:
    """Fields of a configuration of TRL's, which has `epsilon_high`, `delta` and `beta` beside them."""

    preset: str = field(
        default="aepo",
        metadata={"help": f"The published method, one of {', '.join(PRESETS)}; every other setting overrides a part."},
    )
    objective: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fields of PolicyObjective that TRL has no name for: clip, dual_clip=None, entropy_advantage, "
            "clamp_entropy_factor, entropy_bonus, kl_estimator; as a dict, or JSON on the command line."
        },
    )
    loss: str | None = field(
        default=None,
        metadata={
            "help": "package.module:function, a loss of your own in place of the preset's (docs/own_loss.md). It gets "
            "log-probs and entropies of the tokens, and a LossBatch."
        },
    )

    # TRL's, where None is the preset's
    loss_type: str | None = field(
        default=None,
        metadata={
            "help": "How the losses of the tokens add up: dapo (mean over tokens), grpo (mean over completions of "
            "their means), luspo (of their sums), dr_grpo (by max_completion_length). None: the preset's."
        },
    )
    epsilon: float | None = field(default=None, metadata={"help": "Lower clip bound 1 - epsilon. None: the preset's."})
    importance_sampling_level: str | None = field(
        default=None, metadata={"help": "One ratio per token or per sequence. None: the preset's."}
    )

    def check_objective(self) -> None:
        """ValueError naming a setting that does not fit, or that loss= would not see."""
        self.expect("a name", lambda x: isinstance(x, str), "preset")
        self.expect(
            "a name or None", lambda x: x is None or isinstance(x, str), "loss_type", "importance_sampling_level"
        )
        self.expect("package.module:function or None", _a_function_or_none, "loss")
        self.expect("a number or None", lambda x: x is None or is_number(x), "epsilon", "epsilon_high", "delta")
        self.expect(
            "a dict of PolicyObjective's fields, or None",
            lambda x: x is None or (isinstance(x, dict) and all(isinstance(key, str) for key in x)),
            "objective",
        )
        if self.preset not in PRESETS:
            try:
                PolicyObjective.preset(self.preset)  # type: ignore[arg-type]
            except ValueError as error:  # which says what is near
                raise ValueError(str(error).replace("objective", "preset", 1)) from None
        if self.loss is None:
            policy_objective(self)
        else:
            self.refuse_objective()

    def refuse_objective(self) -> None:
        """ValueError for a setting of an objective, beside a loss of the user's own."""
        for name in OBJECTIVE_NAMES:
            if getattr(self, name) is not None:
                self.refuse(name, "the loss is a function of your own, which would not see it; put the number into it")

    def expect(self, what: str, fits: Callable[[Any], bool], *names: str) -> None:
        """ValueError naming the first setting that is something else."""
        for name in names:
            value = getattr(self, name)
            if not fits(value):
                raise ValueError(f"{name} must be {what}; got {value!r}")

    def refuse(self, name: str, instead: str) -> None:
        raise ValueError(f"{name}={getattr(self, name)!r} would be ignored: {instead}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _a_function_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and all(value.partition(":")))


def policy_objective(config: Any) -> PolicyObjective:
    """The preset's objective with what the settings override. ValueError naming a setting that does not fit."""
    own = config.objective or {}
    for name, instead in {
        "kl_coef": "write beta=, for which TRL also keeps the reference model",
        "importance_cap": "TRL's vllm_importance_sampling_* settings are that correction",
    }.items():
        if name in own:
            raise ValueError(f"objective={{{name!r}: ...}} has another name in TRL: {instead}")
    clip = own.get("clip", PRESETS[config.preset].get("clip", "ppo"))
    named = _overrides_by_trl_names(config, clip)
    for name in named.keys() & own.keys():
        raise ValueError(
            f"objective={{{name!r}: {own[name]!r}}} and TRL's setting of the same meaning are both given: leave one out"
        )
    if "kl_estimator" in own and config.beta == 0:
        raise ValueError(
            f"objective={{'kl_estimator': {own['kl_estimator']!r}}} would be ignored: beta=0 has no KL term to estimate"
        )
    named["kl_coef"] = config.beta
    try:
        objective = PolicyObjective.preset(config.preset, **own, **named)
    except (TypeError, ValueError) as error:
        theirs = next((TRL_NAMES[name] for name in named if str(error).startswith(f"{name} ")), None)
        raise type(error)(f"{theirs}: {error}" if theirs else str(error)) from error
    if config.delta is not None and config.delta <= 1 + objective.eps_high:
        raise ValueError(f"delta must be above 1 + epsilon_high, {1 + objective.eps_high}; got {config.delta}")
    return objective


def _overrides_by_trl_names(config: Any, clip: str) -> dict[str, Any]:
    """Fields of PolicyObjective that TRL has names for, where they are set."""
    named: dict[str, Any] = {}
    cispo = clip == "cispo"
    if config.loss_type is not None:
        named["aggregation"] = _aggregation(config.loss_type, config.preset, cispo)
    if config.epsilon is not None:
        if cispo:
            raise ValueError(
                f"epsilon={config.epsilon} would be ignored: TRL's CISPO has no lower bound; "
                "objective={'eps_low': ...} sets one"
            )
        named["eps_low"] = config.epsilon
        named["eps_high"] = config.epsilon  # as TRL, where epsilon_high is not given
    if config.epsilon_high is not None:
        # TRL's CISPO bounds the ratio by epsilon_high itself, everything else by 1 + epsilon_high.
        named["eps_high"] = config.epsilon_high - 1 if cispo else config.epsilon_high
        if cispo and config.epsilon_high < 1:
            raise ValueError(
                f"epsilon_high must be at least 1 with CISPO, whose bound it is; got {config.epsilon_high}"
            )
    if config.delta is not None:
        named["dual_clip"] = config.delta
    if config.importance_sampling_level is not None:
        named["ratio_level"] = config.importance_sampling_level
    return named


def _aggregation(loss_type: str, preset: str, cispo: bool) -> str:
    if loss_type == "cispo":
        if cispo:
            return "token-mean"
        raise ValueError(f"loss_type='cispo' is another objective than preset={preset!r}: write preset='cispo'")
    if loss_type in OTHER_LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is no preset: {OTHER_LOSS_TYPES[loss_type]}")
    if loss_type not in AGGREGATIONS:
        raise ValueError(f"loss_type must be one of {', '.join(AGGREGATIONS)}, cispo, or None; got {loss_type!r}")
    return AGGREGATIONS[loss_type]
