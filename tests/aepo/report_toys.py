"""Run directories made by hand, in the files that the trainer writes, and what the tests of the report look at."""

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path as FilePath

from aepo.run.saved_trees import tree_entry
from aepo.types import (
    BranchDecision,
    BudgetDecision,
    Node,
    Path,
    Question,
    Reward,
    RolloutTree,
    ScoredTree,
    ToolCall,
    ToolResult,
)

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!-- javascript:alert(3) \u2028\u202e"
TOKENS = {1: "What", 2: "?", 3: "<search>", 4: HOSTILE, 5: "<result/>", 6: "42", 7: "43"}


def hand_made_tree(
    question: str = "q7", rewards: tuple[float, float] = (1.0, 0.0), error: str | None = "timeout"
) -> dict:
    """Two paths: path 1 leaves path 0 after the results of its two tool calls. A path succeeds with a reward of 1."""
    calls = (ToolCall("search", {"query": HOSTILE}), ToolCall("clock", {}, "no such argument"))
    results = (ToolResult("", error, 6.0), ToolResult("noon", None, 0.5))
    nodes = (
        Node(0, None, "prompt", (1, 2)),
        Node(1, 0, "model", (3, 4), (-0.5, -0.1), (1.25, 0.0), finish_reason="stop"),
        Node(2, 1, "tool", (5,), calls=calls, results=results),
        Node(3, 2, "model", (6,), (-0.25,), (0.6,), finish_reason="stop"),
        Node(4, 2, "model", (7,), (-1.5,), (2.75,), finish_reason="stop"),
    )
    paths = (Path(0, 3, None, None, "answered"), Path(1, 4, 0, 2, "answered", environment_reward=0.5))
    decisions = (BranchDecision(0, 2, 0.6, 0.02, 0.7, 3, 0.6, True),)
    asked = Question(question, f"What is {question} {HOSTILE}?", "42", "capital", {"entity": "Peru"})
    tree = RolloutTree(asked, nodes, paths, decisions, BudgetDecision(0.9, 0.4, 1))
    scored = ScoredTree(tree, tuple(Reward(total, {"answer": total}, total == 1) for total in rewards))
    entry = tree_entry(scored, lambda ids: "".join(TOKENS[i] for i in ids))
    return json.loads(json.dumps(entry | {"advantages": [0.7, -0.7]}))


def earlier_tree() -> dict:
    """The same, as runs wrote it that had one call per turn."""
    entry = hand_made_tree()
    for node in entry["tree"]["nodes"]:
        calls, results = node.pop("calls"), node.pop("results")
        node["call"] = {"tool": "search", "argument": HOSTILE} if calls else None
        node["result"] = results[0] if results else None
    return entry


def save_trees(run: FilePath, step: int, *entries: dict) -> None:
    (run / "trees" / f"step_{step:06d}.json").write_text(json.dumps({"step": step, "trees": entries}))


def answer_line(step: int, question: str, *successes: bool, text: str = "so it is") -> str:
    samples = [
        {"text": text, "answer": "42", "reward": float(one), "success": one, "finish_reason": "answered",
         "tool_calls": 2, "tool_failures": 1, "tokens": 30, "components": {"answer": float(one)}}
        for one in successes
    ]  # fmt: skip
    asked = {"id": question, "text": f"What is {question}?", "answer": "42", "kind": "capital"}
    return json.dumps({"step": step, "question": asked, "samples": samples}) + "\n"


def save_answers(run: FilePath, step: int, *lines: str) -> None:
    (run / "answers").mkdir(exist_ok=True)
    (run / "answers" / f"step_{step:06d}.jsonl").write_text("".join(lines))


def make_run(path: FilePath, *, success: tuple[float, float] = (0.25, 0.5), preset: str = "aepo") -> FilePath:
    (path / "trees").mkdir(parents=True)
    metrics = [
        {"step": 1, "reward.mean": 0.25, "policy.kl": None, "rollout.branches_per_path": [6, 2, 0, 1, 1],
         "rollout.paths": 10, "tools.calls": 8, "tools.calls.search": 5,
         "tools.failures": 2, "tools.failures.timeout": 2},
        {"step": 2, "reward.mean": 0.75, "policy.kl": None, "rollout.branches_per_path": [10],
         "rollout.paths": 10, "tools.calls": 0, "tools.failures": 0, "tools.failures.timeout": 0},
    ]  # fmt: skip
    evals = [
        {"step": step, "success": value, "success.capital": value} for step, value in zip((0, 2), success, strict=True)
    ]
    facts = {"status": "finished", "wall_seconds": 83.2, "model": {"name": "tiny", "parameters": 1234567},
             "task": {"name": "facts", "train_questions": 600,
                      "data": {"train": "rows.jsonl", "sha256": "0123456789ab" * 5 + "cdef"}},
             "format": {"name": "chat", "calls": "hermes"}, "tools": ["search", "clock"],
             "rewards": {"mine.exact": 0.5},
             "machine": {"cores": 2, "processor": "<b>CPU</b>"}, "versions": {"torch": "2.13.0"}}  # fmt: skip
    (path / "run.json").write_text(json.dumps(facts))
    (path / "config.yaml").write_text(
        f"policy: {{preset: {preset}}}\nrollout: {{paths: 2, branch_penalty: 0.05, branch_threshold: 0.5}}\n"
    )
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    (path / "evals.jsonl").write_text("".join(json.dumps(record) + "\n" for record in evals))
    save_trees(path, 2, hand_made_tree())
    return path


def page_data(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


class Elements(HTMLParser):
    """Every element of a page, with its attributes, and the text outside of scripts and styles."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data if self.cdata_elem is None else ""


def browser(page: FilePath, profile: FilePath) -> tuple[str, str]:
    """The page as chromium has drawn it, and what it complained about."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--enable-logging=stderr", f"--user-data-dir={profile}")  # fmt: skip
    done = subprocess.run(["chromium", *flags, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
