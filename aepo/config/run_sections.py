"""Where a run is, what it measures, keeps and writes: sections of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from aepo.config.setting_types import Section, key
from aepo.files.user_paths import expanded


@dataclass(frozen=True)
class RunConfig(Section):
    section: ClassVar[str] = "run"
    dir: str = key("runs/default", "where this run's files go")
    seed: int = key(0, "all random numbers are functions of (seed, step, index)", low=0, high=2**31 - 1)
    device: Literal["auto", "cpu", "cuda"] = key(
        "auto", "auto: cuda where there is one, else cpu", instead={"gpu": "A GPU is run.device=cuda"}
    )
    threads: int = key(0, "CPU threads for torch; 0: leave torch's own choice", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dir", expanded("run.dir", self.dir))


@dataclass(frozen=True)
class EvalConfig(Section):
    section: ClassVar[str] = "eval"
    every: int = key(10, "steps between held-out evaluations; 0: only at the start and the end", low=0)
    questions: int = key(64, "held-out questions per evaluation", low=1)
    temperature: float = key(0.0, "0: greedy", low=0)
    samples: int = key(1, "answers to each question", low=1)
    pass_at: tuple[int, ...] = key((1,), "k of pass@k, each at most eval.samples", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"eval.samples = {self.samples}: expected 1 with eval.temperature = 0, greedy answers are all equal; "
                "eval.temperature=1 samples them as training does"
            )
        if max(self.pass_at, default=0) > self.samples:
            raise ValueError(f"eval.pass_at = {self.pass_at}: expected each at most eval.samples ({self.samples})")


@dataclass(frozen=True)
class CheckpointConfig(Section):
    section: ClassVar[str] = "checkpoint"
    every: int = key(10, "steps between checkpoints; 0: only at the end", low=0)
    keep: int = key(2, "newest checkpoints kept, next to the one with the best held-out success", low=1)


@dataclass(frozen=True)
class LogConfig(Section):
    section: ClassVar[str] = "log"
    tensorboard: bool = key(True, "write TensorBoard event files next to metrics.jsonl")
    wandb: str | None = key(None, "also log to this project of Weights & Biases (WANDB_MODE=offline: to files)")
    trees_every: int = key(10, "steps between saved rollout trees; 0: none", low=0)
    trees: int = key(2, "questions per saved step", low=1)
