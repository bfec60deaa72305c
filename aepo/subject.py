"""Whose answers are asked for: a checkpoint of a run, with all settings of the run, or a model as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aepo.config import Config, changed_settings, load_config, named_settings
from aepo.files.user_paths import user_path
from aepo.run.checkpoint import best_checkpoint, list_checkpoints
from aepo.run.refusals import require_whole_settings

BUILT_IN = ("tiny", "smollm2-135m-instruct")


@dataclass(frozen=True)
class Subject:
    """step: of the checkpoint; None: a model that is none of a run. changed: settings that differ from the run's, by
    their dotted names, with what the run had. named: those that the command gives, with whatever value."""

    name: str
    config: Config
    run: Path | None = None
    step: int | None = None
    changed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    named: Collection[str] = ()

    def __str__(self) -> str:
        return self.name if self.step is None else f"{self.name}, step {self.step}"


def find_subject(
    name: str, config: Path | None, overrides: Sequence[str], step: int | None = None, best: bool = False
) -> Subject:
    """ValueError, in one line: `name` is neither, or something is asked for that the other one has."""
    path = user_path("RUN|MODEL", name)
    if (path / "run.json").is_file():
        if config is not None:
            raise ValueError(
                f"--config {config}: expected none, {name} is a run and has its own; settings may follow it"
            )
        return _of_run(name, path, overrides, step, best)
    if not (path / "config.json").is_file() and name not in BUILT_IN:
        raise ValueError(
            f"{name}: expected a run (a directory with a run.json), a model directory (with a config.json), "
            f"{' or '.join(BUILT_IN)}"
        )
    if step is not None or best:
        raise ValueError(f"--{'best' if best else 'step'}: expected a run with it, {name} is a model")
    if config is None and (path / "run.yaml").is_file():
        raise ValueError(
            f"{name} is the checkpoint of a run: expected the run and --step, or --config {path / 'run.yaml'}"
        )
    return _of_model(name, config, overrides)


def _of_run(name: str, path: Path, overrides: Sequence[str], step: int | None, best: bool) -> Subject:
    require_whole_settings(path)
    _refuse(overrides, "run.dir", f"the run is {name}")
    if best and step is not None:
        raise ValueError(f"--best: expected no --step {step} with it")
    there = list_checkpoints(path / "checkpoints")
    chosen = best_checkpoint(path / "checkpoints") if best else there[-1] if there else None
    if chosen is None:
        raise ValueError(f"{name}: no checkpoint{' with a held-out evaluation' if best else ''} there")
    if step is not None and step not in [one.step for one in there]:
        raise ValueError(f"--step {step}: {name} has {', '.join(str(one.step) for one in there)}")
    before, now = load_config(path / "config.yaml"), load_config(path / "config.yaml", overrides)
    changed = {setting: was for setting, (was, _) in changed_settings(before, now).items()}
    here = dataclasses.replace(now, run=dataclasses.replace(now.run, dir=str(path)))  # it may have been moved
    return Subject(name, here, path, chosen.step if step is None else step, changed, named_settings(overrides))


def _of_model(name: str, config: Path | None, overrides: Sequence[str]) -> Subject:
    _refuse(overrides, "model.name", f"the model is {name}")
    settings = load_config(config, overrides)
    return Subject(name, dataclasses.replace(settings, model=dataclasses.replace(settings.model, name=name)))


def _refuse(overrides: Sequence[str], key: str, why: str) -> None:
    for override in overrides:
        if override.startswith(f"{key}="):
            raise ValueError(f"{override}: expected not to be set, {why}")
