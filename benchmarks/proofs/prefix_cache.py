"""How many tokens does a branched rollout compute, when an engine remembers prefixes and when it does not?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from aepo.config import RolloutConfig, VLLMConfig
from aepo.models.language_model import LanguageModel
from aepo.rollout.engines.vllm.engine import VLLMEngine
from aepo.rollout.sampler import Sampler
from aepo.types import Question
from benchmarks.proofs.agent import RandomPlayer, Search, questions, random_agent
from benchmarks.proofs.engines import launched
from benchmarks.proofs.result import Cell, Progress, Proof, Table, require, silent

BASE = RolloutConfig(paths=8, max_tokens=400, max_segment_tokens=64, max_tool_calls=4)
RULES = {
    "all fresh": replace(BASE, fresh_paths=8),
    "ARPO, 4 fresh": replace(BASE, fresh_paths=4, branch_penalty=0.0),
    "AEPO": BASE,
}
SETTINGS = VLLMConfig(max_num_seqs=64, enforce_eager=True)
WITH, WITHOUT = "with", "without"


def prove(*, count: int = 8, rounds: int = 3, progress: Progress = silent) -> Proof:
    """`count` questions per rollout. ProofError: the engine without a cache found something in it."""
    progress("starting two engines")
    agent = random_agent()
    with launched(agent, SETTINGS, [True, False]) as (cached, uncached):
        return compare(agent, {WITH: cached, WITHOUT: uncached}, count, rounds, progress)


def compare(
    agent: LanguageModel, engines: Mapping[str, VLLMEngine], count: int, rounds: int, progress: Progress = silent
) -> Proof:
    """engines: by the words `with` and `without`."""
    for engine in engines.values():  # what is compiled or allocated once
        Sampler(engine, RandomPlayer(agent, Search()), BASE).rollout(questions(1), seed=-1)
    taken: dict[tuple[str, str], list[dict[str, float]]] = {}
    for index in range(rounds):
        for rule, config in RULES.items():
            for cache, engine in engines.items():
                progress(f"round {index + 1} of {rounds}: {rule}, {cache} prefix cache")
                taken.setdefault((rule, cache), []).append(
                    roll(agent, engine, config, questions(count, f"{rule} {index}"), index)
                )
    rows: list[list[Cell]] = []
    for (rule, cache), runs in taken.items():
        total = {key: sum(run[key] for run in runs) for key in runs[0]}
        saved = 1 - total["prefilled"] / total["asked"]
        require(
            (saved > 0) if cache == WITH else (saved == 0),
            f"{rule}, {cache} prefix cache: {saved:.1%} of the prefix tokens were not computed",
        )
        seconds = statistics.median(run["seconds"] for run in runs)
        tokens = [total[key] / rounds for key in ("asked", "prefilled", "distinct", "generated")]
        rows.append([rule, cache, *tokens, saved, seconds])
    columns = {"paths": "", "prefix cache": "", "prefix tokens asked": ",.0f", "computed": ",.0f", "distinct": ",.0f"}
    columns |= {"generated": ",.0f", "saved": ".1%", "seconds": ".2f"}
    return Proof(
        claim="Branches and segments find their prefix in the engine's cache.",
        checked="the engine without a cache computed every prefix token that it was asked for",
        tables=[
            Table(
                f"Prefix tokens of a rollout: {count} questions, {BASE.paths} paths each",
                columns,
                rows,
                f"Means of {rounds} rollouts, seconds are their median; tools answer at once. Asked: the whole prefix "
                "of every segment. Computed: what went through the model before its first new token. Distinct: tokens "
                "of prompts and tool results, each counted once where paths share it; a cache of whole blocks "
                "(32 tokens on a CPU) comes near, not below, since it keeps no part of a block.",
            )
        ],
    )


def roll(
    agent: LanguageModel, engine: VLLMEngine, config: RolloutConfig, asked: Sequence[Question], seed: int
) -> dict[str, float]:
    """Tokens and seconds of one rollout batch."""
    before, start = replace(engine.counters), time.perf_counter()
    trees = Sampler(engine, RandomPlayer(agent, Search()), config).rollout(asked, seed=seed)
    seconds = time.perf_counter() - start
    after = engine.counters
    return {
        "asked": after.asked - before.asked,
        "prefilled": after.prefilled - before.prefilled,
        "generated": after.generated - before.generated,
        "distinct": sum(len(node.token_ids) for tree in trees for node in tree.nodes if node.source != "model"),
        "seconds": seconds,
    }
