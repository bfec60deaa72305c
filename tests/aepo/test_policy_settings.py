"""Every setting of section policy reaches the loss or the advantages, and changes them as the papers say.

From a configuration to the numbers: nothing between the two is called by hand.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_toys import NEW, SAMPLES, batch_of, config_of, expected, learned
from test_trainer import trainer_for

from aepo.advantages import Sample, advantage_settings
from aepo.config import OBJECTIVE_KEYS, PolicyConfig
from aepo.learning.batch import Batch
from aepo.types import ScoredTree
from aepo_kernels import PolicyObjective
from aepo_kernels.objective import PRESETS

# PPO with the bounds that all papers share (arXiv 1707.06347), a mean over tokens, and the group's advantage
# (arXiv 2402.03300); below, what each paper has instead.
COMMON: dict[str, Any] = {
    "clip": "ppo", "eps_low": 0.2, "eps_high": 0.2, "dual_clip": None, "ratio_level": "token", "entropy_advantage": 0.0,
    "clamp_entropy_factor": False, "entropy_bonus": 0.0, "kl_coef": 0.0, "kl_estimator": "k3",
    "aggregation": "token-mean", "importance_cap": None,
}  # fmt: skip
PAPERS: dict[str, dict[str, Any]] = {
    # arXiv 2510.14545: gradients beyond the upper bound kept, a = 0.2; dual clip 3 as in its code (verl's default).
    "aepo": {"clip": "aepo", "dual_clip": 3.0, "entropy_advantage": 0.2},
    "arpo": {"dual_clip": 3.0},  # arXiv 2507.19849: GRPO on branched rollouts, in the same code
    "grpo": {"aggregation": "seq-mean-token-mean"},  # arXiv 2402.03300, equation 3: 1/|o_i| in the sum over paths
    "dapo": {"eps_high": 0.28},  # arXiv 2503.14476, section 4.1: 0.2 and 0.28, token-level loss
    "cispo": {"clip": "cispo", "eps_low": 1.0, "eps_high": 4.0},  # arXiv 2506.13585: no lower bound, the upper is tuned
    "gppo": {"clip": "gppo"},  # arXiv 2508.07629: gradients kept beyond both bounds
    # arXiv 2507.18071, section 5.1: 3e-4 and 4e-4, equation 5: a mean over paths
    "gspo": {"ratio_level": "sequence", "aggregation": "seq-mean-token-mean", "eps_low": 3e-4, "eps_high": 4e-4},
    "gigpo": {},  # arXiv 2505.10978: the advantages alone
    "reinforce++": {},  # arXiv 2501.03262: the advantages alone
}
ADVANTAGES: dict[str, dict[str, Any]] = {
    # arXiv 2503.14476: equal groups filtered (3.2), a fifth of the longest answer as the buffer (3.4; of 320 tokens)
    "dapo": {"drop_equal_groups": True, "overlong_buffer": 64},
    "gigpo": {"kind": "gigpo"},  # arXiv 2505.10978, equation 8: omega = 1; gamma 0.95 as in its code
    "reinforce++": {"kind": "batch"},  # arXiv 2501.03262, equation 7: normalised over the batch
}


def objective_of(preset: str, **changes: Any) -> PolicyObjective:
    return PolicyObjective(**{**COMMON, **PAPERS[preset], **changes})


def test_presets_have_the_numbers_of_the_papers() -> None:
    assert set(PAPERS) == set(PRESETS)
    assert {field.name for field in dataclasses.fields(PolicyObjective)} == set(COMMON) == set(OBJECTIVE_KEYS)
    for preset in PAPERS:
        made = dataclasses.asdict(PolicyObjective.preset(preset))  # type: ignore[arg-type]
        assert made == {**COMMON, **PAPERS[preset]}, preset
        found = dataclasses.asdict(advantage_settings(PolicyConfig(preset=preset)))  # type: ignore[arg-type]
        common = {"own": None, "kind": "group", "drop_equal_groups": False, "overlong_buffer": 0}
        steps = {"step_weight": 1.0, "step_discount": 0.95}
        assert found == {**common, **steps, **ADVANTAGES.get(preset, {})}, preset


def assert_equal(got: tuple[float, torch.Tensor], truth: tuple[float, torch.Tensor]) -> None:
    """Both in float64: a few thousand roundings of 1e-16."""
    assert got[0] == pytest.approx(truth[0], rel=1e-10)
    assert truth[1].abs().max() > 1e-4
    assert (got[1] - truth[1]).abs().max() < 1e-10 * truth[1].abs().max()


def assert_different(one: torch.Tensor, other: torch.Tensor) -> None:
    """Else a case would show nothing."""
    assert (one - other).abs().max() > 1e-2 * one.abs().max()


@pytest.mark.parametrize("old_logprobs", ["engine", "recompute"])
@pytest.mark.parametrize("preset", PAPERS)
def test_the_loss_of_every_preset_at_temperature_0_7_with_every_term(preset: str, old_logprobs: str) -> None:
    recompute = old_logprobs == "recompute"
    changes: dict[str, Any] = {"kl_coef": 0.1, "entropy_bonus": 0.01}
    if recompute:
        changes["importance_cap"] = 1.1
    settings = [f"policy.{name}={value}" for name, value in {"preset": preset, **changes}.items()]
    loss, gradient, parts = learned(config_of(f"policy.old_logprobs={old_logprobs}", *settings))
    assert len(parts) > 3
    assert_equal((loss, gradient), expected(objective_of(preset, **changes), recompute=recompute))


# name: settings that it needs beside it, and a value of its own
OBJECTIVE_CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "clip": ({}, "gppo"),
    "eps_low": ({"clip": "gppo"}, 0.05),
    "eps_high": ({}, 0.05),
    "dual_clip": ({}, 1.3),
    "ratio_level": ({}, "sequence"),
    "entropy_advantage": ({}, 0.7),
    "clamp_entropy_factor": ({"entropy_advantage": 0.9}, True),
    "entropy_bonus": ({}, 0.03),
    "kl_coef": ({}, 0.3),
    "kl_estimator": ({"kl_coef": 0.3}, "k1"),
    "aggregation": ({}, "constant"),
    "importance_cap": ({"old_logprobs": "recompute"}, 1.1),
}


@pytest.mark.parametrize("name", OBJECTIVE_CASES)
def test_a_setting_of_the_objective_reaches_the_loss(name: str) -> None:
    needed, value = OBJECTIVE_CASES[name]
    before, after = needed, {**needed, name: value}
    recompute = needed.get("old_logprobs") == "recompute"
    truths = []
    for chosen in (before, after):
        loss, gradient, _ = learned(config_of(*[f"policy.{key}={value}" for key, value in chosen.items()]))
        fields = {key: value for key, value in chosen.items() if key != "old_logprobs"}
        truths.append(expected(objective_of("aepo", **fields), recompute=recompute))
        assert_equal((loss, gradient), truths[-1])
    assert_different(truths[0][1], truths[1][1])


def test_preset_reaches_the_loss() -> None:
    loss, gradient, _ = learned(config_of("policy.preset=gspo"))
    assert_equal((loss, gradient), expected(objective_of("gspo")))


def test_old_logprobs_reaches_the_loss() -> None:
    loss, gradient, _ = learned(config_of("policy.old_logprobs=recompute"))
    assert_equal((loss, gradient), expected(objective_of("aepo"), recompute=True))
    assert_different(gradient, expected(objective_of("aepo"))[1])


def test_entropy_stats_reaches_the_loss() -> None:
    loss, gradient, parts = learned(config_of("policy.entropy_stats=micro_batch", "train.tokens_per_microbatch=60"))
    assert_equal((loss, gradient), expected(objective_of("aepo"), parts=parts))
    assert_different(gradient, expected(objective_of("aepo"))[1])


def own_loss(logprobs, entropy, batch):
    """PPO's without bounds, and half a squared distance from the reference where there is one."""
    terms = -(logprobs - batch.old_logprobs).exp() * batch.advantages
    if batch.ref_logprobs is not None:
        terms = terms + 0.3 * (logprobs - batch.ref_logprobs) ** 2 / 2
    return terms.sum() / batch.tokens


