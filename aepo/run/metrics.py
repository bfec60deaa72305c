"""What a step or an evaluation looked like, as flat dotted keys: pure functions of its trees, rewards and losses.

`docs/trainer.md` lists the keys. A value that does not exist in a step (no tool was called, nothing was trained) is
None. Keys that start with seconds, memory or tools.seconds, and tokens.*per_second, are measurements; all others are
functions of configuration and seed.
"""

from __future__ import annotations

import math
import resource
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import get_args

import torch

from aepo.advantages import all_equal
from aepo.learning.batch import Batch
from aepo.rollout.tree import branches_per_path, path_nodes
from aepo.run.records import Record
from aepo.types import ErrorKind, FinishReason, RolloutTree, ScoredTree

FINISH_REASONS = get_args(FinishReason)
TOOL_FAILURES = get_args(ErrorKind)
KERNEL_METRICS = {
    "clip_fraction_high": "policy.clip_high",
    "clip_fraction_low": "policy.clip_low",
    "dual_clip_fraction": "policy.dual_clip",
    "ratio_mean": "policy.ratio_mean",
    "approx_kl": "policy.approx_kl",
    "entropy_mean": "policy.entropy",
    "kl": "policy.kl",
}


def rollout_metrics(scored: Sequence[ScoredTree]) -> Record:
    """Of a rollout batch."""
    trees = [one.tree for one in scored]
    flat = [reward for one in scored for reward in one.rewards]
    totals = [reward.total for reward in flat]
    branches = Counter(count for tree in trees for count in branches_per_path(tree))
    finished: Counter[str] = Counter(path.finish_reason for tree in trees for path in tree.paths)
    fresh = [sum(path.parent is None for path in tree.paths) for tree in trees]
    tool_entropies = [tree.budget.tool_entropy for tree in trees if tree.budget]
    path_tokens = [
        sum(len(node.token_ids) for node in path_nodes(tree, path.id) if node.source == "model")
        for tree in trees
        for path in tree.paths
    ]
    return {
        "reward.mean": _mean(totals),
        "reward.std": statistics.pstdev(totals),
        **_means("reward", ((name, value) for reward in flat for name, value in reward.components.items())),
        **_success("train.success", scored),
        "advantage.zero_groups": _mean([all_equal([reward.total for reward in one.rewards]) for one in scored]),
        "rollout.paths": len(flat),
        "rollout.fresh_paths": _mean(fresh),
        "rollout.budget": _mean([tree.budget.fresh_paths for tree in trees if tree.budget]),
        "rollout.branches_per_path": [branches[count] for count in range(max(branches, default=0) + 1)],
        "rollout.root_entropy": _mean([tree.budget.root_entropy for tree in trees if tree.budget]),
        "rollout.tool_entropy": _mean([entropy for entropy in tool_entropies if entropy is not None]),
        "rollout.branch_probability": _mean([d.probability for tree in trees for d in tree.decisions]),
        "rollout.refused_branches": sum(d.refused for tree in trees for d in tree.decisions),
        **{f"rollout.finish.{reason}": finished[reason] / len(flat) for reason in FINISH_REASONS},
        **tool_metrics(trees),
        "rollout.path_tokens": _mean(path_tokens),
        "tokens.generated": _generated(trees),
    }


def tool_metrics(trees: Sequence[RolloutTree]) -> Record:
    """Calls and failures. A result that several paths share is one call."""
    nodes = [node for tree in trees for node in tree.nodes]
    results = [result for node in nodes for result in node.results]
    failures: Counter[str] = Counter(result.error for result in results if result.error)
    calls = Counter(call.tool for node in nodes for call in node.calls if call.tool)
    return {
        "tools.calls": len(results),
        **{f"tools.calls.{tool}": calls[tool] for tool in sorted(calls)},
        "tools.failures": failures.total(),
        **{f"tools.failures.{kind}": failures[kind] for kind in TOOL_FAILURES},
        "tools.seconds": sum(result.seconds for result in results),
    }


def loss_metrics(steps: Sequence[Sequence[dict[str, float]]]) -> Record:
    """Of all micro-batches of all optimiser steps of a rollout batch, from the kernel's metrics.

    The loss is summed within an optimiser step and averaged over them; means are over tokens; the entropy's standard
    deviation is merged from (count, mean, M2). What a loss of the user's own measured, policy.<name>, is averaged over
    the tokens of the micro-batches that have it.
    """
    parts = [part for step in steps for part in step]
    tokens = sum(part["valid_tokens"] for part in parts)

    def token_mean(name: str) -> float | None:
        having = [part for part in parts if name in part]
        if not tokens or not having:
            return None
        return sum(part[name] * part["valid_tokens"] for part in having) / sum(part["valid_tokens"] for part in having)

    mean = token_mean("entropy_mean")
    squares = sum(
        part["entropy_std"] ** 2 * (part["valid_tokens"] - 1)
        + (part["entropy_mean"] - mean) ** 2 * part["valid_tokens"]
        for part in parts
        if mean is not None
    )
    return {
        "policy.loss": _mean([sum(part["loss"] for part in step) for step in steps if step]),
        **{key: token_mean(name) for name, key in KERNEL_METRICS.items()},
        "policy.entropy_std": math.sqrt(squares / (tokens - 1)) if tokens > 1 else None,
        "policy.ratio_max": max((part["ratio_max"] for part in parts), default=None),
        "policy.advantage_flips": sum(part.get("advantage_flips", 0) for part in parts),
        "tokens.trained": int(tokens),
        **{name: token_mean(name) for name in sorted({n for part in parts for n in part if n.startswith("policy.")})},
    }


def mismatch_metrics(batch: Batch) -> Record:
    """How far the engine's log-probs are from the trainer's under the same weights, over the trained tokens: k3
    estimate of KL(engine || trainer), and the largest difference, both in nats."""
    differences = [rows.old_logprobs - rows.rollout_logprobs for rows in batch.micro_batches()]
    if not differences:
        return {"policy.mismatch_kl": None, "policy.mismatch_max": None}
    difference = torch.cat(differences).double()
    return {
        "policy.mismatch_kl": (difference.expm1() - difference).mean().item(),
        "policy.mismatch_max": difference.abs().max().item(),
    }


def memory_metrics() -> Record:
    """Peaks since the process started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rss_mib = peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    gpu_mib = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
    return {"memory.peak_rss_mib": rss_mib, "memory.peak_gpu_mib": gpu_mib}


def _generated(trees: Sequence[RolloutTree]) -> int:
    """Tokens that were sampled; those of a shared prefix count once."""
    return sum(len(node.token_ids) for tree in trees for node in tree.nodes if node.source == "model")


def _success(prefix: str, scored: Sequence[ScoredTree]) -> Record:
    """Of all paths, and of those of each kind of question that has a name."""
    kinds = ((one.tree.question.kind, reward.success) for one in scored for reward in one.rewards)
    return {
        prefix: _mean([reward.success for one in scored for reward in one.rewards]),
        **_means(prefix, ((kind, success) for kind, success in kinds if kind)),
    }


def _means(prefix: str, pairs: Iterable[tuple[str, float]]) -> Record:
    values = defaultdict(list)
    for name, value in pairs:
        values[name].append(value)
    return {f"{prefix}.{name}": _mean(values[name]) for name in sorted(values)}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
