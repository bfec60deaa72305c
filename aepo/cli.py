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

from aepo import cli_eval, cli_shared
from aepo.cli_shared import INTERRUPTED, ConfigFile, Overrides, explained, fail, given_path
from aepo.files.user_paths import user_path
from aepo.install import DISTRIBUTION, explain_missing
from aepo.interrupt import Interrupt

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


@app.command()
def bench(
    questions: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[QUESTION]...", help="token-stats, policy-loss, linear, decode or sample; default: all."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One small shape each: does it all run?")] = False,
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda; default: cuda if there.")] = None,  # noqa: UP045
    tokens: Annotated[Optional[str], typer.Option(help="Rows of logits, one number or several: 128,512.")] = None,  # noqa: UP045
    vocab: Annotated[Optional[str], typer.Option(help="Size of the vocabulary, one or several.")] = None,  # noqa: UP045
    hidden: Annotated[Optional[int], typer.Option(help="Size of the hidden states (linear).")] = None,  # noqa: UP045
    dtype: Annotated[Optional[str], typer.Option(help="bfloat16, float16 or float32.")] = None,  # noqa: UP045
    rounds: Annotated[Optional[int], typer.Option(help="Timed rounds; default: 7, with --quick 3.")] = None,  # noqa: UP045
    threads: Annotated[Optional[int], typer.Option(help="CPU threads; default: torch's own choice.")] = None,  # noqa: UP045
    json_path: Annotated[Optional[str], typer.Option("--json", metavar="FILE", help="Write all rows there.")] = None,  # noqa: UP045
    plot: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="Draw time and memory as .svg or .png; needs several --tokens or --vocab."),
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="Which libraries are here to compare with; no run.")
    ] = False,
) -> None:
    """Measure the kernels on this machine, beside eager PyTorch, torch.compile and the libraries that are installed.

    Every row first passed a comparison with float64; ceilings are measured in the same run.

    All tables, a few minutes; a quick look; one table for your own model

        aepo bench

        aepo bench --quick

        aepo bench linear --tokens 4096 --vocab 151936 --hidden 2560

    A figure: time and memory of the losses against the number of tokens

        aepo bench linear policy-loss --tokens 128,256,512 --plot losses.svg

    Who is compared with: install trl, verl, liger-kernel, cut-cross-entropy, flash-attn or quack-kernels for their rows

        aepo bench --list
    """
    interrupt = Interrupt()
    try:
        with interrupt, interrupt.allowed():
            from aepo.bench.run import list_peers, run
            from aepo.bench.settings import Settings

            settings = Settings.from_text(
                device=device, tokens=tokens, vocab=vocab, dtype=dtype, hidden=hidden, rounds=rounds, quick=quick
            )
            if list_only:
                list_peers(settings.device)
                return
            json_file, figure = given_path("--json", json_path), given_path("--plot", plot)
            if not run(settings, questions or (), threads=threads, json_path=json_file, plot_path=figure):
                fail("a kernel of this library has no row, see above")
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def doctor(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[MODEL_DIR]", help="A model directory; its config.json is enough."),
    ] = None,
    overrides: Overrides = None,
    config: ConfigFile = None,
    prompt_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="With MODEL_DIR: tokens of a question with its instructions; default: 256."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say which backends, instruction sets and versions are present here, and what is missing.

    With a model directory: memory and seconds of training it, and whether that fits here and in common GPUs.

    This installation; a model; the run that these settings would start

        aepo doctor

        aepo doctor models/qwen

        aepo doctor models/qwen --config my.yaml train.tokens_per_microbatch=16384 model.dtype=bfloat16
    """
    if model is None:
        from aepo.doctor import main as examine

        with explained():
            if config is not None or prompt_tokens is not None:
                raise ValueError("--config and --prompt-tokens: expected MODEL_DIR with them")
        raise typer.Exit(examine(as_json))
    with explained():
        from aepo.doctor.fit_tables import main as fits

        directory, file = user_path("MODEL_DIR", model), given_path("--config", config)
        fits(directory, file, overrides or (), prompt=prompt_tokens or 256, as_json=as_json)


def main() -> None:
    """The `aepo` command."""
    app()


def _train(config: Config, resume_step: int | None, overwrite: bool, named: Collection[str]) -> None:
    from aepo.advantages import advantage_settings
    from aepo.config import named_files
    from aepo.own_loss import own_loss, try_own_loss
    from aepo.rollout.branching import branch_rule
    from aepo.run.directory import RunDirectory
    from aepo.run.log import naming_its_directory

    directory = Path(config.run.dir)  # what is wrong with it is said before minutes of work on the model
    RunDirectory.check(directory, resume_step=resume_step, overwrite=overwrite, needed=named_files(config))
    advantage_settings(config.policy)
    branch_rule(config.rollout)
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
