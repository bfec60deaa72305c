"""How long does a rollout take whose tools take their time: every path by itself, and all in lock-step?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from aepo.config import RolloutConfig
from aepo.models.language_model import LanguageModel
from aepo.rollout.engines.vllm.engine import VLLMEngine
from aepo.rollout.sampler import Sampler
from aepo.rollout.tree import path_nodes
from aepo.types import RolloutTree
from benchmarks.proofs.agent import RandomPlayer, Search, questions, random_agent
from benchmarks.proofs.engines import Watched, launched
from benchmarks.proofs.prefix_cache import SETTINGS
from benchmarks.proofs.result import Cell, Progress, Proof, Table, require, silent

BASE = RolloutConfig(paths=8, max_tokens=400, max_segment_tokens=64, max_tool_calls=3)
RULES = {"all fresh": replace(BASE, fresh_paths=8), "AEPO": BASE}
# Trees of both schedules have the same tokens but for a draw that lies on a boundary to the last bits of float32.
SAME = 0.95


@dataclass(frozen=True)
class Run:
    trees: Sequence[RolloutTree]
    wall: float  # seconds
    busy: float  # seconds with requests running
    tools: float  # seconds of all calls
    tokens: int

    @property
    def longest_path(self) -> float:
        """Seconds of tools on the path that has the most: no schedule is faster."""
        return max(
            sum(result.seconds for node in path_nodes(tree, path.id) for result in node.results)
            for tree in self.trees
            for path in tree.paths
        )


def prove(
    *, count: int = 8, rounds: int = 3, median: float = 0.3, p95: float = 2.0, progress: Progress = silent
) -> Proof:
    """Delays of tools in seconds. ProofError: the schedules sample other tokens."""
    progress("starting an engine")
    agent = random_agent()
    with launched(agent, SETTINGS, [True]) as (engine,):
        return compare(agent, engine, count, rounds, median, p95, progress)


def compare(
    agent: LanguageModel,
    engine: VLLMEngine,
    count: int,
    rounds: int,
    median: float,
    p95: float,
    progress: Progress = silent,
) -> Proof:
    Sampler(engine, RandomPlayer(agent, Search()), BASE).rollout(questions(1), seed=-1)
    runs: dict[tuple[str, bool], list[Run]] = {}
    for index in range(rounds):
        for rule, config in RULES.items():
            for lockstep in (True, False) if index % 2 == 0 else (False, True):  # the second finds prompts in the cache
                progress(f"round {index + 1} of {rounds}: {rule}, {'lock-step' if lockstep else 'asynchronous'}")
                tools = Search(median, p95, seed=index)
                run = roll(agent, engine, tools, config, count, seed=index, lockstep=lockstep)
                runs.setdefault((rule, lockstep), []).append(run)
    pairs = zip(runs["all fresh", True], runs["all fresh", False], strict=True)
    same = statistics.mean(same_paths(one.trees, other.trees) for one, other in pairs)
    require(same >= SAME, f"{same:.1%} of the paths have the same tokens in both schedules, expected {SAME:.0%}")
    rows: list[list[Cell]] = []
    for (rule, lockstep), taken in runs.items():
        wall = statistics.median(run.wall for run in taken)
        means = [statistics.mean(getattr(run, name) for run in taken) for name in ("tokens", "tools", "longest_path")]
        busy = statistics.median(run.busy / run.wall for run in taken)
        ratios = [slow.wall / run.wall for slow, run in zip(runs[rule, True], taken, strict=True)]
        schedule, faster = ("lock-step", None) if lockstep else ("asynchronous", statistics.median(ratios))
        rows.append([rule, schedule, wall, faster, busy, *means])
    columns = {"paths": "", "schedule": "", "seconds": ".1f", "times faster": ".2f", "engine in use": ".0%"}
    columns |= {"tokens": ",.0f", "tool seconds, all": ",.0f", "tool seconds, longest path": ".1f"}
    return Proof(
        claim="No path waits for the tool of another one.",
        checked=f"with all paths fresh, {same:.1%} of them have the same tokens in both schedules",
        tables=[
            Table(
                f"A rollout with slow tools: {count} questions, {BASE.paths} paths each",
                columns,
                rows,
                f"Medians of {rounds} seeds (means for the last three columns). A call takes lognormal time, median "
                f"{median:g} s, 95th percentile {p95:g} s, the same in both schedules: it depends on the call alone. "
                "Lock-step: the next segments start when all tools have answered, as in the published code; same "
                "engine. Where paths branch the order in time decides who gets the room, so trees differ.",
            )
        ],
    )


def roll(
    agent: LanguageModel,
    engine: VLLMEngine,
    tools: Search,
    config: RolloutConfig,
    count: int,
    *,
    seed: int,
    lockstep: bool,
) -> Run:
    watched = Watched(engine, lockstep=lockstep)
    before, start = engine.counters.generated, time.perf_counter()
    trees = Sampler(watched, RandomPlayer(agent, tools), config).rollout(questions(count), seed=seed)
    wall = time.perf_counter() - start
    return Run(trees, wall, watched.busy_seconds, tools.seconds, engine.counters.generated - before)


def same_paths(one: Sequence[RolloutTree], other: Sequence[RolloutTree]) -> float:
    """Part of the paths that have the same tokens. Fresh paths have the same ids in both."""
    equal = [
        [node.token_ids for node in path_nodes(a, path.id)] == [node.token_ids for node in path_nodes(b, path.id)]
        for a, b in zip(one, other, strict=True)
        for path in a.paths
    ]
    return sum(equal) / len(equal)
