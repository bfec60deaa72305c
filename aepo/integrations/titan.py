"""torchtitan: every objective, and losses of your own, as a loss of its RL trainer (docs/torchtitan.md).

torchtitan calls a loss with the logits of one micro-batch on one rank, or of one chunk of it (ChunkedLossWrapper), and
adds up what comes back, losses and metrics alike. Its rows hold several samples one after the other, whose bounds a
loss is not told: what needs sequences is refused by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

try:
    from torchtitan.components.loss import IGNORE_INDEX, BaseLoss
    from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
except ImportError as error:
    raise ImportError(
        f"aepo.integrations.titan needs torchtitan 0.3: pip install torchtitan==0.3.0, in an environment of its own "
        f"(docs/torchtitan.md); {error}"
    ) from error

from aepo.own_loss import ARGUMENTS, LossBatch, OwnLoss, checked_call
from aepo.registry import plain, resolve_function
from aepo_kernels import PolicyLoss, PolicyObjective, logits_loss, logits_policy_loss
from aepo_kernels.objective import PolicyFields

MEANS = {
    "ratio_mean": "loss/ratio_mean",
    "clip_fraction_high": "loss/clip_high_frac",
    "clip_fraction_low": "loss/clip_low_frac",
    "dual_clip_fraction": "loss/dual_clip_frac",
    "approx_kl": "loss/approx_kl/mean",
    "entropy_mean": "trainer/entropy/mean",
}
"""Metrics that are means over the tokens of a call, and torchtitan's kind of name. Other means get loss/NAME/mean."""
PACKED = "torchtitan packs several samples into a row, and tells a loss no bounds"