@pytest.mark.parametrize("reference", [False, True])
def test_loss_and_reference_reach_the_loss(reference: bool) -> None:
    chosen = config_of("policy.loss=test_policy_settings:own_loss", f"policy.reference={str(reference).lower()}")
    loss, gradient, _ = learned(chosen)
    unbounded = {"eps_low": 1.0, "eps_high": 1e9, "kl_estimator": "k2", "kl_coef": 0.3 if reference else 0.0}
    assert_equal((loss, gradient), expected(objective_of("gigpo", **unbounded)))


def captured(directory: Path, *settings: str) -> tuple[list[Sample], list[ScoredTree], Any]:
    """What one real step of a Trainer trains on, and the rewards that it comes from."""
    trainer = trainer_for(directory / "run", "rollout.max_tokens=40", "rollout.paths=6", *settings)
    packed: list[Sample] = []
    scored: list[ScoredTree] = []
    pack, score = trainer.learner.pack, trainer.scorer.score

    def pack_seen(scored: Sequence[ScoredTree]) -> Batch:
        batch = pack(scored)
        packed.extend(batch.samples)
        return batch

    def score_seen(trees: Any) -> list[ScoredTree]:
        scored.extend(score(trees))
        return scored

    trainer.learner.pack = pack_seen  # type: ignore[method-assign]
    trainer.scorer.score = score_seen  # type: ignore[method-assign]
    trainer.train_step()
    trainer.log.close("finished")
    return packed, scored, trainer


def normalised(values: Sequence[float]) -> list[float]:
    if len(values) < 2 or len(set(values)) == 1:
        return [0.0] * len(values)
    mean, std = statistics.fmean(values), statistics.stdev(values)
    return [(value - mean) / std for value in values]


