"""The command line: `aepo train`, `eval`, `rollout`, `report`, `keys`, `bench`, `doctor`.

Heavy imports wait for their command.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Collection
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from aepo import cli_eval, cli_machine, cli_shared
from aepo.cli_shared import ConfigFile, Overrides, explained, fail, given_path
from aepo.files.user_paths import user_path
from aepo.install import DISTRIBUTION, explain_missing

if TYPE_CHECKING:
    from aepo.config import Config


class _Commands(TyperGroup):
    """A package that is missing is one line with the command that installs it, whatever the command was."""

    def invoke(self, ctx: Any) -> Any:  # typer brings a click of its own, in some versions
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("aepo", "aepo_kernels"):  # a fault of ours: worth a traceback
                raise
            fail(explain_missing(ctx.invoked_subcommand or "", error))


app = typer.Typer(
    cls=_Commands,
    help="Train tool-using language-model agents with AEPO (arXiv 2510.14545) and its relatives.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import aepo

        typer.echo(f"{DISTRIBUTION} {aepo.__version__}")
        raise typer.Exit


@app.callback()
def _before_any_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    resume: Annotated[Optional[str], typer.Option(metavar="RUN", help="Continue this run exactly.")] = None,  # noqa: UP045
    from_step: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="With --resume: not from the newest checkpoint."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run that is already in run.dir.")] = False,
) -> None:
    """Train an agent.

    Settings come from the defaults, then from --config, then from the command line.

    The demo: a small agent learns to search and to calculate

        aepo train --config configs/demo.yaml

    Other algorithms, from the same configuration:

        aepo train --config configs/demo.yaml policy.preset=arpo rollout.fresh_paths=4 rollout.branch_penalty=0

        aepo train --config configs/demo.yaml policy.preset=grpo rollout.fresh_paths=8

    A loss of your own, the function `clipped` of my_losses.py in the current directory (docs/own_loss.md):

        aepo train --config configs/demo.yaml policy.loss=my_losses:clipped

    After Ctrl-C or an error, with the settings of that run, which may be extended:

        aepo train --resume runs/demo train.steps=200
    """
    from aepo.config import load_config, named_settings
    from aepo.run.files import read_facts, regular

    with explained():
        if resume is None:
            if from_step is not None:
                raise ValueError("--from-step: expected --resume RUN with it")
            settings, step = load_config(given_path("--config", config), overrides or ()), None
        else:
            if config is not None or overwrite:
                raise ValueError("--resume continues a run with its own settings: expected no --config, no --overwrite")
            if "run.dir" in named_settings(overrides or ()):
                raise ValueError(f"run.dir: expected not to be set with --resume, the run is {resume}")
            run = user_path("--resume", resume)
            read_facts(run)
            settings = load_config(regular(run / "config.yaml"), overrides or ())
            settings = replace(settings, run=replace(settings.run, dir=str(run)))  # it may have been moved
            step = cli_shared.newest_step(run) if from_step is None else from_step
        _train(settings, step, overwrite, named_settings(overrides or ()))


app.command("eval")(cli_eval.evaluate)
app.command()(cli_eval.rollout)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="The page; default: report.html in the run."),
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Serve the page, and follow the run while it goes on.")] = False,
    port: Annotated[Optional[int], typer.Option(help="With --live; default: 8765, 0: any free one.")] = None,  # noqa: UP045
) -> None:
    """Write a self-contained HTML page: curves, answers, rollout trees. Several runs are laid over each other.

    One run; two runs compared

        aepo report runs/demo

        aepo report runs/demo runs/grpo

    While a run goes on: a page that follows it, on this machine alone

        aepo report runs/demo --live
    """
    import jinja2  # noqa: F401, which the page needs: said before anything is read

    from aepo.report import serve_report, write_report

    with explained():
        named = [user_path("RUN", run) for run in runs]
        if not live:
            if port is not None:
                raise ValueError(f"--port {port}: expected --live with it")
            page = write_report(named, given_path("--out", out))
        elif out is not None:
            raise ValueError(f"--out {out}: expected no --live with it, which writes no file")
        else:
            serve_report(named, 8765 if port is None else port)
            return
    typer.echo(f"wrote {page}")


@app.command()
def keys(pattern: Annotated[str, typer.Argument(help="Only keys that contain this.")] = "") -> None:
    """List all settings: key, default, meaning, and what values are expected."""
    from aepo.config import all_keys

    chosen = [entry for entry in all_keys() if pattern in entry.name]
    if not chosen:
        words = {word for entry in all_keys() for word in (entry.name, *entry.name.split("."))}
        near = difflib.get_close_matches(pattern, words, 1)
        fail(f"no key contains {pattern!r}{f': did you mean {near[0]!r}?' if near else ''}")
    for entry in chosen:
        typer.echo(f"{entry.name} = {json.dumps(entry.default)}\n    {entry.help} ({entry.expected})")


app.command()(cli_machine.bench)
app.command()(cli_machine.doctor)


def main() -> None:
    """The `aepo` command."""
    app()


def _train(config: Config, resume_step: int | None, overwrite: bool, named: Collection[str]) -> None:
    from aepo.advantages import advantage_settings
    from aepo.config import named_files
    from aepo.own_loss import own_loss, try_own_loss
    from aepo.rollout.branching import branch_rule
    from aepo.rollout.engine import own_engine
    from aepo.run.directory import RunDirectory
    from aepo.run.log import naming_its_directory

    directory = Path(config.run.dir)  # what is wrong with it is said before minutes of work on the model
    RunDirectory.check(directory, resume_step=resume_step, overwrite=overwrite, needed=named_files(config))
    advantage_settings(config.policy)
    branch_rule(config.rollout)
    if ":" in config.rollout.engine:
        own_engine(config.rollout.engine)
    if config.policy.loss is not None:
        import torch

        function = own_loss(config.policy.loss)
        dtype = torch.float64 if config.model.dtype == "float64" else torch.float32
        try_own_loss(function, config, dtype, cli_shared.device(config))
    with naming_its_directory(None if resume_step is None else directory):
        agent, language_model = cli_shared.load(config)
    with closing(agent), cli_shared.advising_if_full(directory):
        from aepo.trainer import Trainer

        Trainer(config, agent, language_model, resume_step=resume_step, overwrite=overwrite, named=named).train()
    typer.echo(f"finished: {directory}. Look at it with: aepo report {shlex.quote(str(directory))}")


if __name__ == "__main__":
    main()
