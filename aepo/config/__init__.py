"""Every setting of a run: frozen dataclasses, one per section, with defaults, units, ranges and help texts.

A configuration is the defaults below, changed by one YAML file, changed by `section.key=value` overrides. Unknown keys
are errors that suggest the right one. This module imports no torch. `aepo keys` prints the whole list.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aepo.config.agent_sections import FormatConfig, ModelConfig, TaskConfig, WarmStartConfig
from aepo.config.learning_sections import OBJECTIVE_KEYS, OptimizerConfig, PolicyConfig, TrainConfig
from aepo.config.rollout_sections import RolloutConfig, VLLMConfig, server_of
from aepo.config.run_sections import CheckpointConfig, EvalConfig, LogConfig, RunConfig
from aepo.config.setting_types import Key, keys_of

__all__ = [
    "OBJECTIVE_KEYS",
    "CheckpointConfig",
    "Config",
    "EvalConfig",
    "FormatConfig",
    "Key",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "RolloutConfig",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
    "VLLMConfig",
    "WarmStartConfig",
    "all_keys",
    "changed_settings",
    "config_value",
    "load_config",
    "named_files",
    "named_settings",
    "server_of",
    "to_yaml",
]


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    format: FormatConfig = field(default_factory=FormatConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.train.minibatches > self.train.questions:
            raise ValueError(
                f"train.minibatches = {self.train.minibatches}: expected <= train.questions ({self.train.questions})"
            )
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature = 0: expected > 0 in training (eval.temperature may be 0)")
        if self.policy.importance_cap is not None and not self.recomputes_old_logprobs:
            raise ValueError(
                "policy.importance_cap weighs the trainer's log-probs against the engine's: "
                "expected policy.old_logprobs = recompute, or rollout.engine = vllm"
            )
        if self.rollout.engine == "vllm" and self.model.dtype == "float64" and self.vllm.dtype is None:
            raise ValueError(
                "vllm.dtype = null: expected float32, bfloat16 or float16, vLLM has no model.dtype = float64"
            )

    @property
    def recomputes_old_logprobs(self) -> bool:
        """Whether the trainer computes the log-probs of the old policy itself."""
        choice = self.policy.old_logprobs
        return choice == "recompute" or (choice == "auto" and self.rollout.engine != "huggingface")


def all_keys() -> list[Key]:
    """Every dotted key, in the order of this file."""
    return keys_of(Config)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file at `path`, then `section.key=value` overrides, of which the last one counts; of a
    setting that has keys, `section.setting.key=value` changes one.

    ValueError, in one line that names the setting, the file and its line: what cannot be read, a key that does not
    exist (the nearest right one is named), or a value of the wrong type or range.
    """
    from aepo.config.reading import read_settings  # which imports YAML

    return read_settings(Config, path, overrides)


def to_yaml(config: Config) -> str:
    """The whole configuration; `load_config` reads it back to an equal one."""
    from aepo.config.yaml_settings import dump

    return dump(dataclasses.asdict(config))


def changed_settings(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """By its dotted name each setting that differs: what it was, and what it is."""
    names = [entry.name for entry in all_keys()]
    values = {name: (config_value(before, name), config_value(now, name)) for name in names}
    return {name: (was, value) for name, (was, value) in values.items() if was != value}


def config_value(config: Config, name: str) -> Any:
    section, _, setting = name.partition(".")
    return getattr(getattr(config, section), setting)


def named_files(config: Config) -> Iterator[tuple[str, Path]]:
    """The files and directories that are there of those that settings name, each with its setting."""
    task = config.task
    settings = {
        "model.name": config.model.name,
        "task.train": task.train,
        "task.heldout": task.heldout,
        "task.system": task.system,
        "task.tools": [tool.removeprefix("search:") for tool in task.tools if tool.startswith("search:")],
    }
    for setting, value in settings.items():
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or "\0" in text:
                continue
            path = os.path.expanduser(text)
            patterns = setting in ("task.train", "task.heldout") and not os.path.lexists(path)
            found = glob.glob(path, recursive=True) if patterns else [path] if os.path.lexists(path) else []
            yield from ((setting, Path(one)) for one in found)


def named_settings(overrides: Sequence[str]) -> set[str]:
    """Those that `section.key=value` overrides give, also where it is one key of a setting."""
    return {".".join(override.partition("=")[0].split(".")[:2]) for override in overrides}
