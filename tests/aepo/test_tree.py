"""Trees built by hand: flattening, masks, and every invariant that `check_tree` promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rollout_toys import question

from aepo.rollout.engine import Generation
from aepo.rollout.tree import TreeBuilder, branches_per_path, check_tree, flatten, path_nodes
from aepo.types import Path, RolloutTree, ToolCall, ToolResult


def generation(*tokens: int) -> Generation:
    logprobs = tuple(-float(token) for token in tokens)
    return Generation(tokens, logprobs, tuple(token / 10 for token in tokens), "stop", version=2)


def small_tree() -> RolloutTree:
    """Path 0: prompt, (11 12), tool (21), (13). Path 1 branched at the tool: (14 15). Path 2: fresh, (16)."""
    builder = TreeBuilder(question(), prompt=(1, 2, 3))
    first = builder.add_generation(0, generation(11, 12))
    tool = builder.add_results(first, (21,), [ToolCall("search", {"query": "x"})], [ToolResult("r", None, 0.1)])
    leaves = [builder.add_generation(tool, generation(13)), builder.add_generation(tool, generation(14, 15))]
    leaves.append(builder.add_generation(0, generation(16)))
    paths = [
        Path(0, leaves[0], None, None, "answered"),
        Path(1, leaves[1], 0, tool, "eos"),
        Path(2, leaves[2], None, None, "length"),
    ]
    return builder.build(paths, [], None)


def test_builder_reads_back_prefixes() -> None:
    builder = TreeBuilder(question(), prompt=(1, 2, 3))
    first = builder.add_generation(0, generation(11, 12))
    tool = builder.add_results(first, (21,), [ToolCall("", {}, "no call")], [ToolResult("r", None, 0.0)])
    assert builder.tokens_to(tool) == (1, 2, 3, 11, 12, 21)
    assert builder.length_to(tool) == 6
    assert builder.length_to(0) == 3


def test_flatten_marks_exactly_what_the_model_wrote() -> None:
    trajectory = flatten(small_tree(), 1)
    assert trajectory.token_ids == (1, 2, 3, 11, 12, 21, 14, 15)
    assert trajectory.generated == (False, False, False, True, True, False, True, True)
    assert trajectory.logprobs == (0.0, 0.0, 0.0, -11.0, -12.0, 0.0, -14.0, -15.0)
    assert trajectory.entropies == (0.0, 0.0, 0.0, 1.1, 1.2, 0.0, 1.4, 1.5)
    assert trajectory.steps == (-1, -1, -1, 0, 0, -1, 1, 1)
    assert trajectory.anchors == ((1, 2, 3), (21,))


def test_small_tree_is_valid_and_its_branches_are_counted() -> None:
    tree = small_tree()
    check_tree(tree, 3)
    assert branches_per_path(tree) == (1, 0, 0)
    assert [node.id for node in path_nodes(tree, 1)] == [0, 1, 2, 4]


def with_path(tree: RolloutTree, index: int, **changes: object) -> RolloutTree:
    paths = list(tree.paths)
    paths[index] = replace(paths[index], **changes)
    return replace(tree, paths=tuple(paths))


def with_node(tree: RolloutTree, index: int, **changes: object) -> RolloutTree:
    nodes = list(tree.nodes)
    nodes[index] = replace(nodes[index], **changes)
    return replace(tree, nodes=tuple(nodes))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda tree: replace(tree, paths=tree.paths[:2]), "2 paths, expected 3"),
        (lambda tree: with_path(tree, 1, leaf=3), "two paths end at the same node"),  # the last path, duplicated
        (lambda tree: with_path(tree, 2, leaf=1), "another path continues"),
        (lambda tree: with_path(tree, 2, leaf=2), "does not end with a model node"),
        (lambda tree: with_path(tree, 2, leaf=9), "leaf 9 does not exist"),
        (lambda tree: with_path(tree, 1, id=5), "path 1 has id 5"),
        (lambda tree: with_path(tree, 1, parent=2), "branched from path 2"),
        (lambda tree: with_path(tree, 1, branch_node=5), "at node 5"),
        (lambda tree: with_path(tree, 1, parent=None), "branched from path None"),
        (lambda tree: replace(tree, nodes=(*tree.nodes, replace(tree.nodes[5], id=6))), "are on no path"),
        (lambda tree: with_node(tree, 4, parent=4), "parent 4"),
        (lambda tree: with_node(tree, 4, parent=3), "must follow a prompt or tool node"),
        (lambda tree: with_node(tree, 2, parent=0), "must follow a model node"),
        (lambda tree: with_node(tree, 3, logprobs=()), "0 log-probs"),
        (lambda tree: with_node(tree, 2, entropies=(1.0,)), "1 entropies, expected 0"),
        (lambda tree: with_node(tree, 3, token_ids=(), logprobs=(), entropies=()), "has no tokens"),
    ],
)
def test_broken_trees_are_refused(broken, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tree(broken(small_tree()), 3)
