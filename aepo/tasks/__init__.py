"""The tasks an agent can be trained on."""

from __future__ import annotations

from aepo.config import TaskConfig
from aepo.tasks.protocol import Task


def load_task(config: TaskConfig) -> Task:
    """The task by its name, which the configuration has checked."""
    from aepo.tasks.facts import FactsTask

    return {"facts": FactsTask}[config.name](config.seed)
