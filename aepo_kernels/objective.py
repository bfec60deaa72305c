"""Which policy loss is meant: one frozen dataclass, with the published methods as named presets.

Every method is the same per-token formula with other numbers. A preset says what a paper changed against PPO; the
advantage estimate (group, batch, step level) and the rollout are not part of it, they belong to the trainer.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, get_args

if TYPE_CHECKING:
    from typing_extensions import Unpack  # known to every type checker; typing has it from Python 3.11 on

PresetName = Literal["aepo", "arpo", "grpo", "dapo", "cispo", "gppo", "gspo", "gigpo", "reinforce++"]
Clip = Literal["ppo", "aepo", "gppo", "cispo"]
RatioLevel = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"]
CLIPS, RATIO_LEVELS, KL_ESTIMATORS = get_args(Clip), get_args(RatioLevel), get_args(KLEstimator)
AGGREGATIONS = get_args(Aggregation)

LARGEST = 1e30
"""Of a finite number in an objective; temperatures, softcaps and denominators lie between its inverse and it. So
float32 holds their inverses, and the products with every coefficient of a loss."""

ENTROPY_NOISE_ULPS = 8
"""Entropies whose standard deviation is at most this many ulps of their mean are equal, and scale no advantage: such a
difference is rounding (the kernels' entropies are right to 3e-7, 2.5 ulps), and divided by itself it would be noise."""


class ObjectiveNumbers(NamedTuple):
    """An objective as the numbers that the kernels take: the one list of them, in order. The flags are 0 or 1."""

    low: float
    """Bounds of the ratio."""
    high: float
    grad_low: float
    """The factor F that the gradient keeps beyond them."""
    grad_high: float
    dual_clip: float
    """inf = off."""
    detached_ratio: float
    """1: the clipped ratio is a constant weight on A * logprob."""
    entropy_advantage: float
    clamp_factor: float
    kl_coef: float
    kl_estimator: float
    """1, 2 or 3."""
    entropy_bonus: float
    importance_cap: float
    """inf = uncapped."""


METRICS = (
    "clip_fraction_high",
    "clip_fraction_low",
    "dual_clip_fraction",
    "ratio_mean",
    "ratio_max",
    "approx_kl",
    "entropy_mean",
    "entropy_std",
    "advantage_flips",
    "kl",
    "valid_tokens",
)
"""What every backend measures beside the loss: the one list of names, in order."""


@dataclass(frozen=True, kw_only=True)
class PolicyObjective:
    """A policy loss. Build it directly or with `PolicyObjective.preset(name, **overrides)`.

    Raises ValueError or TypeError, naming the field, for a value that no loss can be made of.

    Attributes:
        clip: What happens to the gradient beyond the clip bounds: dropped (ppo), kept at the bound above (aepo), kept
            at both bounds (gppo), or the clipped ratio as a detached weight on A * logprob for every token (cispo).
        eps_low: Lower bound of the ratio is 1 - eps_low, in [0, 1]; 1 means no lower bound.
        eps_high: Upper bound of the ratio is 1 + eps_high.
        dual_clip: c > 1: for A < 0 the loss of a token is at most c |A|, without gradient there. None: no such bound.
        ratio_level: One ratio per token, or per sequence: exp of the mean log-ratio of its valid tokens (GSPO).
        entropy_advantage: a: advantages are multiplied by 1 + a (H - mean H) / std H, H detached; by 1 where the
            entropies are equal up to rounding. 0: off, entropies are not needed.
        clamp_entropy_factor: Keep that factor at 0 or above, so that no advantage changes its sign.
        entropy_bonus: The loss of a token has - entropy_bonus * H in it, with gradient.
        kl_coef: The loss of a token has kl_coef * KL(policy || reference) in it, with the estimator's own gradient.
        kl_estimator: Of that KL, with d = logprob - ref_logprob: d (k1), d^2 / 2 (k2), or exp(-d) - 1 + d (k3).
        aggregation: How token losses become one number: token-mean, seq-mean-token-sum, seq-mean-token-mean or
            constant; see `aepo_kernels.ops.aggregation.token_weights`.
        importance_cap: Policy term times min(exp(old_logprob - rollout_logprob), cap), detached: corrects for an
            inference engine whose probabilities differ from the trainer's. None: no correction.
    """

    clip: Clip = "ppo"
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None
    ratio_level: RatioLevel = "token"
    entropy_advantage: float = 0.0
    clamp_entropy_factor: bool = False
    entropy_bonus: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    aggregation: Aggregation = "token-mean"
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("clip", CLIPS),
            ("ratio_level", RATIO_LEVELS),
            ("kl_estimator", KL_ESTIMATORS),
            ("aggregation", AGGREGATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if not isinstance(self.clamp_entropy_factor, bool):
            raise TypeError(f"clamp_entropy_factor must be a bool; got {self.clamp_entropy_factor!r}")
        self._number("eps_low", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._number("eps_high", ">= 0 and finite", lambda x: 0 <= x < math.inf)
        for name in ("entropy_advantage", "entropy_bonus", "kl_coef"):
            self._number(name, "finite", math.isfinite)
        if self.dual_clip is not None:
            self._number("dual_clip", "> 1, or None", lambda x: x > 1)
            if self.clip == "cispo":
                raise ValueError("dual_clip has no meaning with clip='cispo', whose ratio is already bounded: set None")
        if self.importance_cap is not None:
            self._number("importance_cap", "> 0 (inf = uncapped), or None", lambda x: x > 0)
        if self.clamp_entropy_factor and self.entropy_advantage == 0:
            raise ValueError("clamp_entropy_factor=True needs entropy_advantage != 0")

    def _number(self, name: str, expected: str, holds: Any) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number {expected}; got {value!r}")
        if LARGEST < abs(value) < math.inf:
            raise ValueError(f"{name} must be at most {LARGEST:g}, so that float32 holds its products; got {value!r}")
        if not holds(value):  # false for NaN as well
            raise ValueError(f"{name} must be {expected}; got {value!r}")

    @classmethod
    def preset(cls, name: PresetName, **overrides: Unpack[PolicyFields]) -> PolicyObjective:
        """The published objective of that name, with any field overridden.

        Names: aepo, arpo, grpo, dapo, cispo, gppo, gspo, gigpo, reinforce++. Raises ValueError for another one and
        TypeError for a field that does not exist; both say what is near, or how a method without a preset is written.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"objective must be one of {', '.join(PRESETS)}; got {name!r}{_preset_hint(name)}")
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in overrides:
            if key not in fields:
                near = _nearest(key, fields)
                hint = f": did you mean {near!r}? It" if near else "; it"
                raise TypeError(f"PolicyObjective has no field {key!r}{hint} has {', '.join(fields)}")
        chosen: dict[str, Any] = {**PRESETS[name], **overrides}
        return cls(**chosen)

    def numbers(self) -> ObjectiveNumbers:
        """This objective in numbers: bounds, and the factors F that the gradient keeps beyond them."""
        low, high = 1.0 - self.eps_low, 1.0 + self.eps_high
        return ObjectiveNumbers(
            low=low,
            high=high,
            grad_low=low if self.clip == "gppo" else 0.0,
            grad_high=high if self.clip in ("aepo", "gppo") else 0.0,
            dual_clip=math.inf if self.dual_clip is None else float(self.dual_clip),
            detached_ratio=float(self.clip == "cispo"),
            entropy_advantage=float(self.entropy_advantage),
            clamp_factor=float(self.clamp_entropy_factor),
            kl_coef=float(self.kl_coef),
            kl_estimator=float(1 + KL_ESTIMATORS.index(self.kl_estimator)),
            entropy_bonus=float(self.entropy_bonus),
            importance_cap=math.inf if self.importance_cap is None else float(self.importance_cap),
        )

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_advantage != 0 or self.entropy_bonus != 0

    @property
    def needs_sequences(self) -> bool:
        return self.ratio_level == "sequence" or self.aggregation.startswith("seq-")

    def follows_from_each_token(self, *, entropy_stats: bool) -> bool:
        """Whether a token's gradient needs nothing of other tokens; entropy_stats: they are given."""
        return self.ratio_level == "token" and (entropy_stats or self.entropy_advantage == 0)

    def check_inputs(
        self,
        *,
        entropy: bool,
        entropy_stats: bool,
        ref_logprobs: bool,
        rollout_logprobs: bool,
        cu_seqlens: bool,
        denominator: bool,
        weights: bool,
    ) -> None:
        """Raise ValueError where a term is asked for without its input, or an input is given that no term uses.

        Each keyword says whether that input is there. A term that is silently off is the worst outcome: the published
        AEPO code never computed the entropy its advantage asks for.
        """
        for asked, given, problem in (
            (self.entropy_advantage != 0, entropy, "entropy_advantage != 0 needs entropy"),
            (self.entropy_bonus != 0, entropy, "entropy_bonus != 0 needs entropy"),
            (self.kl_coef != 0, ref_logprobs, "kl_coef != 0 needs ref_logprobs"),
            (self.importance_cap is not None, rollout_logprobs, "importance_cap needs rollout_logprobs"),
            (
                self.ratio_level == "sequence" or (self.aggregation.startswith("seq-") and not weights),
                cu_seqlens,
                "sequence ratios and seq- aggregations need cu_seqlens or [B, L] inputs",
            ),
            (
                self.aggregation == "constant" and not weights,
                denominator,
                "aggregation='constant' needs denominator",
            ),
        ):
            if asked and not given:
                raise ValueError(f"objective: {problem}")
        if entropy_stats and self.entropy_advantage == 0:
            raise ValueError("objective: entropy_stats is given, but entropy_advantage is 0 and nothing would use it")
        if denominator and weights:
            raise ValueError("objective: denominator is given, but weights say each token's share, and nothing divides")
        if rollout_logprobs and self.importance_cap is None:
            raise ValueError(
                "objective: rollout_logprobs is given, but importance_cap is None and nothing would use it"
            )


class PolicyFields(TypedDict, total=False):
    """The fields of PolicyObjective, as type checkers see them where they are passed by name."""

    clip: Clip
    eps_low: float
    eps_high: float
    dual_clip: float | None
    ratio_level: RatioLevel
    entropy_advantage: float
    clamp_entropy_factor: bool
    entropy_bonus: float
    kl_coef: float
    kl_estimator: KLEstimator
    aggregation: Aggregation
    importance_cap: float | None


PRESETS: dict[PresetName, PolicyFields] = {
    # Stop-gradient clip above, entropy-aware advantage; arXiv 2510.14545.
    "aepo": {"clip": "aepo", "dual_clip": 3.0, "entropy_advantage": 0.2},
    # GRPO's loss on branched rollouts, as its authors run it; arXiv 2507.19849.
    "arpo": {"dual_clip": 3.0},
    # arXiv 2402.03300. The paper's KL term (k3, 0.04) is an override: kl_coef=0.04 needs ref_logprobs.
    "grpo": {"aggregation": "seq-mean-token-mean"},
    # Higher upper bound, every token counts the same; arXiv 2503.14476.
    "dapo": {"eps_high": 0.28},
    # arXiv 2506.13585 uses no lower bound and leaves the upper one, here 5, to tuning.
    "cispo": {"clip": "cispo", "eps_low": 1.0, "eps_high": 4.0},
    # Klear-Reasoner, arXiv 2508.07629.
    "gppo": {"clip": "gppo"},
    # arXiv 2507.18071; its bounds are for a length-normalised ratio, hence so narrow.
    "gspo": {"ratio_level": "sequence", "aggregation": "seq-mean-token-mean", "eps_low": 3e-4, "eps_high": 4e-4},
    # The step-level groups are in the advantages; arXiv 2505.10978.
    "gigpo": {},
    # Batch-normalised advantages; arXiv 2501.03262.
    "reinforce++": {},
}

OWN_LOSS = "has a loss of its own, which is no preset: write it as a function for aepo_kernels.logits_loss"
NO_PRESETS = {
    "ppo": "PPO's clipped loss is PolicyObjective()",
    "drgrpo": "Dr. GRPO is PolicyObjective.preset('grpo', aggregation='constant') with denominator = sequences * "
    "maximum length, and group_advantages(rewards, groups, scale=False) from aepo_kernels.advantages",
    "rloo": "RLOO is PolicyObjective(aggregation='seq-mean-token-sum') with leave_one_out_advantages(rewards, groups) "
    "from aepo_kernels.advantages",
    "reinforce": "REINFORCE is PolicyObjective() with one update per rollout: every ratio is 1 then, and the gradient "
    "that of advantage * logprob",
    "reinforce++baseline": "REINFORCE++ with a baseline is PolicyObjective.preset('reinforce++') with "
    "batch_advantages(group_advantages(rewards, groups, scale=False)) from aepo_kernels.advantages",
    "dppo": f"DPPO {OWN_LOSS} (examples/own_losses.py has it)",
    "sapo": f"SAPO {OWN_LOSS} (examples/own_losses.py has it)",
    "gmpo": f"GMPO {OWN_LOSS}",
    "trpo": f"TRPO {OWN_LOSS}",
    "dpo": f"DPO {OWN_LOSS}",
}
"""Well-known names that are no presets, in small letters without separators, and what to write."""


def _preset_hint(name: object) -> str:
    if not isinstance(name, str):
        return ""
    plain = re.sub(r"[^a-z0-9+]", "", name.lower().replace("plus", "+"))  # Dr. GRPO, dr_grpo, REINFORCE_plus_plus
    plain = re.sub(r"pp$", "++", plain)  # reinforce_pp
    if plain in NO_PRESETS:
        return f". {NO_PRESETS[plain]}"
    near = _nearest(plain, [*PRESETS, *NO_PRESETS])
    if near is None:
        return ""
    return f": did you mean {near!r}?" + (f" {NO_PRESETS[near]}" if near in NO_PRESETS else "")


def _nearest(name: str, known: list[str]) -> str | None:
    """The known name that was meant. Swapped letters go first: to difflib gpro is as near to gspo as to grpo."""
    same_letters = [one for one in known if sorted(one) == sorted(name)]
    return next(iter(same_letters or difflib.get_close_matches(name, known, 1, 0.6)), None)
