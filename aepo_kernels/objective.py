"""Which policy loss is meant: one frozen dataclass, with the published methods as named presets.

Every method is the same per-token formula with other numbers. A preset says what a paper changed against PPO; the
advantage estimate (group, batch, step level) and the rollout are not part of it, they belong to the trainer.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

CLIPS = ("ppo", "aepo", "gppo", "cispo")
RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant")

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
    """

    clip: Literal["ppo", "aepo", "gppo", "cispo"] = "ppo"
    """What happens to the gradient beyond the clip bounds: dropped (ppo), kept at the bound above (aepo), kept at both
    bounds (gppo), or the clipped ratio as a detached weight on A * logprob for every token (cispo)."""
    eps_low: float = 0.2
    """Lower bound of the ratio is 1 - eps_low, in [0, 1]; 1 means no lower bound."""
    eps_high: float = 0.2
    """Upper bound of the ratio is 1 + eps_high."""
    dual_clip: float | None = None
    """c > 1: for A < 0 the loss of a token is at most c |A|, without gradient there. None: no such bound."""
    ratio_level: Literal["token", "sequence"] = "token"
    """One ratio per token, or per sequence: exp of the mean log-ratio of its valid tokens (GSPO)."""
    entropy_advantage: float = 0.0
    """a: advantages are multiplied by 1 + a (H - mean H) / std H, H detached; by 1 where the entropies are equal up to
    rounding. 0: off, entropies are not needed."""
    clamp_entropy_factor: bool = False
    """Keep that factor at 0 or above, so that no advantage changes its sign."""
    entropy_bonus: float = 0.0
    """The loss of a token has - entropy_bonus * H in it, with gradient."""
    kl_coef: float = 0.0
    """The loss of a token has kl_coef * KL(policy || reference) in it, with the estimator's own gradient."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"] = "token-mean"
    """How token losses become one number; see `aepo_kernels.ops.aggregation.token_weights`."""
    importance_cap: float | None = None
    """Policy term times min(exp(old_logprob - rollout_logprob), cap), detached: corrects for an inference engine whose
    probabilities differ from the trainer's. None: no correction."""

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
    def preset(cls, name: str, **overrides: Any) -> PolicyObjective:
        """The published objective of that name, with any field overridden.

        Names: aepo, arpo, grpo, dapo, cispo, gppo, gspo, gigpo, reinforce++.
        """
        if name not in PRESETS:
            raise ValueError(f"objective must be one of {', '.join(PRESETS)}; got {name!r}")
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in overrides:
            if key not in fields:
                raise TypeError(f"PolicyObjective has no field {key!r}; it has {', '.join(fields)}")
        return cls(**{**PRESETS[name], **overrides})

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


PRESETS: dict[str, dict[str, Any]] = {
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