class AEPOLoss(BaseLoss):
    """The policy loss of a preset, or of a function of your own, from the logits that torchtitan hands over."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """ValueError or TypeError, naming the field, for what the objective or the protocol has no place for."""

        preset: str | None = None
        """The published objective; None is aepo. grpo and gspo need sequences: see the error that they give."""
        objective: PolicyFields = field(default_factory=PolicyFields)
        """Fields of PolicyObjective in place of the preset's, as {"eps_high": 0.28}."""
        loss: str | None = None
        """package.module:function of (logprobs, entropy, batch) in place of a preset (docs/own_loss.md)."""
        denominator: float | None = None
        """What {"aggregation": "constant"} divides by; of Dr. GRPO: samples per step * maximum length."""
        inplace_backward: bool = True
        """Write the gradient over the logits. False for a model that keeps them, as one with a softcap does."""

        def __post_init__(self) -> None:
            if self.loss is None:
                _objective(self)
                return
            for name in ("preset", "objective", "denominator"):
                if getattr(self, name):
                    raise ValueError(f"{name}={getattr(self, name)!r} would be ignored beside loss={self.loss!r}")

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        """compile_config changes nothing, as with torchtitan's own RL losses: the operations are fused already."""
        del compile_config
        self.config = config
        self.objective = _objective(config) if config.loss is None else None
        self.function: OwnLoss | None = None
        if config.loss is not None:
            self.function = resolve_function(config.loss, "AEPOLoss.Config.loss", ARGUMENTS)
        self._entropy_stats: tuple[float, float] | None = None
        self._vocab_starts: dict[tuple[str, int], int] = {}

    def set_entropy_stats(self, mean: float | Tensor, std: float | Tensor) -> None:
        """Mean and std of the entropies of all tokens of the coming optimiser step, those of other ranks included: what
        `aepo_kernels.entropy_advantage.entropy_statistics` returns. They are used until the next call."""
        if self.objective is None or self.objective.entropy_advantage == 0:
            raise ValueError("set_entropy_stats: this loss has no entropy_advantage, and nothing would use them")
        self._entropy_stats = float(mean), float(std)

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        global_valid_tokens: float | Tensor | None = None,
        *,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss [], metrics) of the tokens of this call, as a share of those of the whole optimiser step.

        logits [B, L, V] bf16, fp16 or fp32: whole, a DTensor, replicated or with a sharded vocabulary, or under
        spmd_types this rank's part of the vocabulary. labels [B, L] integer, shifted already; generator_logprobs and
        advantages [B, L] float; loss_mask [B, L]. Tokens without a finite generator log-prob, or with the label
        IGNORE_INDEX, do not count. global_valid_tokens None: undivided sums. What calls and ranks return adds up to the
        step's loss and metrics, but for metrics that end in /max.

        Raises ValueError or TypeError for other placements, for an entropy_advantage whose statistics this call cannot
        know, and for what `logits_policy_loss` refuses.
        """
        local, shard = self._shard(logits)
        _check_shapes(local, labels, generator_logprobs, advantages, loss_mask)
        mask = (loss_mask != 0) & generator_logprobs.isfinite() & (labels != IGNORE_INDEX)
        tokens = 1.0 if global_valid_tokens is None else global_valid_tokens
        tokens = tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1.0)
        if self.objective is None:
            assert self.function is not None
            loss_fn = _own_loss(self.function, mask, generator_logprobs, advantages, tokens)
            found = logits_loss(local, labels, mask, loss_fn, inplace_backward=self.config.inplace_backward, **shard)
        else:
            stats = self._stats(mask, global_valid_tokens)
            each = self.objective.follows_from_each_token(entropy_stats=stats is not None)
            found = logits_policy_loss(
                local,
                labels,
                generator_logprobs,
                advantages,
                mask,
                objective=self.objective,
                entropy_stats=stats,
                denominator=tokens if self.config.denominator is None else self.config.denominator,
                inplace_backward=self.config.inplace_backward,
                # What the single pass takes: one read and one write of the logits less where it can be.
                single_pass=self.config.inplace_backward and each and not shard and local.dtype != torch.float16,
                **shard,
            )
        return found.loss, _summable(found, mask, tokens)

    def _stats(self, mask: Tensor, global_valid_tokens: float | Tensor | None) -> tuple[float, float] | None:
        """Those that were set; None where the objective needs none, or this call has all tokens of the step."""
        assert self.objective is not None
        if self.objective.entropy_advantage == 0 or self._entropy_stats is not None:
            return self._entropy_stats
        here = int(mask.sum())
        if here and (global_valid_tokens is None or here != int(global_valid_tokens)):
            step = "an unknown number" if global_valid_tokens is None else int(global_valid_tokens)
            raise ValueError(
                f"entropy_advantage={self.objective.entropy_advantage} needs mean and std of the entropies of the "
                f"whole optimiser step, and this call has {here} of its {step} tokens (a chunk, a micro-batch): "
                'call set_entropy_stats(mean, std) before the step, or set objective={"entropy_advantage": 0.0}'
            )
        return None

    def _shard(self, logits: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """This rank's logits, and process_group and vocab_start where the vocabulary is sharded."""
        if isinstance(logits, DTensor):
            return _shard_of_dtensor(logits)
        if spmd_mesh_size("tp") == 1:
            return logits, {}
        mesh = current_spmd_mesh()
        assert mesh is not None
        group, entries = mesh.get_group("tp"), logits.shape[-1]
        key = (group.group_name, entries)
        if key not in self._vocab_starts:  # once: parts do not change, and reading them waits for the device
            part = torch.tensor([entries], device=logits.device)
            parts = [torch.empty_like(part) for _ in range(group.size())]
            dist.all_gather(parts, part, group=group)
            self._vocab_starts[key] = int(sum(parts[: group.rank()]))
        return logits, {"process_group": group, "vocab_start": self._vocab_starts[key]}


def _objective(config: AEPOLoss.Config) -> PolicyObjective:
    """ValueError, by name, for what a loss of torchtitan's is told too little for."""
    objective = PolicyObjective.preset(config.preset or "aepo", **config.objective)  # type: ignore[arg-type]
    name = f"preset={config.preset or 'aepo'!r} with objective={config.objective!r}"
    if objective.ratio_level == "sequence":
        raise ValueError(f"{name}: ratio_level='sequence' needs sequences. {PACKED}")
    if objective.aggregation.startswith("seq-"):
        instead = '{"aggregation": "token-mean"}'
        raise ValueError(
            f"{name}: aggregation={objective.aggregation!r} needs sequences. {PACKED}; its own losses are means over "
            f"tokens, as with objective={instead}"
        )
    if objective.kl_coef != 0:
        raise ValueError(f"{name}: kl_coef needs ref_logprobs, and torchtitan has no reference policy")
    if objective.importance_cap is not None:
        raise ValueError(
            f"{name}: importance_cap needs old_logprobs beside those of the generator, which are all there is"
        )
    constant = objective.aggregation == "constant"
    if constant != (config.denominator is not None):
        problem = "needs denominator" if constant else f"would ignore denominator={config.denominator!r}"
        raise ValueError(f"{name}: aggregation={objective.aggregation!r} {problem}")
    return objective


