"""Metrics of a hand-made batch, merged kernel metrics, and the files of a run directory."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainer_toys import random_samples, tiny_model

from aepo.config import Config, PolicyConfig
from aepo.learning.batch import Batch
from aepo.learning.loss import microbatch_loss, policy_objective
from aepo.learning.pack_paths import microbatches, pack
from aepo.run.clock import StageClock
from aepo.run.directory import RunDirectory
from aepo.run.log import RunLog
from aepo.run.metrics import (
    loss_metrics,
    memory_metrics,
    mismatch_metrics,
    rollout_metrics,
)
from aepo.run.records import finite
from aepo.run.saved_trees import token_texts
from aepo.types import (
    BranchDecision,
    BudgetDecision,
    Node,
    Question,
    Reward,
    RolloutTree,
    ScoredTree,
    ToolCall,
    ToolResult,
)
from aepo.types import Path as TreePath


def model_node(id: int, parent: int, tokens: int) -> Node:
    return Node(id, parent, "model", tuple(range(tokens)), (-1.0,) * tokens, (0.5,) * tokens, finish_reason="stop")


def tool_node(id: int, parent: int, *called: tuple[str, str | None, float]) -> Node:
    """called: tool, error and seconds of each call."""
    calls = tuple(ToolCall(tool, {}) for tool, _, _ in called)
    return Node(id, parent, "tool", (9, 9), calls=calls, results=tuple(ToolResult("y", *rest) for _, *rest in called))


def decision(probability: float, *, branched: bool = False, refused: bool = False) -> BranchDecision:
    return BranchDecision(0, 2, 0.55, 0.11, 0.22, 3, probability, branched, refused)


def batch() -> list[ScoredTree]:
    """Three questions in which every metric has a value of its own: totals and success part ways, sums and means of
    trees and of paths differ, calls are more than nodes, and the last question has neither kind nor budget."""
    branched = RolloutTree(
        Question("a", "?", "1", "area"),
        (
            Node(0, None, "prompt", (1, 2)),
            model_node(1, 0, 3),
            tool_node(2, 1, ("search", None, 0.25), ("read", "timeout", 1.5)),
            model_node(3, 2, 2),
            model_node(4, 2, 5),
            model_node(5, 2, 7),
        ),
        (
            TreePath(0, 3, None, None, "answered"),
            TreePath(1, 4, 0, 2, "length"),
            TreePath(2, 5, 0, 2, "answered"),
        ),
        (decision(0.8, branched=True), decision(0.7, branched=True)),
        BudgetDecision(1.0, 0.6, 1),
    )
    fresh = RolloutTree(
        Question("b", "?", "1", "city"),
        (
            Node(0, None, "prompt", (1,)),
            model_node(1, 0, 1),
            tool_node(2, 1, ("", "unparsed", 0.0), ("search", "raised", 0.5)),
            model_node(3, 2, 1),
            model_node(4, 0, 4),
        ),
        (TreePath(0, 3, None, None, "answered"), TreePath(1, 4, None, None, "eos")),
        (decision(0.6, refused=True), decision(0.3)),
        BudgetDecision(2.5, None, 2),
    )
    unnamed = RolloutTree(
        Question("c", "?", "1"),
        (
            Node(0, None, "prompt", (1, 2, 3)),
            model_node(1, 0, 6),
            tool_node(2, 1, ("search", "raised", 0.125)),
            model_node(3, 2, 8),
            model_node(4, 2, 9),
        ),
        (TreePath(0, 3, None, None, "length"), TreePath(1, 4, 0, 2, "answered")),
        (decision(0.9, branched=True), decision(0.5, refused=True)),
        None,
    )
    return [
        ScoredTree(
            branched,
            (
                Reward(1.0, {"format": 1.0}, True),
                Reward(0.5, {"format": 0.5, "near": 0.25}, True),
                Reward(0.75, {"format": 1.0}, True),
            ),
        ),
        ScoredTree(fresh, (Reward(0.5, {"format": 0.0, "near": 0.75}, True), Reward(0.5, {"format": 0.0}, False))),
        ScoredTree(unnamed, (Reward(-0.25, {"format": 0.0}, False), Reward(0.0, {"format": 1.0}, False))),
    ]


def test_rollout_metrics_by_hand() -> None:
    totals = (1.0, 0.5, 0.75, 0.5, 0.5, -0.25, 0.0)
    assert rollout_metrics(batch()) == {
        "reward.mean": 3 / 7,
        "reward.std": pytest.approx(math.sqrt(sum((total - 3 / 7) ** 2 for total in totals) / 7)),
        "reward.format": 3.5 / 7,
        "reward.near": 0.5,  # of the paths that have it
        "train.success": 4 / 7,
        "train.success.area": 1.0,
        "train.success.city": 0.5,
        "advantage.zero_groups": 1 / 3,  # b, by totals; by success: a and c
        "rollout.paths": 7,
        "rollout.fresh_paths": 4 / 3,
        "rollout.budget": 1.5,
        "rollout.branches_per_path": [5, 1, 1],
        "rollout.root_entropy": 1.75,
        "rollout.tool_entropy": 0.6,
        "rollout.branch_probability": pytest.approx(3.8 / 6),
        "rollout.refused_branches": 2,  # 3 were made
        "rollout.finish.answered": 4 / 7,
        "rollout.finish.eos": 1 / 7,
        "rollout.finish.length": 2 / 7,
        "rollout.finish.tool_limit": 0.0,
        "rollout.path_tokens": (5 + 8 + 10 + 2 + 4 + 14 + 15) / 7,
        "tools.calls": 5,
        "tools.calls.read": 1,
        "tools.calls.search": 3,
        "tools.failures": 4,
        "tools.failures.unknown_tool": 0,
        "tools.failures.bad_arguments": 0,
        "tools.failures.unparsed": 1,
        "tools.failures.raised": 2,
        "tools.failures.timeout": 1,
        "tools.failures.empty": 0,
        "tools.seconds": 0.25 + 1.5 + 0.5 + 0.125,
        "tokens.generated": (3 + 2 + 5 + 7) + (1 + 1 + 4) + (6 + 8 + 9),  # shared first segments once
    }


def test_loss_metrics_by_hand() -> None:
    """Three micro-batches, of 1 and 3 tokens in the first step and of 4 in the second; a third step was empty."""
    entropies = [2.0], [1.0, 2.0, 6.0], [0.5, 1.5, 2.5, 7.0]
    everything = torch.tensor([entropy for part in entropies for entropy in part], dtype=torch.float64)

    def part(index: int, loss: float, ratio_max: float, **more: float) -> dict[str, float]:
        tokens = torch.tensor(entropies[index], dtype=torch.float64)
        return {
            "loss": loss,
            "valid_tokens": float(len(tokens)),
            "entropy_mean": tokens.mean().item(),
            "entropy_std": tokens.std().item() if len(tokens) > 1 else 0.0,
            "ratio_max": ratio_max,
            "clip_fraction_high": 0.0 + index,
            "clip_fraction_low": 10.0 + index,
            "dual_clip_fraction": 20.0 + index,
            "ratio_mean": 30.0 + index,
            "approx_kl": 40.0 + index,
            **more,
        }

    first = [part(0, 1.0, 1.5, advantage_flips=1.0, kl=0.5), part(1, 2.0, 3.0, **{"policy.own": 4.0, "kl": 0.25})]
    second = [part(2, 5.0, 2.0, advantage_flips=4.0, **{"policy.own": 11.0})]
    index = (0 * 1 + 1 * 3 + 2 * 4) / 8
    assert loss_metrics([first, second, []]) == {
        "policy.loss": 4.0,
        "policy.clip_high": index,
        "policy.clip_low": 10 + index,
        "policy.dual_clip": 20 + index,
        "policy.ratio_mean": 30 + index,
        "policy.approx_kl": 40 + index,
        "policy.entropy": pytest.approx(everything.mean().item()),
        "policy.kl": (0.5 * 1 + 0.25 * 3) / 4,  # of the micro-batches that have it
        "policy.entropy_std": pytest.approx(everything.std().item()),
        "policy.ratio_max": 3.0,
        "policy.advantage_flips": 5.0,
        "policy.own": (4 * 3 + 11 * 4) / 7,
        "tokens.trained": 8,
    }


def test_the_peak_of_memory_is_in_mib() -> None:
    def peak() -> float:
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kib * (1 if sys.platform == "darwin" else 1024) / 1024**2  # bytes there

    before, record, after = peak(), memory_metrics(), peak()
    assert before <= record["memory.peak_rss_mib"] <= after
    assert (record["memory.peak_gpu_mib"] is None) == (not torch.cuda.is_available())


def test_merged_micro_batches_have_the_metrics_of_the_whole_batch() -> None:
    model, samples = tiny_model(), random_samples(10)
    objective = policy_objective(PolicyConfig(preset="aepo"))

    def metrics(tokens: int) -> dict:
        parts = [pack(part, dtype=torch.float64) for part in microbatches(samples, tokens)]
        trained = sum(len(part.rows) for part in parts)
        results = [
            microbatch_loss(model, part, objective, temperature=1.0, denominator=trained, entropy_stats=(3.0, 0.2))
            for part in parts
        ]
        return loss_metrics([[{name: value.item() for name, value in r.metrics.items()} for r in results]])

    whole, cut = metrics(10_000), metrics(20)
    assert whole["policy.clip_high"] > 0
    assert whole["policy.advantage_flips"] > 0
    for key, value in whole.items():
        assert cut[key] == (None if value is None else pytest.approx(value, rel=1e-9)), key


def test_the_loss_is_summed_in_a_step_and_averaged_over_steps() -> None:
    part = {"loss": 1.0, "valid_tokens": 2.0, "ratio_max": 1.0, "entropy_mean": 1.0, "entropy_std": 0.0}
    record = loss_metrics([[part, {**part, "loss": 2.0, "ratio_max": 3.0}], [{**part, "loss": 5.0}]])
    assert (record["policy.loss"], record["policy.ratio_max"], record["tokens.trained"]) == (4.0, 3.0, 6)
    assert loss_metrics([])["policy.loss"] is None


def test_mismatch_is_of_the_trained_tokens_of_all_batches() -> None:
    """The largest difference may be below 0."""
    parts = [pack(part, dtype=torch.float64) for part in (random_samples(1), random_samples(4, seed=1))]
    sizes = [len(part.rows) for part in parts]
    assert sizes[0] != sizes[1]
    shifted = [
        replace(part, old_logprobs=part.rollout_logprobs + by) for part, by in zip(parts, (0.1, -0.3), strict=True)
    ]
    record = mismatch_metrics(Batch((), (), ((shifted[0],), (shifted[1],))))
    assert record["policy.mismatch_max"] == pytest.approx(0.3)
    k3 = [math.expm1(by) - by for by in (0.1, -0.3)]
    assert record["policy.mismatch_kl"] == pytest.approx((k3[0] * sizes[0] + k3[1] * sizes[1]) / sum(sizes))
    same = tuple(replace(part, old_logprobs=part.rollout_logprobs) for part in parts)
    assert mismatch_metrics(Batch((), (), (same,))) == {"policy.mismatch_kl": 0.0, "policy.mismatch_max": 0.0}
    assert mismatch_metrics(Batch((), (), ())) == {"policy.mismatch_kl": None, "policy.mismatch_max": None}


def test_json_has_no_nan() -> None:
    assert finite({"a": math.nan, "b": -math.inf, "c": 1.5, "d": [1]}) == {"a": None, "b": None, "c": 1.5, "d": [1]}


def test_token_texts_join_to_the_text_and_split_characters_wait() -> None:
    tokens = [b"a", "é".encode()[:1], "é".encode()[1:], b"b", "é".encode()[:1]]

    def decode(ids: object) -> str:
        return b"".join(tokens[i] for i in ids).decode("utf-8", "replace")  # type: ignore[attr-defined]

    assert token_texts(range(5), decode) == ["a", "", "é", "b", "\ufffd"]


@pytest.fixture
def config() -> Config:
    return Config()


def test_tensorboard_has_the_same_numbers(tmp_path: Path, config: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(RunDirectory.claim(tmp_path / "run"), config, {}, 0, resumed=False)
    log.step({"step": 1, "reward.mean": 0.25, "tools.calls.search": 3})
    log.evaluation({"step": 1, "success": 0.5})
    log.close("finished")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Scalars("reward/mean")[0].value == 0.25
    assert events.Scalars("tools/calls.search")[0].step == 1
    assert events.Scalars("heldout/success")[0].value == 0.5


def test_speeds_are_tokens_over_the_seconds_beside_them() -> None:
    stages: list[str] = []
    clock = StageClock(stages.append)
    for stage, seconds in (("rollout", 0.01), ("update", 0.02)):
        with clock(stage):
            time.sleep(seconds)
    record = clock.metrics(generated=300, trained=200)
    assert stages == ["rollout", "update"]
    assert record["seconds.step"] >= record["seconds.rollout"] + record["seconds.update"] >= 0.03
    assert record["tokens.per_second"] * record["seconds.step"] == pytest.approx(200)
    assert record["tokens.generated_per_second"] * record["seconds.rollout"] == pytest.approx(300)
