"""The reward functions that `task.rewards` names, with their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from aepo.agents.protocol import USER_ERRORS, RewardFunction
from aepo.agents.rewards.adapt import FORMS, GroupReward
from aepo.agents.rewards.builtin import BUILTIN
from aepo.registry import error_text, resolve

_EXPECTED = f"a list of names or {{name: weight}}; a name is {', '.join(BUILTIN)} or package.module:function"


def make_rewards(named: Any, setting: str = "task.rewards") -> dict[RewardFunction, float]:
    """One name, a list of names, or names with weights. ValueError, in one line, for what cannot be used."""
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, (Mapping, Sequence)) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{setting} = {named!r}: expected {_EXPECTED}")
    if len(set(names)) < len(names):
        raise ValueError(f"{setting} = {named!r}: expected every function once")
    weights = names if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"{setting}.{name} = {weight!r}: expected a finite number as its weight")
    if not any(weights.values()):
        raise ValueError(f"{setting} = {named!r}: expected a weight that is not 0, every reward would be")
    return {_function(name, setting): float(weight) for name, weight in weights.items()}


def _function(name: str, setting: str) -> RewardFunction:
    if ":" not in name:
        if name not in BUILTIN:
            raise ValueError(f"{setting} = {name!r}: expected {', '.join(BUILTIN)} or package.module:function")
        return BUILTIN[name]
    found = resolve(name, setting)
    if isinstance(found, type):
        try:
            found = found()
        except USER_ERRORS as error:  # whatever the user's code does
            problem = f"making one without arguments failed: {error_text(error)}"
            raise ValueError(f"{setting} = {name!r}: {problem}") from error
    if not callable(found):
        raise ValueError(f"{setting} = {name!r}: expected {FORMS}; it is of type {type(found).__name__}")
    GroupReward(found)  # its signature
    return found
