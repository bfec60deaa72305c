"""The command line: `aepo train`, `eval`, `report`, `keys`, `bench`, `doctor`. Heavy imports wait for their command."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer
from typer.core import TyperGroup

from aepo.install import DISTRIBUTION, explain_missing

if TYPE_CHECKING:
    from aepo.agents.agent import Agent
    from aepo.config import Config
    from aepo.models.language_model import LanguageModel

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class _Commands(TyperGroup):
    """A package that is missing is one line with the command that installs it, whatever the command was."""

    def invoke(self, ctx: Any) -> Any:  # typer brings a click of its own, in some versions
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("aepo", "aepo_kernels"):  # a fault of ours: worth a traceback
                raise
            _fail(explain_missing(ctx.invoked_subcommand or "", error))


app = typer.Typer(
    cls=_Commands,
    help="Train tool-using language-model agents with AEPO (arXiv 2510.14545) and its relatives.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045, typer on Python 3.10 reads this form alone
    typer.Argument(metavar="[section.key=value]...", help="Settings, e.g. train.steps=100; `aepo keys` lists them."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


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
    config: Annotated[Optional[Path], typer.Option(help="A YAML file with settings.")] = None,  # noqa: UP045
    resume: Annotated[Optional[Path], typer.Option(metavar="RUN", help="Continue this run exactly.")] = None,  # noqa: UP045
    from_step: Annotated[Optional[int], typer.Option(help="With --resume: not from the newest checkpoint.")] = None,  # noqa: UP045
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
    from aepo.config import load_config

    with _explained():
        if resume is None:
            if from_step is not None:
                raise ValueError("--from-step: expected --resume RUN with it")
            settings, step = load_config(config, overrides or ()), None
        else:
            if config is not None or overwrite:
                raise ValueError("--resume continues a run with its own settings: expected no --config, no --overwrite")
            settings = load_config(resume / "config.yaml", [*(overrides or ()), f"run.dir={resume}"])
            step = _newest_step(resume) if from_step is None else from_step
        another_agent = any(override.startswith(("task.", "format.")) for override in overrides or ())
        _train(settings, step, overwrite, another_agent)


@app.command("eval")
def evaluate(
    run: RunPath,
    step: Annotated[Optional[int], typer.Option(help="Of the checkpoint; default: the newest.")] = None,  # noqa: UP045
    best: Annotated[bool, typer.Option(help="The checkpoint with the highest held-out success.")] = False,
    questions: Annotated[Optional[int], typer.Option(help="Held-out questions; default: all.")] = None,  # noqa: UP045
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
) -> None:
    """Success of a checkpoint on held-out questions.

    aepo eval runs/demo --best
    """
    from aepo.config import load_config

    with _explained():
        settings = load_config(run / "config.yaml", [f"run.dir={run}", f"eval.temperature={temperature}"])
        chosen = _best_step(run) if best else _newest_step(run) if step is None else step
        _evaluate(settings, chosen, questions)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[Optional[Path], typer.Option(help="The page; default: report.html in the run.")] = None,  # noqa: UP045
) -> None:
    """Write a self-contained HTML page: curves, and rollout trees to look at. Several runs are laid over each other."""
    from aepo.report import write_report

    with _explained():
        typer.echo(f"wrote {write_report(runs, out)}")


@app.command()
def keys(pattern: Annotated[str, typer.Argument(help="Only keys that contain this.")] = "") -> None:
    """List all settings: key, default, meaning, and what values are expected."""
    from aepo.config import all_keys

    chosen = [entry for entry in all_keys() if pattern in entry.name]
    if not chosen:
        _fail(f"no key contains {pattern!r}")
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
    json_path: Annotated[Optional[Path], typer.Option("--json", metavar="FILE", help="Write all rows there.")] = None,  # noqa: UP045
    plot: Annotated[
        Optional[Path],  # noqa: UP045
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
    try:
        from aepo.bench.run import list_peers, run
        from aepo.bench.settings import Settings

        settings = Settings.from_text(
            device=device, tokens=tokens, vocab=vocab, dtype=dtype, hidden=hidden, rounds=rounds, quick=quick
        )
        if list_only:
            list_peers(settings.device)
        elif not run(settings, questions or (), threads=threads, json_path=json_path, plot_path=plot):
            _fail("a kernel of this library has no row, see above")
    except ValueError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """Say which backends, instruction sets and versions are present here, and what is missing."""
    from aepo.doctor import main as examine

    raise typer.Exit(examine(as_json))


def main() -> None:
    """The `aepo` command."""
    app()


def _train(config: Config, resume_step: int | None, overwrite: bool, another_agent: bool) -> None:
    from aepo.own_loss import own_loss, try_own_loss
    from aepo.run_log import refuse_existing_run, remove_run

    directory = Path(config.run.dir)  # what is wrong with it is said before minutes of work on the model
    if config.policy.loss is not None:
        import torch

        function = own_loss(config.policy.loss)
        dtype = torch.float64 if config.model.dtype == "float64" else torch.float32
        try_own_loss(function, config, dtype, _device(config))
    if resume_step is None:
        if overwrite:
            remove_run(directory)
        refuse_existing_run(directory)
    agent, language_model = _load(config)
    with closing(agent):
        from aepo.trainer import Trainer

        another = resume_step is not None and another_agent
        Trainer(config, agent, language_model, resume_step=resume_step, another_agent=another).train()
    typer.echo(f"finished: {directory}. Look at it with: aepo report {directory}")


def _evaluate(config: Config, step: int, count: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from aepo.agents.tools.toolbox import ToolBox
    from aepo.checkpoint import checkpoint_path, load_weights
    from aepo.engine_factory import make_engine
    from aepo.evaluation import evaluate, evaluation_sampler, heldout_questions

    task, language_model = _load(config)
    load_weights(checkpoint_path(Path(config.run.dir) / "checkpoints", step), language_model.model)
    questions = heldout_questions(task, count or len(task.heldout))
    with closing(make_engine(config, language_model, step)) as engine, closing(ToolBox(task.tools)) as toolbox:
        sampler = evaluation_sampler(engine, toolbox, language_model, config)
        record = evaluate(task, language_model, sampler, questions, seed=config.run.seed)
    table = Table("metric", "value", title=f"{config.run.dir}, step {step}", box=None)
    for key, value in record.items():
        table.add_row(key, f"{value:.4g}")
    Console().print(table)


def _load(config: Config) -> tuple[Agent, LanguageModel]:
    """The language model, with its warm start, on the configured device, and the agent that it plays.

    What is wrong with the data is said before the model is made.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from aepo.display import WarmStartDisplay
    from aepo.load import load_agent, load_model, load_task

    disable_progress_bar()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    task = load_task(config.task)
    with WarmStartDisplay() as display:
        language_model = load_model(config.model, config.warm_start, device=_device(config), progress=display.update)
    agent = load_agent(config, language_model, task)
    typer.echo(f"format: {agent.format.chosen}")
    for warning in agent.format.warnings:
        typer.echo(f"warning: {warning}", err=True)
    return agent, language_model


def _device(config: Config) -> str:
    import torch

    if config.run.device != "auto":
        return config.run.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _newest_step(run: Path) -> int:
    from aepo.checkpoint import list_checkpoints

    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise ValueError(f"{run}: no checkpoints there")
    return found[-1].step


def _best_step(run: Path) -> int:
    from aepo.checkpoint import best_checkpoint

    found = best_checkpoint(run / "checkpoints")
    if found is None:
        raise ValueError(f"{run}: no checkpoint with a held-out evaluation there")
    return found.step


@contextmanager
def _explained() -> Iterator[None]:
    """Errors that a user can do something about, as one message; Ctrl-C, or SIGTERM, with its exit code."""
    from aepo.checkpoint import CheckpointError
    from aepo.nonfinite import NonFiniteError
    from aepo.rollout.sampler import RolloutError

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # engines that have been started are then ended
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except RolloutError as error:
        if not isinstance(error.__cause__, (FloatingPointError, ConnectionError)):  # a fault of ours: worth a traceback
            raise
        _fail(str(error))
    except (ValueError, OSError, CheckpointError, NonFiniteError) as error:
        _fail(str(error))
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    main()
