"""AEPOConfig: GRPOConfig with a preset, and TRL's own names as overrides of it.

TRL's defaults are those of one method. Here None means "as the preset has it", so whatever a script sets by TRL's names
is honoured, and what no preset would look at is refused.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from trl import GRPOConfig

from aepo.branching import BranchSettings
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
    "sapo": "it has a loss of its own: loss='examples.own_losses:sapo' shows how it is written",
    "vespo": "it has a loss of its own, a function for loss= (docs/own_loss.md)",
}
Advantage = Literal["group", "batch", "gigpo"]
PRESET_ADVANTAGES: dict[str, Advantage] = {"reinforce++": "batch", "gigpo": "gigpo"}
BRANCHING_PRESETS = ("aepo", "arpo")
BRANCH_FIELDS = tuple(one.name for one in fields(BranchSettings))
OBJECTIVE_NAMES = ("loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "objective")


@dataclass
class AEPOConfig(GRPOConfig):
    """Arguments of AEPOTrainer: those of GRPOConfig, and the ones below (docs/trl.md has the table).

    `preset` is the published method: its objective, its advantage, and whether rollouts branch. TRL's names override
    parts of it: `epsilon` and `epsilon_high` the clip bounds, `delta` the bound on the ratio of negative advantages,
    `importance_sampling_level` token or sequence, `loss_type` how tokens add up (dapo, grpo, luspo, dr_grpo), `beta`
    the KL term; `objective` has the fields of PolicyObjective that TRL has no name for. ValueError, naming the setting,
    for one that would be ignored.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "objective"]  # noqa: RUF012  # as TRL declares it

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
    advantage: str | None = field(
        default=None,
        metadata={
            "help": "How rewards become advantages: group (TRL's, with scale_rewards), batch, gigpo, or "
            "package.module:function of (rewards [N], questions [N]). None: the preset's."
        },
    )
    step_weight: float = field(default=1.0, metadata={"help": "GiGPO: weight of the step advantage."})
    step_discount: float = field(default=0.95, metadata={"help": "GiGPO: discount per step of the return, in (0, 1]."})

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
    use_bias_correction_kl: bool = field(
        default=False,
        metadata={"help": "TRL's factor of the KL term, which the presets' KL does not have: must stay False."},
    )

    # Rollouts that branch where the model becomes unsure after a tool result
    branched_rollouts: bool | None = field(
        default=None,
        metadata={
            "help": "Whether completions branch after tool results. None: with the presets aepo and arpo, where the "
            "trainer has tools or environments and no rollout_func."
        },
    )
    fresh_paths: int | None = field(
        default=None,
        metadata={
            "help": "Completions per prompt that start from it, the others branch. None: entropy pre-monitoring."
        },
    )
    budget_beta: float = field(default=1.0, metadata={"help": "Pre-monitoring: k sigmoid(beta (H_root - H_tool))."})
    entropy_window: int = field(default=20, metadata={"help": "First tokens of a turn whose entropy is looked at."})
    branch_alpha: float | None = field(
        default=None,
        metadata={"help": "Base chance of a branch. None: drawn from [0, 1) for every decision, as in the paper."},
    )
    branch_gamma: float = field(default=0.2, metadata={"help": "Weight of the entropy change, in units of log V."})
    branch_penalty: float | None = field(
        default=None,
        metadata={"help": "Every branch in a row lowers the chance by this part. None: 0.05, with preset arpo 0."},
    )
    branch_threshold: float = field(default=0.5, metadata={"help": "A path branches where its chance is above this."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            PolicyObjective.preset(self.preset)  # type: ignore[arg-type]  # says what is near
        self._refuse_ignored()
        if self.loss is None:
            policy_objective(self)
        self.branch_settings()

    @property
    def advantage_kind(self) -> str:
        """group, batch, gigpo, or package.module:function."""
        return self.advantage or PRESET_ADVANTAGES.get(self.preset, "group")

    def branch_settings(self) -> BranchSettings:
        """The branch rule. ValueError: a field that it does not take."""
        chosen = {name: getattr(self, name) for name in BRANCH_FIELDS}
        if self.branch_alpha is None:
            chosen["branch_alpha"] = "uniform"
        if self.branch_penalty is None:
            chosen["branch_penalty"] = 0.0 if self.preset == "arpo" else 0.05
        if self.preset == "arpo" and self.fresh_paths is None:
            chosen["fresh_paths"] = max(self.num_generations // 2, 1)  # 8 of 16 in its authors' scripts
        if chosen["fresh_paths"] is not None and chosen["fresh_paths"] > self.num_generations:
            raise ValueError(
                f"fresh_paths must be at most num_generations, {self.num_generations}; got {self.fresh_paths}"
            )
        return BranchSettings(**chosen)

    def _refuse_ignored(self) -> None:
        for name, instead in self._ignored():
            raise ValueError(f"{name}={getattr(self, name)!r} would be ignored by AEPOTrainer: {instead}")

    def _ignored(self) -> Any:
        """Settings that differ from TRL's defaults and that nothing here looks at, each with what to write instead."""
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", *VESPO):
            if getattr(self, name) != default_of(name):
                yield name, "it belongs to a loss of TRL's that no preset has"
        for name in ("entropy_coef", "use_adaptive_entropy"):
            if getattr(self, name) != default_of(name):
                yield name, "objective={'entropy_bonus': ...} is the bonus here, with one coefficient for the run"
        if self.use_bias_correction_kl and self.beta != 0:
            yield "use_bias_correction_kl", "the presets' KL term has no such factor; leave it False"
        if self.loss is not None:
            for name in OBJECTIVE_NAMES:
                if getattr(self, name) is not None:
                    yield name, "loss= is a function of your own, which would not see it; put the number into it"
        kind = self.advantage_kind
        if kind not in get_args(Advantage) and ":" not in kind:
            raise ValueError(
                f"advantage must be {', '.join(get_args(Advantage))}, or package.module:function; got {kind!r}"
            )
        if kind not in ("group", "gigpo"):
            for name in ("scale_rewards", "multi_objective_aggregation"):
                if getattr(self, name) != default_of(name):
                    yield name, f"advantage={kind!r} makes advantages of the summed rewards itself"
        if kind != "gigpo":
            for name in ("step_weight", "step_discount"):
                if getattr(self, name) != default_of(name):
                    yield name, "it is GiGPO's: preset='gigpo' or advantage='gigpo'"
        if kind == "gigpo" and not 0 < self.step_discount <= 1:
            raise ValueError(f"step_discount must be in (0, 1]; got {self.step_discount}")


VESPO = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")


def default_of(name: str) -> Any:
    """Of a field of AEPOConfig."""
    one = AEPOConfig.__dataclass_fields__[name]
    return one.default if one.default is not MISSING else one.default_factory()  # type: ignore[operator]


def policy_objective(config: AEPOConfig) -> PolicyObjective:
    """The preset's objective with what the settings override. ValueError naming a setting that does not fit."""
    own = config.objective or {}
    if not isinstance(own, dict):
        raise ValueError(f"objective must be a dict of PolicyObjective's fields; got {config.objective!r}")
    for name, instead in {
        "kl_coef": "write beta=, for which TRL also keeps the reference model",
        "importance_cap": "TRL's vllm_importance_sampling_* settings are that correction",
    }.items():
        if name in own:
            raise ValueError(f"objective={{{name!r}: ...}} has another name in TRL: {instead}")
    clip = own.get("clip", PRESETS[config.preset].get("clip", "ppo"))  # type: ignore[index]
    named = _overrides_by_trl_names(config, clip)
    for name in named.keys() & own.keys():
        raise ValueError(
            f"objective={{{name!r}: {own[name]!r}}} and TRL's setting of the same meaning are both given: leave one out"
        )
    objective = PolicyObjective.preset(config.preset, **own, **named, kl_coef=config.beta)  # type: ignore[arg-type]
    if config.delta is not None and config.delta <= 1 + objective.eps_high:
        raise ValueError(f"delta must be above 1 + epsilon_high, {1 + objective.eps_high}; got {config.delta}")
    return objective


def _overrides_by_trl_names(config: AEPOConfig, clip: str) -> dict[str, Any]:
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
