"""Over how many paths do branches spread, under ARPO and under AEPO, and what does the penalty do to it?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import torch

from aepo.config import Config, RolloutConfig
from aepo.evaluation import sampled_questions
from aepo.load import load_agent, load_model
from aepo.models.language_model import LanguageModel
from aepo.rollout.engines.huggingface.engine import HuggingFaceEngine
from aepo.rollout.sampler import Player, Sampler
from aepo.rollout.tree import branches_per_path, path_nodes
from aepo.types import Question, RolloutTree
from benchmarks.proofs.agent import RandomPlayer, Search, questions, random_agent
from benchmarks.proofs.result import Cell, Progress, Proof, Table, silent

PATHS = 16  # as in the paper, and half of them fresh
SHORT = RolloutConfig(paths=PATHS, max_tokens=192, max_segment_tokens=48)  # the demo's
LONG = RolloutConfig(paths=PATHS, max_tokens=600, max_segment_tokens=64, max_tool_calls=8)
PENALTIES = (0.0, 0.05, 0.1, 0.2, 0.5)
COLUMNS = {
    "branches / question": ".1f",
    "paths that branch": ".1f",
    "on the busiest path": ".1%",
    "on the busiest 3": ".1%",
    "on the first path": ".1%",
    "questions with <= 3": ".0%",
    "longest run": ".2f",
}


def prove(*, count: int = 24, sweep: int = 12, progress: Progress = silent) -> Proof:
    """`count` questions per rule, `sweep` per penalty."""
    torch.set_num_threads(1)  # the models are too small for more
    progress("loading the demo's agent (trained for a minute the first time)")
    config, random_model = Config(), random_agent()
    demo = load_model(config.model, config.warm_start)
    with closing(load_agent(config, demo)) as agent:
        return compare(
            [
                ("demo, 1 call", demo, agent, SHORT, sampled_questions(agent.task.heldout, count)),
                ("random, 8 calls", random_model, RandomPlayer(random_model, Search()), LONG, questions(count)),
            ],
            sweep,
            progress,
        )


Case = tuple[str, LanguageModel, Player, RolloutConfig, Sequence[Question]]


def compare(cases: Sequence[Case], sweep: int, progress: Progress = silent) -> Proof:
    """cases: models with their agents, limits and questions; the last one is swept over penalties."""
    rules: list[list[Cell]] = []
    penalties: list[list[Cell]] = []
    calls = []
    for name, model, agent, limits, asked in cases:
        half = limits.paths // 2
        for rule, fresh, penalty in (("ARPO", half, 0.0), ("ARPO + penalty", half, 0.05), ("AEPO", None, 0.05)):
            progress(f"{name}: {rule}")
            trees = grow(model, agent, replace(limits, fresh_paths=fresh, branch_penalty=penalty), asked)
            rules.append([name, rule, *shares(trees)])
        calls.append(f"{name.partition(',')[0]} {calls_per_path(trees):.1f}")
    name, model, agent, limits, asked = cases[-1]
    for alpha in ("uniform", 0.5):
        for penalty in PENALTIES:
            progress(f"{name}: alpha {alpha}, penalty {penalty}")
            config = replace(limits, fresh_paths=2, branch_alpha=alpha, branch_penalty=penalty)
            penalties.append([f"{alpha}", f"{penalty}", *shares(grow(model, agent, config, asked[:sweep]))])
    return Proof(
        claim="Which paths branch, under both rules: the paper reports 93.4% of ARPO's branches on 1 to 3 paths.",
        checked=f"{cases[0][3].paths} distinct paths for every question; tool calls per path: {', '.join(calls)}",
        tables=[
            Table(
                f"Branches over paths, k = {cases[0][3].paths}",
                {"agent": "", "rule": "", **COLUMNS},
                rules,
                f"ARPO: {half} paths start fresh, no penalty; then with AEPO's penalty, 0.05; AEPO: pre-monitoring "
                "decides how many start fresh. Shares are of all branches: those of each question's busiest path, "
                "of its busiest three, and of its first path, the one that goes ahead alone in pre-monitoring. "
                "Questions with <= 3: of those that branch, the ones whose branches left 3 paths or fewer. Longest "
                "run: most branches in a row, mean over questions. "
                "Eight branches spread evenly over 8 paths have 12.5% on one and 37.5% on three.",
            ),
            Table(
                f"The same over branch_penalty: {name}, 2 fresh paths, {min(sweep, len(asked))} questions",
                {"branch_alpha": "", "branch_penalty": "", **COLUMNS},
                penalties,
            ),
        ],
    )


def grow(model: LanguageModel, agent: Player, config: RolloutConfig, asked: Sequence[Question]) -> list[RolloutTree]:
    """In lock-step, as the published code does and so that the numbers can be repeated."""
    engine = HuggingFaceEngine(model.model, model.tokenizer, model.eos_ids)
    return Sampler(engine, agent, config).rollout(asked, seed=0)


def shares(trees: Sequence[RolloutTree]) -> list[Cell]:
    """The cells of COLUMNS."""
    counts = [branches_per_path(tree) for tree in trees]
    ordered = [sorted(count, reverse=True) for count in counts]
    total = sum(map(sum, counts))
    branching = [sum(1 for n in count if n) for count in counts]
    if total == 0:
        return [0, 0, None, None, None, None, 0]
    return [
        total / len(trees),
        statistics.mean(branching),
        sum(count[0] for count in ordered) / total,
        sum(sum(count[:3]) for count in ordered) / total,
        sum(count[0] for count in counts) / total,
        statistics.mean(number <= 3 for number in branching if number),
        statistics.mean(longest_run(tree) for tree in trees),
    ]


def longest_run(tree: RolloutTree) -> int:
    """Branches in a row on one path; a branch inherits its parent's."""
    return max((decision.consecutive + 1 for decision in tree.decisions if decision.branched), default=0)


def calls_per_path(trees: Sequence[RolloutTree]) -> float:
    return statistics.mean(
        sum(node.source == "tool" for node in path_nodes(tree, path.id)) for tree in trees for path in tree.paths
    )
