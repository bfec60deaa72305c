"""The sampler's rules on a scripted engine: always k distinct paths, per-path counters, limits, seeds.

The script stands for the model alone; tree, rules and event loop are the real ones.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from rollout_toys import (
    ANSWER,
    SEARCH,
    Characters,
    ScriptedAgent,
    ScriptedEngine,
    ScriptedTools,
    question,
    settings,
    texts,
    tools_then,
)

from aepo.config import RolloutConfig
from aepo.rollout.sampler import Sampler
from aepo.rollout.tree import check_tree, path_nodes
from aepo.types import RolloutTree, ToolResult


def rollout(script, config: RolloutConfig, *, questions: int = 1, seed: int = 0, lockstep: bool = True, tools=None):
    engine = ScriptedEngine(script, lockstep)
    sampler = Sampler(engine, ScriptedAgent(tools or ScriptedTools()), config)
    return sampler.rollout([question(f"q{i}") for i in range(questions)], seed), engine


def one_tree(script, config: RolloutConfig, **arguments) -> RolloutTree:
    return rollout(script, config, **arguments)[0][0]


ENDINGS = {
    "no tool call": (tools_then(0), "answered"),
    "end of text at once": (lambda text, seed: (f"{seed:x}", 1.0, "eos"), "eos"),
    "never ends": (lambda text, seed: ("z" * 10_000, 1.0, "length"), "length"),
    "always calls": (tools_then(10**6), "tool_limit"),
    "calls, then answers": (tools_then(3), "answered"),
    "closes what it never opened": (lambda text, seed: (f"{seed:x}</search>", 1.0, "stop"), "tool_limit"),
}


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("fresh_paths", [None, 1, 3, 5])  # AEPO's budget, fewest, ARPO, GRPO
@pytest.mark.parametrize("ending", list(ENDINGS))
def test_always_exactly_k_distinct_paths(ending: str, fresh_paths: int | None, lockstep: bool) -> None:
    script, reason = ENDINGS[ending]
    config = settings(paths=5, fresh_paths=fresh_paths, max_tool_calls=3)
    trees, _ = rollout(script, config, questions=3, lockstep=lockstep)
    for tree in trees:
        check_tree(tree, 5)
        assert {path.finish_reason for path in tree.paths} == {reason}
        assert len(set(texts(tree))) == 5 or ending == "never ends"  # its text does not depend on the seed
        if fresh_paths == 5:
            assert all(path.parent is None for path in tree.paths)


@pytest.mark.parametrize("lockstep", [True, False])
def test_a_turn_is_read_with_what_it_follows(monkeypatch, lockstep: bool) -> None:
    read, follows = Characters.read, []

    def remembering(self, token_ids, finish_reason, *, before):
        follows.append((before, token_ids))
        return read(self, token_ids, finish_reason)

    monkeypatch.setattr(Characters, "read", remembering)
    trees, _ = rollout(tools_then(2), settings(paths=4, fresh_paths=2), questions=2, lockstep=lockstep)
    nodes = [(tree.nodes, node) for tree in trees for node in tree.nodes if node.source == "model"]
    assert sorted(follows) == sorted((others[node.parent].token_ids, node.token_ids) for others, node in nodes)


def test_one_path_per_question() -> None:
    for fresh_paths in (None, 1):
        tree = one_tree(tools_then(2), settings(paths=1, fresh_paths=fresh_paths))
        check_tree(tree, 1)


def test_what_branching_does_not_use_starts_fresh() -> None:
    tree = one_tree(tools_then(2), settings(paths=6, fresh_paths=2, branch_alpha=0.0))
    assert [path.parent for path in tree.paths] == [None] * 6
    assert len(tree.decisions) == 6 * 2


def test_siblings_share_the_prefix_up_to_the_tool_result() -> None:
    tree = one_tree(tools_then(2), settings(paths=3, branch_threshold=0.9))
    branch = tree.paths[1]
    parent, sibling = path_nodes(tree, 0), path_nodes(tree, 1)
    shared = [node.id for node in parent if node in sibling]
    assert shared[-1] == branch.branch_node
    assert tree.nodes[shared[-1]].source == "tool"
    assert parent[len(shared)].token_ids != sibling[len(shared)].token_ids  # its own seed


def penalty_oracle(tool_calls: int) -> Counter:
    """All decisions where room never ends, alpha = 0.55, penalty = 0.05, tau = 0.5: P = 0.55, 0.5225, 0.495, ...

    So a path branches twice in a row, rests once, and starts again. (step, consecutive, branched): how often.
    """
    decisions: Counter = Counter()

    def go_on(step: int, consecutive: int) -> None:
        for at in range(step, tool_calls + 1):
            branched = 0.55 * (1 - 0.05 * consecutive) > 0.5
            decisions[at, consecutive, branched] += 1
            consecutive = consecutive + 1 if branched else 0
            if branched:
                go_on(at + 1, consecutive)

    go_on(1, 0)
    return decisions


def test_penalty_counts_per_path_and_resets() -> None:
    """The published code counts per question: there the second branch of a wave would already be penalised."""
    expected = penalty_oracle(5)
    # 1 + branches of one fresh path over 5 tool results; room for all of them and not one more.
    paths = 1 + sum(count for (_, _, branched), count in expected.items() if branched)
    assert paths == 16
    config = settings(paths=paths, branch_alpha=0.55, branch_gamma=0.0, branch_penalty=0.05)
    tree = one_tree(tools_then(5), config)
    depth = {node.id: sum(n.source == "tool" for n in lineage(tree, node.id)) for node in tree.nodes}
    assert Counter((depth[d.node], d.consecutive, d.branched) for d in tree.decisions) == expected


def lineage(tree: RolloutTree, node: int | None) -> list:
    return [] if node is None else [*lineage(tree, tree.nodes[node].parent), tree.nodes[node]]


def test_decisions_name_the_entropies_they_rest_on() -> None:
    def script(text: str, seed: int) -> tuple[str, float, str]:
        calls = text.count("[")
        return f"{seed:x}" + (SEARCH if calls < 2 else ANSWER), [1.0, 2.0, 0.5][calls], "stop"

    tree = one_tree(script, settings(paths=2, branch_alpha=0.0))
    assert [decision.entropy for decision in tree.decisions[:2]] == [2.0, 0.5]
    assert tree.decisions[0].delta == pytest.approx((2.0 - 1.0) / 4.852030263919617)  # ln 128
    assert tree.decisions[1].delta == pytest.approx((0.5 - 1.0) / 4.852030263919617)


def test_probe_sets_the_budget_and_is_one_of_the_fresh_paths() -> None:
    tree = one_tree(tools_then(3, entropy=1.0), settings(paths=8, fresh_paths=None, branch_alpha=0.0))
    assert tree.budget is not None
    assert (tree.budget.root_entropy, tree.budget.tool_entropy, tree.budget.fresh_paths) == (1.0, 1.0, 4)
    everywhere = one_tree(tools_then(3), settings(paths=8, fresh_paths=None))
    assert sum(path.parent is None for path in everywhere.paths) == 4
    # The path that went ahead is judged when the others come to the same step: alpha = 1 branches at each, until 8.
    assert [decision.path for decision in everywhere.decisions[:4]] == [0, 1, 2, 3]
    assert [path.parent for path in everywhere.paths[4:]] == [0, 1, 2, 3]
    # m = 1: alone it is judged step by step, and its first branch takes part from the second step on.
    alone = one_tree(
        lambda text, seed: (tools_then(3)(text, seed)[0], 100.0 * ("[" in text), "stop"),
        settings(paths=4, fresh_paths=None, branch_gamma=0.0),
    )
    assert alone.budget is not None
    assert alone.budget.fresh_paths == 1
    assert [path.parent for path in alone.paths] == [None, 0, 0, 1]
    assert one_tree(tools_then(3), settings(paths=8, fresh_paths=4)).budget is None


def test_limits() -> None:
    config = settings(paths=1, max_tokens=60, max_segment_tokens=20, max_tool_calls=2)
    tree = one_tree(lambda text, seed: ("z" * 50, 1.0, "length"), config)
    assert texts(tree) == ["z" * 20]
    # 8 + 18 written, 3 read, and again: 58. A third segment has 60 - 58 = 2 tokens left.
    tree = one_tree(lambda text, seed: ("12345678" + SEARCH, 1.0, "stop"), replace(config, max_segment_tokens=30))
    assert tree.paths[0].finish_reason == "length"
    assert len(texts(tree)[0]) == 60
    # A result that leaves no room for one more token is not read: a path ends with what the model wrote.
    tree = one_tree(
        lambda text, seed: ("1234567" + SEARCH, 1.0, "stop"), replace(config, max_tokens=28, max_segment_tokens=30)
    )
    assert texts(tree) == ["1234567" + SEARCH]
    assert tree.paths[0].finish_reason == "length"
    calls = ScriptedTools()
    tree = one_tree(tools_then(9), settings(paths=1, max_tool_calls=2), tools=calls)
    assert len(calls.calls) == 2
    assert tree.paths[0].finish_reason == "tool_limit"


@pytest.mark.parametrize(("positions", "length"), [(59, 25 + 3 + 25 + 3 + 1), (58, 25 + 3 + 25)])
def test_a_path_ends_where_the_engines_context_does(positions: int, length: int) -> None:
    """Prompt "q?", then twice 25 tokens written and 3 read: 58 positions. A result that fills them is not read."""
    engine = ScriptedEngine(lambda text, seed: ("1234567" + SEARCH, 1.0, "stop"), max_positions=positions)
    (tree,) = Sampler(engine, ScriptedAgent(ScriptedTools()), settings(paths=1)).rollout([question()], 0)
    assert tree.paths[0].finish_reason == "length"
    assert len(texts(tree)[0]) == length


def test_a_prompt_that_fills_the_engines_context_is_named() -> None:
    engine = ScriptedEngine(tools_then(0), max_positions=2)
    with pytest.raises(ValueError, match="question 'q': its prompt has 2 tokens, expected fewer than the engine's 2"):
        Sampler(engine, ScriptedAgent(ScriptedTools()), settings()).rollout([question()], 0)


def test_tool_failures_reach_the_model_and_the_tree() -> None:
    tools = ScriptedTools(ToolResult("error: it broke", "raised", 0.5))
    tree = one_tree(tools_then(1), settings(paths=1), tools=tools)
    assert "[error: it broke]" in texts(tree)[0]
    node = next(node for node in tree.nodes if node.source == "tool")
    assert node.results == (tools.result,)
    assert node.calls == tuple(tools.calls)


def test_several_calls_of_one_turn_are_one_node_and_count_each() -> None:
    def script(text: str, seed: int) -> tuple[str, float, str]:
        return f"{seed:x} " + (SEARCH * 2 if text.count("[") < 4 else ANSWER), 1.0, "stop"

    tree = one_tree(script, settings(paths=2, max_tool_calls=4))
    assert {len(node.results) for node in tree.nodes if node.source == "tool"} == {2}
    assert {path.finish_reason for path in tree.paths} == {"answered"}
    assert texts(tree)[0].count("[r][r]") == 2
    # A third pair would be the fifth and sixth call.
    limited = one_tree(script, settings(paths=2, max_tool_calls=3))
    assert {path.finish_reason for path in limited.paths} == {"tool_limit"}
    assert [text.count("[r][r]") for text in texts(limited)] == [1, 1]


def test_seeds() -> None:
    """Same seed, same tree; another seed, path, segment or question, other numbers; other questions do not matter."""
    config = settings(paths=6, fresh_paths=2, branch_alpha="uniform")
    trees, engine = rollout(tools_then(3), config, questions=3)
    seeds = [request.seed for wave in engine.waves for request in wave]
    assert len(set(seeds)) == len(seeds)
    assert rollout(tools_then(3), config, questions=3)[0] == trees
    assert rollout(tools_then(3), config, questions=1)[0] == trees[:1]
    assert set(texts(one_tree(tools_then(3), config, seed=1))).isdisjoint(texts(trees[0]))


def test_order_of_events_does_not_change_what_is_sampled() -> None:
    """An engine that answers in another order gives the same paths, as long as they do not compete for room."""
    config = settings(paths=16, branch_alpha=0.55, branch_gamma=0.0, branch_penalty=0.05)
    lockstep, free = (one_tree(tools_then(5), config, lockstep=lockstep) for lockstep in (True, False))
    assert sorted(texts(lockstep)) == sorted(texts(free))


def families_that_branch(config: RolloutConfig) -> tuple[float, float]:
    """Mean share of the branches that the busiest family (a fresh path and its descendants) has, and mean number of
    families with branches, over 20 questions.

    The first fresh path of a question is unsure after every tool result, the others after their fourth alone.
    """
    unsure_family: dict[str, str] = {}  # question: what that path began with

    def script(text: str, seed: int) -> tuple[str, float, str]:
        calls = text.count("[")
        name, _, written = text.partition("?")
        began = written[:16] or f"{seed:016x}"
        unsure = calls == 4 or (calls > 0 and unsure_family[name] == began)
        unsure_family.setdefault(name, began)
        return f"{seed:016x} " + (SEARCH if calls < 6 else ANSWER), 4.0 if unsure else 1.0, "stop"

    shares, families = [], []
    for tree in rollout(script, config, questions=20)[0]:
        root: dict[int, int] = {}
        for path in tree.paths:
            root[path.id] = path.id if path.parent is None else root[path.parent]
        branches = Counter(root[path.id] for path in tree.paths if path.parent is not None)
        shares.append(max(branches.values()) / branches.total())
        families.append(len(branches))
    return sum(shares) / len(shares), sum(families) / len(families)


def test_arpo_piles_branches_and_the_penalty_spreads_them() -> None:
    """An early run of unsure steps uses up the room under ARPO; under AEPO some is left for later steps elsewhere."""
    arpo = settings(paths=8, fresh_paths=4, branch_alpha=0.4, branch_gamma=0.5)  # P = 0.71 where unsure, else 0.4
    piled, spread = families_that_branch(arpo), families_that_branch(replace(arpo, branch_penalty=0.3))
    assert piled == (1.0, 1.0)
    assert spread == (0.5, 3.0)
