"""What is kept of a scored tree in a file: its nodes with the text of every token, its decisions, its rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from aepo.types import ScoredTree


def tree_entry(scored: ScoredTree, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """JSON values, but for answers of other types. Of a question's columns only those that people look at."""
    tree = scored.tree
    question = {name: getattr(tree.question, name) for name in ("id", "text", "answer", "kind")}
    parts = {
        name: [dataclasses.asdict(part) for part in getattr(tree, name)] for name in ("nodes", "paths", "decisions")
    }
    budget = None if tree.budget is None else dataclasses.asdict(tree.budget)
    return {
        "tree": {"question": question, **parts, "budget": budget},
        "rewards": [dataclasses.asdict(reward) for reward in scored.rewards],
        "texts": [token_texts(node.token_ids, decode) for node in tree.nodes],
    }


def token_texts(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """One piece of text per token; joined they are the decoded text. A character whose bytes are spread over several
    tokens stands at the last of them."""
    pieces, done = [], ""
    for end in range(1, len(token_ids) + 1):
        text = decode(token_ids[:end])
        if text.endswith("\ufffd") and end < len(token_ids):
            text = done
        pieces.append(text[len(done) :])
        done = text
    return pieces
