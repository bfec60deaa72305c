"""What a run remembers of how it was begun, and what of it is no longer so when it is resumed."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from aepo.agents.agent import Agent
from aepo.agents.remembered import agent_facts, agent_parts, not_as_recorded
from aepo.config import Config, changed_settings, load_config
from aepo.own_code import code_changes, code_facts, code_of, named_part


class Continuity:
    """`facts` are for run.json. recorded: that of a run which is resumed; None: a new one. named: the settings that
    were given for this time.

    Each part is compared when it is known. ValueError: one differs, and no named setting says that it is meant.
    """

    def __init__(
        self, config: Config, agent: Agent, recorded: Mapping[str, Any] | None, named: Collection[str]
    ) -> None:
        self._config, self._recorded, self._named = config, recorded, named
        facts, code = agent_facts(agent), code_of(agent_parts(agent) | _own_functions(config))
        self.facts: dict[str, Any] = {**facts, "code": code_facts(code)}  # as it is now: files may change meanwhile
        self._changed = not_as_recorded(config.run.dir, recorded, facts, named=named)
        self._edited = [] if recorded is None else code_changes(recorded.get("code"), code)

    def compare_settings(self, checkpoint: Path) -> None:
        """With those that it was written under."""
        changed = changed_settings(load_config(checkpoint / "run.yaml"), self._config)
        self._changed = [
            *(f"{name} was {was!r} and is {now!r}" for name, (was, now) in changed.items() if name != "run.dir"),
            *self._changed,
        ]

    def compare_starting_weights(self, digest: str) -> None:
        """Of the frozen weights. Runs of before have no record of them."""
        self.facts["starting_weights"] = digest
        was = (self._recorded or {}).get("starting_weights", digest)
        if was == digest:
            return
        if not {"model.name", "model.dtype"} & {*self._named}:
            raise ValueError(
                f"model.name = {self._config.model.name!r}: expected the weights that {self._config.run.dir} was begun "
                f"with, which are its reference (SHA-256 {was[:12]}..), got others ({digest[:12]}..). Put them back, "
                "or give model.name in this command, to say that these are meant from here on"
            )
        self._changed.append(f"the frozen starting weights were {was[:12]}.. and are {digest[:12]}..")

    def compare_long_prompts(self, dropped: Mapping[str, Any]) -> None:
        self.facts |= dropped
        self._changed += not_as_recorded(self._config.run.dir, self._recorded, dropped, named=self._named)

    def announce(self, console: Console) -> list[str]:
        """Say what is not as it was; returns it."""
        changed = list(dict.fromkeys(self._changed))
        for line in changed:
            console.print(f"not as in the run: {line}", markup=False, highlight=False)
        for line in self._edited:
            print(f"warning: {line}", file=sys.stderr)
        return [*changed, *self._edited]


def _own_functions(config: Config) -> dict[str, list[Any]]:
    """Those of the user's own that are no part of the agent."""
    policy, rollout = config.policy, config.rollout
    return {
        **named_part("policy.loss", policy.loss),
        **named_part("policy.advantage", policy.advantage),
        **named_part("rollout.branch_rule", rollout.branch_rule),
    }
