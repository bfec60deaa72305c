"""The tree of one question: how it grows, what must hold of it, and how one path of it is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from aepo.rollout.engine import Generation
from aepo.types import (
    BranchDecision,
    BudgetDecision,
    Node,
    Path,
    Question,
    RolloutTree,
    TokenIds,
    ToolCall,
    ToolResult,
    Trajectory,
)


class TreeBuilder:
    """Grows one tree. Nodes and paths are numbered in the order in which they are added."""

    def __init__(self, question: Question, prompt: TokenIds) -> None:
        self.question = question
        self.nodes = [Node(id=0, parent=None, source="prompt", token_ids=prompt)]
        self._lengths = [len(prompt)]  # tokens from the root to the end of each node

    def add_generation(self, parent: int, generation: Generation) -> int:
        return self._add(
            Node(
                id=len(self.nodes),
                parent=parent,
                source="model",
                token_ids=generation.token_ids,
                logprobs=generation.logprobs,
                entropies=generation.entropies,
                version=generation.version,
                finish_reason=generation.finish_reason,
            )
        )

    def add_results(
        self, parent: int, token_ids: TokenIds, calls: Sequence[ToolCall], results: Sequence[ToolResult]
    ) -> int:
        """What the calls of segment `parent` gave, as the tokens that the model reads."""
        return self._add(
            Node(
                id=len(self.nodes),
                parent=parent,
                source="tool",
                token_ids=token_ids,
                calls=tuple(calls),
                results=tuple(results),
            )
        )

    def tokens_to(self, node: int) -> TokenIds:
        """All tokens from the root to the end of `node`."""
        return tuple(chain.from_iterable(n.token_ids for n in _lineage(self.nodes, node)))

    def length_to(self, node: int) -> int:
        """Tokens from the root to the end of `node`."""
        return self._lengths[node]

    def calls_to(self, node: int) -> int:
        """Tool results from the root to the end of `node`."""
        return sum(len(n.results) for n in _lineage(self.nodes, node))

    def build(
        self, paths: Iterable[Path], decisions: Iterable[BranchDecision], budget: BudgetDecision | None
    ) -> RolloutTree:
        return RolloutTree(self.question, tuple(self.nodes), tuple(paths), tuple(decisions), budget)

    def _add(self, node: Node) -> int:
        assert node.parent is not None
        self.nodes.append(node)
        self._lengths.append(self._lengths[node.parent] + len(node.token_ids))
        return node.id


def check_tree(tree: RolloutTree, paths: int) -> None:
    """ValueError unless the tree holds exactly `paths` distinct, complete paths and nothing else.

    Distinct means that no path repeats or continues another one: each ends at its own childless node. Two samples may
    still happen to hold the same tokens.
    """
    _check_nodes(tree.nodes)
    _require(len(tree.paths) == paths, f"{len(tree.paths)} paths, expected {paths}")
    parents = {node.parent for node in tree.nodes}
    reached = {0}
    for index, path in enumerate(tree.paths):
        _require(path.id == index, f"path {index} has id {path.id}")
        _require(0 <= path.leaf < len(tree.nodes), f"path {index}: leaf {path.leaf} does not exist")
        _require(tree.nodes[path.leaf].source == "model", f"path {index} does not end with a model node")
        _require(path.leaf not in parents, f"path {index} ends at node {path.leaf}, which another path continues")
        lineage = [node.id for node in path_nodes(tree, index)]
        reached.update(lineage)
        fresh = path.parent is None and path.branch_node is None
        _require(
            fresh or (path.parent in range(index) and path.branch_node in lineage),
            f"path {index} says that it branched from path {path.parent} at node {path.branch_node}",
        )
    _require(len({path.leaf for path in tree.paths}) == paths, "two paths end at the same node")
    _require(len(reached) == len(tree.nodes), f"nodes {set(range(len(tree.nodes))) - reached} are on no path")


def path_nodes(tree: RolloutTree, path: int) -> tuple[Node, ...]:
    """The nodes of a path, from the prompt to its leaf."""
    return _lineage(tree.nodes, tree.paths[path].leaf)


def flatten(tree: RolloutTree, path: int) -> Trajectory:
    """One path as tokens, with the mask of what the model wrote."""
    nodes = path_nodes(tree, path)
    steps: list[int] = []
    anchors: list[TokenIds] = []
    for before, node in zip((None, *nodes), nodes, strict=False):
        if node.source == "model":
            assert before is not None
            steps += [len(anchors)] * len(node.token_ids)
            anchors.append(before.token_ids)
        else:
            steps += [-1] * len(node.token_ids)

    def per_token(values: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
        return tuple(chain.from_iterable(values))

    return Trajectory(
        token_ids=tuple(chain.from_iterable(node.token_ids for node in nodes)),
        generated=tuple(step >= 0 for step in steps),
        logprobs=per_token(node.logprobs or (0.0,) * len(node.token_ids) for node in nodes),
        entropies=per_token(node.entropies or (0.0,) * len(node.token_ids) for node in nodes),
        steps=tuple(steps),
        anchors=tuple(anchors),
    )


def branches_per_path(tree: RolloutTree) -> tuple[int, ...]:
    """Entry i: how many paths branched off path i."""
    counts = [0] * len(tree.paths)
    for path in tree.paths:
        if path.parent is not None:
            counts[path.parent] += 1
    return tuple(counts)


def _lineage(nodes: list[Node] | tuple[Node, ...], leaf: int) -> tuple[Node, ...]:
    lineage = [nodes[leaf]]
    while (parent := lineage[-1].parent) is not None:
        lineage.append(nodes[parent])
    return tuple(reversed(lineage))


def _check_nodes(nodes: tuple[Node, ...]) -> None:
    _require(len(nodes) > 0 and nodes[0].source == "prompt", "node 0 must be the prompt")
    for index, node in enumerate(nodes):
        name = f"node {index}"
        _require(node.id == index, f"{name} has id {node.id}")
        _require(len(node.token_ids) > 0, f"{name} has no tokens")
        if index > 0:
            _require(node.parent is not None and 0 <= node.parent < index, f"{name}: parent {node.parent}")
            follows = "model" if node.source == "tool" else "prompt or tool"
            assert node.parent is not None
            _require(nodes[node.parent].source in follows, f"{name} ({node.source}) must follow a {follows} node")
        _require(len(node.calls) == len(node.results), f"{name}: {len(node.calls)} calls, {len(node.results)} results")
        expected = len(node.token_ids) if node.source == "model" else 0
        _require(
            len(node.logprobs) == len(node.entropies) == expected,
            f"{name} has {len(node.logprobs)} log-probs and {len(node.entropies)} entropies, expected {expected}",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"not a valid rollout tree: {message}")
