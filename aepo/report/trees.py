"""Saved rollout trees in the form in which the page draws them (templates/trees.js)."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aepo.report.files import fitting, read_json, read_part, rounded
from aepo.types import Question

# A page holds some 5 MB of trees. In files a token takes about 60 bytes, most of them digits; in a page 20.
MAX_FILE_BYTES = 14_000_000
MAX_TOKENS = 200_000

PageTree = dict[str, Any]


def read_trees(folder: Path, problems: list[str]) -> list[PageTree]:
    """The trees of all saved steps, as many as a page can hold; only those are read."""
    files = sorted(folder.glob("step_*.json"))
    kept = fitting([file.stat().st_size for file in files], MAX_FILE_BYTES)
    if len(kept) < len(files):
        problems.append(f"trees: {len(kept)} of {len(files)} saved steps are shown, to keep the page small")
    steps = [read_part(files[i], _read_step, problems) or [] for i in kept]
    # One step may be too large by itself.
    return fitting_trees(steps[0], problems) if len(steps) == 1 else [tree for step in steps for tree in step]


def _read_step(file: Path) -> list[PageTree]:
    status = file.stat()
    return _step_trees(file, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=512)
def _step_trees(file: Path, changed: int, size: int) -> list[PageTree]:
    """Of a file as it was at a time: a live page, which is made anew after every step, reads every file once."""
    record = read_json(file)
    try:
        return [page_tree(record["step"], entry) for entry in record["trees"]]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not a record of rollout trees ({type(error).__name__}: {error})") from None


def fitting_trees(trees: Sequence[PageTree], problems: list[str]) -> list[PageTree]:
    """As many trees of one step as a page can hold."""
    kept = fitting([_tokens(tree) for tree in trees], MAX_TOKENS)
    if len(kept) < len(trees):
        problems.append(f"trees: {len(kept)} of {len(trees)} questions are shown, to keep the page small")
    return [trees[i] for i in kept]


def page_tree(step: int, entry: Mapping[str, Any]) -> PageTree:
    """One saved tree: token texts and rounded numbers, without token ids.

    `entry`: one of "trees" in trees/step_*.json. Runs before several calls per turn have call and result in place of
    calls and results, and are read as well.
    """
    tree = entry["tree"]
    texts = entry.get("texts") or [[f"[{token}]" for token in node["token_ids"]] for node in tree["nodes"]]
    for links in (tree["nodes"], tree["paths"]):  # the page follows parents: a circle would never end
        if any(link["parent"] is not None and not 0 <= link["parent"] < index for index, link in enumerate(links)):
            raise ValueError("a parent that does not come before its child")
    decisions = [
        {key: rounded(value, 4) if isinstance(value, float) else value for key, value in decision.items()}
        for decision in tree["decisions"]
    ]
    return {
        "step": step,
        "question": page_question(tree["question"]),
        "nodes": [_page_node(node, pieces) for node, pieces in zip(tree["nodes"], texts, strict=True)],
        "decisions": decisions,
        "paths": tree["paths"],
        "budget": tree["budget"],
        "rewards": entry.get("rewards"),
        "advantages": entry.get("advantages"),
    }


def page_question(question: Mapping[str, Any]) -> dict[str, str]:
    """id, text, answer and kind as texts; a dialogue is shown by its last message of the user."""
    if "text" in question:
        text = question["text"]
    else:
        prompt = question["prompt"]
        text = Question("", prompt if isinstance(prompt, str) else tuple(prompt)).text
    answer = question.get("answer")
    shown = "" if answer is None else answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
    return {"id": str(question["id"]), "text": str(text), "answer": shown, "kind": str(question.get("kind") or "")}


def _page_node(node: Mapping[str, Any], pieces: Sequence[str]) -> dict[str, Any]:
    if len(pieces) != len(node["token_ids"]):
        raise ValueError(f"node {node['id']} has {len(node['token_ids'])} tokens and {len(pieces)} texts")
    page_node = {"parent": node["parent"], "source": node["source"], "texts": pieces}
    if node["source"] == "model":
        return page_node | {key: [_nats(value) for value in node[key]] for key in ("entropies", "logprobs")}
    if node["source"] == "tool":
        return page_node | {"calls": _calls(node), "results": _results(node)}
    return page_node


def _calls(node: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "call" not in node:
        return [{key: call[key] for key in ("tool", "arguments", "problem")} for call in node["calls"]]
    call = node["call"]
    return [{"tool": call["tool"], "arguments": {"": call["argument"]}, "problem": None}] if call else []


def _results(node: Mapping[str, Any]) -> list[dict[str, Any]]:
    results = node["results"] if "call" not in node else [node["result"]] if node["result"] else []
    return [{"text": str(one["text"]), "error": one["error"], "seconds": rounded(one["seconds"], 3)} for one in results]


def _nats(value: float | None) -> float | None:
    """To a thousandth: there is one per token, so the page's size and the time to make it depend on it."""
    return None if value is None or not math.isfinite(value) else round(value, 3)


def _tokens(tree: PageTree) -> int:
    return sum(len(node["texts"]) for node in tree["nodes"])
