"""Where the numbers of a run go besides its own files: TensorBoard, and Weights & Biases.

None of them ends a run: the first error of one is a line on stderr, and nothing more is written to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from aepo.config import Config
from aepo.install import pip_install


class Board(Protocol):
    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, *, finished: bool) -> None: ...


class Boards:
    """Those that a configuration asks for. `step`: after which a run goes on; `wandb_id`: under which it is known."""

    def __init__(self, config: Config, directory: Path, step: int, wandb_id: str | None) -> None:
        self._boards: dict[str, Board] = {}  # by the setting that asks for it
        if config.log.tensorboard:
            self._open("log.tensorboard", lambda: TensorBoard(directory / "tensorboard", step))
        if wandb_id is not None:
            self._open("log.wandb", lambda: WeightsAndBiases(config, directory, wandb_id))

    def write(self, record: Mapping[str, object], prefix: str, step: int) -> None:
        """The numbers of a record; the part of a key before the first dot is its group."""
        values = {
            (prefix + key).replace(".", "/", 1): value
            for key, value in record.items()
            if isinstance(value, (int, float)) and key != "step"
        }
        for setting, board in list(self._boards.items()):
            with self._unless_it_fails(setting):
                board.write(values, step)

    def close(self, *, finished: bool) -> None:
        for setting, board in list(self._boards.items()):
            with self._unless_it_fails(setting):
                board.close(finished=finished)

    def _open(self, setting: str, make: Callable[[], Board]) -> None:
        with self._unless_it_fails(setting):
            self._boards[setting] = make()

    @contextlib.contextmanager
    def _unless_it_fails(self, setting: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._boards.pop(setting, None)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"warning: {setting}: {reason}; nothing more is written there", file=sys.stderr)


def require_boards(config: Config) -> None:
    """ModuleNotFoundError, with what to install, if the package of a board is missing."""
    if config.log.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ModuleNotFoundError(
            f"log.wandb = {config.log.wandb!r} needs wandb, which is not installed: {pip_install('wandb')}"
        )


class TensorBoard:
    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._directory = directory
        self._writer = SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._check()
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self, *, finished: bool) -> None:
        self._check()
        self._writer.close()

    def _check(self) -> None:
        """Its own error would come from a thread, as a traceback."""
        if not self._directory.is_dir():
            raise FileNotFoundError(f"{self._directory} is gone")


class WeightsAndBiases:
    """A run there goes by the name of the run directory. A resumed one continues it: steps that are trained again
    appear again."""

    def __init__(self, config: Config, directory: Path, wandb_id: str) -> None:
        import wandb

        self._run = wandb.init(
            project=config.log.wandb,
            name=config.run.dir,
            id=wandb_id,
            resume="allow",
            dir=str(directory),
            config=dataclasses.asdict(config),
            settings=wandb.Settings(console="off"),  # the run's own output stays where it is
        )
        self._run.define_metric("*", step_metric="step")  # evaluations and steps have the same axis

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
