"""What several commands need: settings as arguments, the model with its agent, and errors as one line."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, Optional

import typer

from aepo.files.user_paths import user_path
from aepo.interrupt import Interrupt

if TYPE_CHECKING:
    from aepo.agents.agent import Agent
    from aepo.config import Config
    from aepo.models.language_model import LanguageModel

INTERRUPTED = 130  # 128 + SIGINT, as shells report it

Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045, typer on Python 3.10 reads this form alone
    typer.Argument(metavar="[section.key=value]...", help="Settings, e.g. train.steps=100; `aepo keys` lists them."),
]
ConfigFile = Annotated[Optional[str], typer.Option(metavar="FILE", help="A YAML file with settings.")]  # noqa: UP045


def given_path(name: str, given: str | None) -> Path | None:
    """`user_path` of an argument that need not be there."""
    return None if given is None else user_path(name, given)


def load(config: Config) -> tuple[Agent, LanguageModel]:
    """The language model, with its warm start, on the configured device, and the agent that it plays.

    What is wrong with the data is said before the model is made.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from aepo.load import load_agent, load_model, load_task
    from aepo.run.display import WarmStartDisplay

    disable_progress_bar()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    task = load_task(config.task)
    with WarmStartDisplay() as display:
        language_model = load_model(config.model, config.warm_start, device=device(config), progress=display.update)
    agent = load_agent(config, language_model, task)
    typer.echo(described(config, agent))
    typer.echo(agent.format.chosen)
    for warning in agent.format.warnings:
        typer.echo(f"warning: {warning}", err=True)
    return agent, language_model


def described(config: Config, agent: Agent) -> str:
    """What is played, in a line: the default task is easily not what was meant with a model of one's own."""
    task = agent.task
    text = f"task {task.name}: {len(task.train)} training and {len(task.heldout)} held-out questions"
    columns = [f"{role} from {column!r}" for role, column in task.identity.get("columns", {}).items() if column]
    if config.task.name == "facts" and config.model.name != "tiny":
        return f"{text} (the demo's; task.name=files and task.train, or --config, for yours)"
    return f"{text}{', ' if columns else ''}{', '.join(columns)}"


def device(config: Config) -> str:
    """ValueError: it is not there."""
    import torch

    there = torch.cuda.is_available()
    if config.run.device == "cuda" and not there:
        raise ValueError("run.device = 'cuda': expected a GPU that torch can use, torch.cuda.is_available() is False")
    return config.run.device if config.run.device != "auto" else "cuda" if there else "cpu"


def newest_step(run: Path) -> int:
    from aepo.run.checkpoint import list_checkpoints

    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise ValueError(f"{run}: no checkpoints there")
    return found[-1].step


@contextmanager
def advising_if_full(run: Path) -> Iterator[None]:
    """Where the disk of a run is full, how to go on is a line before the error."""
    from aepo.run.checkpoint import list_checkpoints

    try:
        yield
    except Exception as error:
        causes = (error, error.__cause__, error.__context__)
        if any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in causes):
            saved = bool(list_checkpoints(run / "checkpoints"))
            how = (
                f"aepo train --resume {shlex.quote(str(run))}"
                if saved
                else "the same command, with --overwrite if it refuses"
            )
            typer.echo(f"the disk of {run} is full: make room, then go on with: {how}", err=True)
        raise


@contextmanager
def explained() -> Iterator[None]:
    """Errors that a user can do something about, as one message; Ctrl-C, SIGTERM or SIGHUP with its exit code."""
    from aepo.agents.protocol import AgentError
    from aepo.learning.nonfinite import NonFiniteError
    from aepo.rollout.sampler import RolloutError
    from aepo.run.checkpoint import CheckpointError

    interrupt = Interrupt()
    try:
        with interrupt, interrupt.allowed():
            yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except RolloutError as error:
        if not isinstance(error.__cause__, (FloatingPointError, ConnectionError)):  # a fault of ours: worth a traceback
            raise
        fail(str(error))
    except (ValueError, OSError, AgentError, CheckpointError, NonFiniteError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
