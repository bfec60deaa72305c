"""What a tree's decisions rest on: the first tokens of each segment, and a draw of their own."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from rollout_toys import ANSWER, SEARCH, ScriptedAgent, ScriptedEngine, ScriptedTools, question, settings, tools_then

from aepo.rollout.engine import Generation, GenerationRequest
from aepo.rollout.sampler import Sampler
from aepo.types import RolloutTree


class FallingEntropies(ScriptedEngine):
    """Each token of a segment has half the entropy of the one before it."""

    def _generate(self, request: GenerationRequest) -> Generation:
        whole = super()._generate(request)
        return replace(whole, entropies=tuple(entropy / 2**i for i, entropy in enumerate(whole.entropies)))


def grown(engine: ScriptedEngine, **changes: object) -> RolloutTree:
    return Sampler(engine, ScriptedAgent(ScriptedTools()), settings(**changes)).rollout([question()], 0)[0]


def script(text: str, seed: int) -> tuple[str, float, str]:
    return f"{seed:x}" + (SEARCH if text.count("[") < 2 else ANSWER), [8.0, 16.0, 32.0][text.count("[")], "stop"


def test_entropies_are_means_over_the_window_alone() -> None:
    """Of 3 tokens: e (1 + 1/2 + 1/4) / 3; a segment has more than 20."""
    tree = grown(FallingEntropies(script), paths=4, fresh_paths=None, entropy_window=3, branch_alpha=0.0)
    share = (1 + 1 / 2 + 1 / 4) / 3
    assert tree.budget is not None
    assert tree.budget.root_entropy == 8 * share
    assert tree.budget.tool_entropy == (16 + 32) / 2 * share
    assert {decision.entropy for decision in tree.decisions} == {16 * share, 32 * share}
    assert {round(decision.delta * 4.852030263919617 / share) for decision in tree.decisions} == {8, 24}  # ln 128


def test_every_decision_has_a_draw_of_its_own() -> None:
    tree = grown(ScriptedEngine(tools_then(6)), paths=5, fresh_paths=2, branch_alpha="uniform", branch_threshold=0.6)
    draws = [decision.alpha for decision in tree.decisions]
    of_path = defaultdict(list)
    for decision in tree.decisions:
        of_path[decision.path].append(decision.alpha)
    assert max(map(len, of_path.values())) > 3
    assert len(set(draws)) == len(draws)
    assert all(0 <= draw < 1 for draw in draws)