def advantages_by_hand(
    scored: Sequence[ScoredTree],
    *,
    kind: str = "group",
    drop: bool = False,
    buffer: int = 0,
    weight: float = 1.0,
    discount: float = 0.95,
    max_tokens: int = 40,
) -> dict[tuple[int, int], list[float]]:
    """Of every model segment of every path that is trained, by (question, path): from the trees themselves."""
    shaped: list[list[float]] = []
    segments: list[list[list[tuple[Any, float]]]] = []  # of each path: (what stands before a segment, its return)
    for one in scored:
        rewards, steps = [], []
        for path, reward in zip(one.tree.paths, one.rewards, strict=True):
            nodes, at = [], path.leaf
            while at is not None:
                nodes.append(one.tree.nodes[at])
                at = one.tree.nodes[at].parent
            nodes.reverse()
            length = sum(len(node.token_ids) for node in nodes[1:])
            over = length - (max_tokens - buffer)
            rewards.append(reward.total - (min(max(over, 0) / buffer, 1.0) if buffer else 0.0))
            before = [a.token_ids for a, b in itertools.pairwise(nodes) if b.source == "model"]
            steps.append([(anchor, rewards[-1] * discount ** (len(before) - 1 - i)) for i, anchor in enumerate(before)])
        shaped.append(rewards)
        segments.append(steps)
    flat = iter(normalised([reward for rewards in shaped for reward in rewards]))
    found = {}
    for q, rewards in enumerate(shaped):
        per_path = [next(flat) for _ in rewards] if kind == "batch" else normalised(rewards)
        groups = defaultdict(list)
        for steps in segments[q]:
            for anchor, value in steps:
                groups[anchor].append(value)
        of_step = {anchor: iter(normalised(values)) for anchor, values in groups.items()}
        for j, steps in enumerate(segments[q]):
            bonus = [weight * next(of_step[anchor]) if kind == "gigpo" else 0.0 for anchor, _ in steps]
            if not (drop and len(set(rewards)) == 1):
                found[q, j] = [per_path[j] + one for one in bonus]
    return found


# name: settings that it needs beside it, what the oracle calls them, a value of its own, and the oracle's
ADVANTAGE_CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], str, dict[str, Any]]] = {
    "advantage": ((), {}, "batch", {"kind": "batch"}),
    "drop_equal_groups": ((), {}, "true", {"drop": True}),
    "overlong_buffer": ((), {}, "30", {"buffer": 30}),
    "step_weight": (("policy.preset=gigpo",), {"kind": "gigpo"}, "0.3", {"weight": 0.3}),
    "step_discount": (("policy.preset=gigpo",), {"kind": "gigpo"}, "0.5", {"discount": 0.5}),
}


@pytest.mark.parametrize("name", ADVANTAGE_CASES)
def test_a_setting_of_the_advantages_reaches_them(tmp_path: Path, name: str) -> None:
    needed, known, value, changed = ADVANTAGE_CASES[name]
    truths = []
    for part, settings, choice in (
        ("before", needed, known),
        ("after", (*needed, f"policy.{name}={value}"), {**known, **changed}),
    ):
        samples, scored, _ = captured(tmp_path / part, *settings)
        truths.append(advantages_by_hand(scored, **choice))
        assert [(sample.question, sample.path) for sample in samples] == list(truths[-1])
        for sample in samples:
            truth = truths[-1][sample.question, sample.path]
            wanted = [truth[step] if step >= 0 else 0.0 for step in sample.trajectory.steps]
            assert list(sample.advantages) == pytest.approx(wanted, abs=1e-9)
    assert truths[0] != truths[1], "the case shows nothing"


OTHER_CASES = {
    "preset": test_preset_reaches_the_loss,
    "loss": test_loss_and_reference_reach_the_loss,
    "reference": test_loss_and_reference_reach_the_loss,
    "entropy_stats": test_entropy_stats_reaches_the_loss,
    "old_logprobs": test_old_logprobs_reaches_the_loss,
}


def test_every_setting_of_policy_has_its_case() -> None:
    """A new setting needs one here."""
    settings = [field.name for field in dataclasses.fields(PolicyConfig)]
    assert sorted(settings) == sorted([*OBJECTIVE_CASES, *ADVANTAGE_CASES, *OTHER_CASES])


def test_the_step_at_hand_reaches_every_rule() -> None:
    batch = batch_of(NEW, SAMPLES, recompute=False)
    ratio, good = (batch.logprobs - batch.old_logprobs).exp(), batch.advantages > 0
    counts = [
        int(where.sum()) for where in (ratio[good] > 1.2, ratio[good] < 0.8, ratio[~good] > 1.3, ratio[~good] < 0.8)
    ]
    assert min(counts) >= 5, counts
    recomputed = batch_of(NEW, SAMPLES, recompute=True)
    weight = (recomputed.old_logprobs - recomputed.rollout_logprobs).exp()
    assert 5 <= int((weight > 1.1).sum()) < len(weight) - 5
