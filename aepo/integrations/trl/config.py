"""AEPOConfig: GRPOConfig with a preset, its advantages, and rollouts that branch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from trl import GRPOConfig

from aepo.branching import BranchSettings
from aepo.integrations.trl.objective import ObjectiveSettings, is_number

Advantage = Literal["group", "batch", "gigpo"]
PRESET_ADVANTAGES: dict[str, Advantage] = {"reinforce++": "batch", "gigpo": "gigpo"}
BRANCHING_PRESETS = ("aepo", "arpo")
BRANCH_FIELDS = tuple(one.name for one in fields(BranchSettings))


@dataclass
class AEPOConfig(ObjectiveSettings, GRPOConfig):
    """Arguments of AEPOTrainer: those of GRPOConfig, and the ones below (docs/trl.md has the table).

    `preset` is the published method: its objective, its advantage, and whether rollouts branch. TRL's names override
    parts of it: `epsilon` and `epsilon_high` the clip bounds, `delta` the bound on the ratio of negative advantages,
    `importance_sampling_level` token or sequence, `loss_type` how tokens add up (dapo, grpo, luspo, dr_grpo), `beta`
    the KL term; `objective` has the fields of PolicyObjective that TRL has no name for. ValueError, naming the setting,
    for one that would be ignored.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "objective"]  # noqa: RUF012  # as TRL declares it

    advantage: str | None = field(
        default=None,
        metadata={
            "help": "How rewards become advantages: group (TRL's, with scale_rewards), batch, gigpo, or "
            "package.module:function of (rewards [N], questions [N]). None: the preset's."
        },
    )
    step_weight: float = field(default=1.0, metadata={"help": "GiGPO: weight of the step advantage."})
    step_discount: float = field(default=0.95, metadata={"help": "GiGPO: discount per step of the return, in (0, 1]."})

    # TRL's
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
        self.check_objective()
        self._check_types()
        self._refuse_ignored()
        self.branch_settings()

    @property
    def advantage_kind(self) -> str:
        """group, batch, gigpo, or package.module:function."""
        return self.advantage or PRESET_ADVANTAGES.get(self.preset, "group")

    def branches(self, *, places: bool) -> bool:
        """Whether rollouts branch. places: they have some to branch at, by what the trainer was given. ValueError: they
        do not, but a setting says how."""
        if self.branched_rollouts is not None:
            return self.branched_rollouts
        if places or self.preset not in BRANCHING_PRESETS:
            return places and self.preset in BRANCHING_PRESETS
        for name in BRANCH_FIELDS:
            if getattr(self, name) != default_of(name):
                self.refuse(name, "without tools or environments, or with a rollout_func, no completion branches")
        return False

    def branch_settings(self) -> BranchSettings:
        """The branch rule. ValueError: a field that it does not take."""
        chosen = {name: getattr(self, name) for name in BRANCH_FIELDS}
        if self.branch_alpha is None:
            chosen["branch_alpha"] = "uniform"
        if self.branch_penalty is None:
            chosen["branch_penalty"] = 0.0 if self.preset == "arpo" else 0.05
        if self.preset == "arpo" and self.fresh_paths is None:
            chosen["fresh_paths"] = max(self.num_generations // 2, 1)  # 8 of 16 in its authors' scripts
        settings = BranchSettings(**chosen)
        if settings.fresh_paths is not None and settings.fresh_paths > self.num_generations:
            raise ValueError(
                f"fresh_paths must be at most num_generations, {self.num_generations}; got {self.fresh_paths}"
            )
        return settings

    def _check_types(self) -> None:
        self.expect("True, False or None", lambda x: x is None or isinstance(x, bool), "branched_rollouts")
        self.expect("a number of at least 0", lambda x: is_number(x) and x >= 0, "beta", "step_weight")
        self.expect("a number in (0, 1]", lambda x: is_number(x) and 0 < x <= 1, "step_discount")
        self.expect(
            f"{', '.join(get_args(Advantage))}, package.module:function, or None",
            lambda x: x in (None, *get_args(Advantage)) or (isinstance(x, str) and all(x.partition(":"))),
            "advantage",
        )

    def _refuse_ignored(self) -> None:
        for name, instead in self._ignored():
            self.refuse(name, instead)

    def _ignored(self) -> Any:
        """Settings that differ from TRL's defaults and that nothing here looks at, each with what to write instead."""
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", *VESPO):
            if getattr(self, name) != default_of(name):
                yield name, "it belongs to a loss of TRL's that no preset has"
        for name in ("entropy_coef", "use_adaptive_entropy", *ADAPTIVE_ENTROPY):
            if getattr(self, name) != default_of(name):
                yield name, "objective={'entropy_bonus': ...} is the bonus here, with one coefficient for the run"
        if self.use_bias_correction_kl and self.beta != 0:
            yield "use_bias_correction_kl", "the presets' KL term has no such factor; leave it False"
        branches = self.preset in BRANCHING_PRESETS if self.branched_rollouts is None else self.branched_rollouts
        for name in BRANCH_FIELDS:
            if not branches and getattr(self, name) != default_of(name):
                yield name, "rollouts do not branch: branched_rollouts=True, or a preset that does (aepo, arpo)"
        kind = self.advantage_kind
        if kind not in ("group", "gigpo"):
            for name in ("scale_rewards", "multi_objective_aggregation"):
                if getattr(self, name) != default_of(name):
                    yield name, f"advantage={kind!r} makes advantages of the summed rewards itself"
        if kind != "gigpo":
            for name in ("step_weight", "step_discount"):
                if getattr(self, name) != default_of(name):
                    yield name, "it is GiGPO's: preset='gigpo' or advantage='gigpo'"


ADAPTIVE_ENTROPY = ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target")
VESPO = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")


def default_of(name: str) -> Any:
    """Of a field of AEPOConfig."""
    one = AEPOConfig.__dataclass_fields__[name]
    return one.default if one.default is not MISSING else one.default_factory()  # type: ignore[operator]
