"""The branching decision from a record, while its request may still be running: the rule of aepo.branching."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from aepo.branching import branch_chance, entropy_change, mean_entropy
from aepo.config import RolloutConfig
from aepo.vllm.records import EntropyRecords

# Names of a query, and the settings (with their defaults and ranges) that they stand for.
SETTINGS = {
    "window": "entropy_window",
    "alpha": "branch_alpha",
    "gamma": "branch_gamma",
    "penalty": "branch_penalty",
    "threshold": "branch_threshold",
}
START = ("initial_entropy", "initial_key")


def branch_rule(query: Mapping[str, Any]) -> RolloutConfig:
    """The settings of a query; raises ValueError or TypeError where it cannot be answered."""
    unknown = query.keys() - SETTINGS.keys() - {*START, "consecutive"}
    if unknown:
        known = sorted((*SETTINGS, *START, "consecutive"))
        raise ValueError(f"query has unknown names {reprlib.repr(sorted(unknown))}; known: {known}")
    if len(query.keys() & set(START)) != 1:
        raise ValueError(
            f"query must have one of initial_entropy (nats) and initial_key; got {reprlib.repr(sorted(query))}"
        )
    if "alpha" not in query:
        raise ValueError("query must have alpha, the base chance (a uniform draw in [0, 1) where it is random)")
    for name, value in query.items():
        expected: tuple[type, ...] = {"initial_key": (str,), "window": (int,), "consecutive": (int,)}.get(
            name, (int, float)
        )
        if not isinstance(value, expected) or isinstance(value, bool):
            raise TypeError(f"{name} must be {' or '.join(t.__name__ for t in expected)}; got {reprlib.repr(value)}")
    for name, high in (("alpha", 1), ("gamma", math.inf), ("initial_entropy", math.inf)):
        value = query.get(name, 0)
        if not (0 <= value <= high and value < math.inf):
            bounds = "in [0, 1]" if high == 1 else "finite and >= 0"
            raise ValueError(f"{name} must be {bounds}; got {reprlib.repr(value)}")
    if query.get("consecutive", 0) < 0:
        raise ValueError(f"consecutive must be >= 0; got {reprlib.repr(query['consecutive'])}")
    return RolloutConfig(**{SETTINGS[name]: value for name, value in query.items() if name in SETTINGS})


def decide(
    records: EntropyRecords, queries: Mapping[str, Mapping[str, Any]], log_vocabulary: float, drafted: int
) -> tuple[dict[str, dict[str, float] | None], dict[str, str]]:
    """Decision per key, None where fewer than `window` tokens are known yet, and what is wrong with other keys.

    drafted: speculative tokens per step. So many of the last recorded positions may be of tokens that were rejected.
    """
    rules = {key: branch_rule(query) for key, query in queries.items()}
    needed = {key: rule.entropy_window + drafted for key, rule in rules.items()}
    limits = dict(needed)
    for key, query in queries.items():
        if "initial_key" in query:
            limits[query["initial_key"]] = max(limits.get(query["initial_key"], 0), needed[key])
    entropies, problems = records.first(limits)
    decisions: dict[str, dict[str, float] | None] = {}
    for key, query in queries.items():
        rule, initial = rules[key], query.get("initial_key")
        if key in problems or initial in problems:
            continue
        if initial is not None and drafted and len(entropies[initial]) < needed[key]:
            problems[initial] = f"short, and drafted tokens may be among its last {drafted}: give initial_entropy"
            continue
        if len(entropies[key]) < needed[key] or (initial is not None and not entropies[initial]):
            decisions[key] = None
            continue
        entropy = mean_entropy(entropies[key], rule.entropy_window)
        start = query["initial_entropy"] if initial is None else mean_entropy(entropies[initial], rule.entropy_window)
        delta = entropy_change(entropy, start, log_vocabulary)
        chance = branch_chance(
            delta,
            alpha=query["alpha"],
            gamma=rule.branch_gamma,
            penalty=rule.branch_penalty,
            consecutive=query.get("consecutive", 0),
        )
        decisions[key] = {
            "entropy": entropy,
            "delta": delta,
            "probability": chance,
            "branch": chance > rule.branch_threshold,
        }
    return decisions, problems
