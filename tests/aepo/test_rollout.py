"""The whole rollout with nothing scripted: a random model, the engine, the ToolBox and a tool that also fails."""

from __future__ import annotations

import math

import pytest
import torch
from trainer_toys import ToyLanguageModel, ToyTask, toy_agent

from aepo.config import RolloutConfig
from aepo.rollout.branching import mean_entropy
from aepo.rollout.engines.huggingface.engine import HuggingFaceEngine
from aepo.rollout.sampler import Sampler
from aepo.rollout.tree import check_tree, flatten, path_nodes
from aepo.types import RolloutTree

CONFIG = RolloutConfig(paths=6, max_tokens=120, max_segment_tokens=40, max_tool_calls=4, entropy_window=5)


@pytest.fixture(scope="module")
def toy() -> ToyLanguageModel:
    return ToyLanguageModel(torch.float64, seed=2)  # one that calls its tool often


def rollout(toy: ToyLanguageModel, questions: slice = slice(None), seed: int = 0) -> list[RolloutTree]:
    engine = HuggingFaceEngine(toy.model, toy.tokenizer, eos_ids=())  # random text ends soon enough
    return Sampler(engine, toy_agent(ToyTask()), CONFIG).rollout(ToyTask().train[questions], seed)


@pytest.fixture(scope="module")
def trees(toy: ToyLanguageModel) -> list[RolloutTree]:
    return rollout(toy)


def test_trees_are_complete_and_the_model_used_its_tool(trees: list[RolloutTree]) -> None:
    for tree in trees:
        check_tree(tree, 6)
    nodes = [node for tree in trees for node in tree.nodes if node.source == "tool"]
    assert any(result.error is None for node in nodes for result in node.results)
    assert any(result.error is not None for node in nodes for result in node.results)
    assert any(path.parent is not None for tree in trees for path in tree.paths)
    assert {tree.budget is not None for tree in trees} == {True}


def test_every_generated_token_has_the_models_own_logprob_and_entropy(
    toy: ToyLanguageModel, trees: list[RolloutTree]
) -> None:
    for tree in trees:
        for path in tree.paths:
            trajectory = flatten(tree, path.id)
            with torch.no_grad():
                logits = toy.model(torch.tensor([trajectory.token_ids]), use_cache=False).logits[0, :-1].double()
            logprobs = torch.log_softmax(logits, dim=-1)
            taken = logprobs.gather(1, torch.tensor(trajectory.token_ids[1:])[:, None])[:, 0]
            mask = torch.tensor(trajectory.generated[1:])
            for got, expected in (
                (trajectory.logprobs, taken),
                (trajectory.entropies, -(logprobs.exp() * logprobs).sum(dim=-1)),
            ):
                # Ten times what transformers' float32 rotary angles and norms make of it.
                torch.testing.assert_close(
                    torch.tensor(got[1:], dtype=torch.float64)[mask], expected[mask], rtol=0, atol=2e-6
                )


def test_decisions_follow_from_the_entropies_in_the_tree(toy: ToyLanguageModel, trees: list[RolloutTree]) -> None:
    for tree in trees:
        for decision in tree.decisions:
            nodes = path_nodes(tree, decision.path)
            after = next(node for node in nodes if node.parent == decision.node)
            entropy, initial = (mean_entropy(node.entropies, 5) for node in (after, nodes[1]))
            assert decision.entropy == entropy
            delta = (entropy - initial) / math.log(toy.vocab_size)
            assert decision.delta == pytest.approx(delta)
            penalty = 1 - 0.05 * decision.consecutive
            assert decision.probability == pytest.approx((decision.alpha + 0.2 * delta) * penalty)
            started = [path for path in tree.paths if (path.parent, path.branch_node) == (decision.path, decision.node)]
            assert len(started) == decision.branched


def tokens(trees: list[RolloutTree]) -> list[list[tuple[int, ...]]]:
    return [[flatten(tree, path.id).token_ids for path in tree.paths] for tree in trees]


def test_same_seed_same_paths_whatever_else_is_in_the_batch(toy: ToyLanguageModel, trees: list[RolloutTree]) -> None:
    assert tokens(rollout(toy)) == tokens(trees)
    assert tokens(rollout(toy, slice(2, 4))) == tokens(trees)[2:4]
    assert tokens(rollout(toy, seed=1)) != tokens(trees)
