"""What a run remembers of how it was begun, and what of it is no longer so when it is resumed."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from aepo.agents.agent import Agent
from aepo.agents.remembered import agent_facts, agent_parts, not_as_recorded
from aepo.config import Config, changed_settings, load_config
from aepo.learning.learner import Learner
from aepo.own_code import code_changes, code_facts, code_of, named_part
from aepo.parallel import Parallel, number_of_weights
from aepo.run.checkpoint import records_before
from aepo.run.checkpoint_fit import require_tokenizer, weights_sha256
from aepo.run.records import require_records

if TYPE_CHECKING:
    from aepo.models.language_model import LanguageModel


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

    def compare_starting_weights(self, learner: Learner, parallel: Parallel) -> None:
        """Those that the learner keeps as its reference. A run that has none may be resumed with others."""
        weights = number_of_weights(parallel, learner.model)
        sizes = {"parameters": weights, "vocab_size": learner.model.config.get_text_config().vocab_size}
        self.facts = {"model": {"name": self._config.model.name, **sizes}, **self.facts}
        if self._recorded is not None and not learner.has_reference:
            return
        digest = weights_sha256(learner.model, parallel)
        self.facts["starting_weights"] = digest
        was = (self._recorded or {}).get("starting_weights", digest)  # runs of before have no record of them
        if was == digest:
            return
        if not {"model.name", "model.dtype"} & {*self._named}:
            raise ValueError(
                f"model.name = {self._config.model.name!r}: expected the weights that {self._config.run.dir} was begun "
                f"with, which are its reference (SHA-256 {was[:12]}..), got others ({digest[:12]}..). Put them back, "
                "or give model.name in this command, to say that these are meant from here on"
            )
        self._changed.append(f"the frozen starting weights were {was[:12]}.. and are {digest[:12]}..")

    def compare_checkpoint(self, path: Path, step: int, language_model: LanguageModel) -> None:
        """The one that the run goes on from, which has been loaded: its tokenizer, records and settings."""
        require_tokenizer(path, language_model, self._config.model.name)
        require_records(Path(self._config.run.dir), records_before(path), path)
        if step > self._config.train.steps:
            raise ValueError(f"train.steps = {self._config.train.steps}: expected {step} or more, it has made them")
        changed = changed_settings(load_config(path / "run.yaml"), self._config)
        self._changed = [
            *(f"{name} was {was!r} and is {now!r}" for name, (was, now) in changed.items() if name != "run.dir"),
            *self._changed,
        ]

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
        **named_part("rollout.engine", rollout.engine),
    }