def _check_shapes(logits: Tensor, labels: Tensor, *others: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (labels, *others)]
    if any(shape != tuple(logits.shape[:-1]) for shape in shapes):
        raise ValueError(
            f"labels, generator_logprobs, advantages and loss_mask must have shape {tuple(logits.shape[:-1])}, that of "
            f"the logits without the vocabulary; got {', '.join(map(str, shapes))}"
        )


def _shard_of_dtensor(logits: DTensor) -> tuple[Tensor, dict[str, Any]]:
    mesh, vocab = logits.device_mesh, logits.shape[-1]
    cut = [dim for dim, one in enumerate(logits.placements) if not one.is_replicate() and mesh.size(dim) > 1]
    if len(cut) > 1 or any(logits.placements[dim] != Shard(logits.dim() - 1) for dim in cut):
        raise ValueError(
            "logits must be replicated or have their vocabulary sharded over one dimension of the mesh; "
            f"got placements {logits.placements} on a mesh {tuple(mesh.shape)}"
        )
    if not cut:
        return logits.to_local(), {}
    group = mesh.get_group(cut[0])
    start = math.ceil(vocab / group.size()) * group.rank()  # as torch.chunk cuts
    return logits.to_local(), {"process_group": group, "vocab_start": min(start, vocab)}


@dataclass(frozen=True, kw_only=True)
class _TokenBatch:
    """The fields of LossBatch that torchtitan knows, and words for the others."""

    old_logprobs: Tensor  # [R], the generator's
    rollout_logprobs: Tensor  # [R]
    advantages: Tensor  # [R]
    tokens: int
    temperature: float = 1.0
    ref_logprobs: None = None

    def __getattr__(self, name: str) -> Any:
        if name in {one.name for one in fields(LossBatch)}:
            known = ", ".join(one.name for one in fields(self))
            raise ValueError(f"batch.{name} is not known in torchtitan, whose losses are told of tokens alone: {known}")
        raise AttributeError(f"batch has no {name!r}", name=name, obj=self)


def _own_loss(function: OwnLoss, mask: Tensor, old_logprobs: Tensor, advantages: Tensor, tokens: float | Tensor) -> Any:
    """`function` as `logits_loss` calls it: with the R tokens that count, and not at all where there are none."""

    def loss_fn(logprobs: Tensor, entropy: Tensor) -> Any:
        if not mask.any():
            return (logprobs * 0).sum()
        old = old_logprobs[mask].to(logprobs.dtype)
        batch = _TokenBatch(
            old_logprobs=old,
            rollout_logprobs=old.clone(),
            advantages=advantages[mask].to(logprobs.dtype),
            tokens=int(tokens),
        )
        ours = {"ratio_mean": (logprobs[mask] - old).exp().mean(), "entropy_mean": entropy[mask].mean()}
        returned = checked_call(
            function,
            logprobs[mask],
            entropy[mask],
            batch,  # type: ignore[arg-type]
            setting="loss",
            reference="a reference policy, which torchtitan has not",
        )
        if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
            return returned[0], {**returned[1], **ours}
        return (returned, ours) if isinstance(returned, Tensor) else returned

    return functools.update_wrapper(loss_fn, plain(function))  # errors name the user's function


def _summable(found: PolicyLoss, mask: Tensor, tokens: float | Tensor) -> dict[str, Tensor]:
    """Metrics that torchtitan may add up over calls and ranks: means times this call's share of the step's tokens.

    Its names say how: chunks refuse a name that does not end in mean, frac, /max or /min, micro-batches drop one, and
    ranks add up what does not end in /max.
    """
    count = mask.sum()
    share = count / tokens
    metrics = {"loss/mean": found.loss.detach()}
    for name, value in found.metrics.items():
        if name == "ratio_max":
            metrics["loss/ratio/max"] = value
        elif name == "advantage_flips":
            metrics["loss/advantage_flips_frac"] = value / tokens
        elif name not in ("loss", "valid_tokens", "entropy_std"):  # the last is no sum over calls
            metrics[MEANS.get(name, f"loss/{name}/mean")] = torch.where(count > 0, value * share, 0.0)
    return metrics
