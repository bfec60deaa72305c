"""From what task.rewards names to reward functions with their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aepo.agents.protocol import RewardFunction
from aepo.registry import resolve


def make_rewards(items: Any) -> Mapping[RewardFunction, float]:
    return {resolve(name, "task.rewards"): weight for name, weight in items.items()}
