"""Metrics of a hand-made batch, merged kernel metrics, and the files of a run directory."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainer_toys import random_samples, tiny_model

from aepo.config import Config, PolicyConfig
from aepo.loss import microbatch_loss, policy_objective, with_old_policy
from aepo.metrics import StageClock, finite, loss_metrics, mismatch_metrics, rollout_metrics
from aepo.packing import microbatches, pack
from aepo.run_directory import RunDirectory
from aepo.run_log import RunLog
from aepo.saved_trees import token_texts
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


def tool_node(id: int, parent: int, error: str | None) -> Node:
    return Node(id, parent, "tool", (9, 9), calls=(ToolCall("search", {}),), results=(ToolResult("y", error, 0.25),))


def batch() -> list[ScoredTree]:
    """Two questions with two paths: the first tree branches at its tool result, the second has two fresh paths."""
    branched = RolloutTree(
        Question("a", "?", "1", "area"),
        (
            Node(0, None, "prompt", (1, 2)),
            model_node(1, 0, 3),
            tool_node(2, 1, None),
            model_node(3, 2, 2),
            model_node(4, 2, 5),
        ),
        (TreePath(0, 3, None, None, "answered"), TreePath(1, 4, 0, 2, "length")),
        (BranchDecision(0, 2, 0.5, 0.1, 0.6, 0, 0.8, True),),
        BudgetDecision(1.0, 0.6, 1),
    )
    fresh = RolloutTree(
        Question("b", "?", "1", "city"),
        (
            Node(0, None, "prompt", (1,)),
            model_node(1, 0, 1),
            tool_node(2, 1, "timeout"),
            model_node(3, 2, 1),
            model_node(4, 0, 4),
        ),
        (TreePath(0, 3, None, None, "answered"), TreePath(1, 4, None, None, "eos")),
        (BranchDecision(0, 2, 0.5, 0.1, 0.2, 0, 0.4, False),),
        BudgetDecision(2.0, None, 2),
    )
    good, bad = Reward(1.0, {"format": 1.0}, True), Reward(0.0, {"format": 0.5}, False)
    return [ScoredTree(branched, (good, bad)), ScoredTree(fresh, (bad, bad))]


def test_rollout_metrics_by_hand() -> None:
    record = rollout_metrics(batch())
    expected = {
        "reward.mean": 0.25,
        "reward.std": math.sqrt(3) / 4,
        "reward.format": 0.625,
        "train.success": 0.25,
        "train.success.area": 0.5,
        "train.success.city": 0.0,
        "advantage.zero_groups": 0.5,
        "rollout.paths": 4,
        "rollout.fresh_paths": 1.5,
        "rollout.budget": 1.5,
        "rollout.branches_per_path": [3, 1],
        "rollout.root_entropy": 1.5,
        "rollout.tool_entropy": 0.6,
        "rollout.branch_probability": pytest.approx(0.6),
        "rollout.refused_branches": 0,
        "rollout.finish.answered": 0.5,
        "rollout.finish.eos": 0.25,
        "rollout.finish.length": 0.25,
        "rollout.finish.tool_limit": 0.0,
        "rollout.path_tokens": (5 + 8 + 2 + 4) / 4,
        "tools.calls": 2,
        "tools.calls.search": 2,
        "tools.failures": 1,
        "tools.failures.timeout": 1,
        "tools.failures.raised": 0,
        "tools.seconds": 0.5,
        "tokens.generated": 3 + 2 + 5 + 1 + 1 + 4,  # the shared first segment once
    }
    assert {key: record[key] for key in expected} == expected


def test_merged_micro_batches_have_the_metrics_of_the_whole_batch() -> None:
    model, samples = tiny_model(), random_samples(10)
    objective = policy_objective(PolicyConfig(preset="aepo"))

    def metrics(tokens: int) -> dict:
        parts = [pack(part, dtype=torch.float64) for part in microbatches(samples, tokens)]
        trained = sum(part.trained_tokens for part in parts)
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


def test_mismatch_is_zero_for_an_exact_engine_and_finds_a_wrong_one() -> None:
    model = tiny_model()
    exact = with_old_policy(model, pack(random_samples(4), dtype=torch.float64), 1.0)
    same = replace(exact, rollout_logprobs=exact.old_logprobs)
    assert mismatch_metrics([same]) == {"policy.mismatch_kl": 0.0, "policy.mismatch_max": 0.0}
    shifted = replace(exact, rollout_logprobs=exact.old_logprobs - 0.1)
    record = mismatch_metrics([shifted])
    assert record["policy.mismatch_max"] == pytest.approx(0.1)
    assert record["policy.mismatch_kl"] == pytest.approx(math.expm1(0.1) - 0.1)


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

    log = RunLog(RunDirectory.claim(tmp_path / "run", resume=False), config, {}, 0, resumed=False)
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
