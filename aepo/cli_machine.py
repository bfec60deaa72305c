"""`aepo bench` and `aepo doctor`: what this machine does with the kernels, what it lacks, and which model fits it."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from aepo.cli_shared import INTERRUPTED, ConfigFile, Overrides, explained, fail, given_path
from aepo.files.user_paths import user_path
from aepo.interrupt import Interrupt


def bench(
    questions: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[QUESTION]...",
            help="token-stats, policy-loss, linear, decode or sample, default: all; or trainers, alone.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One small shape each: does it all run?")] = False,
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda; default: cuda if there.")] = None,  # noqa: UP045
    tokens: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Rows of logits (trainers: trained tokens), one number or several: 128,512."),
    ] = None,
    vocab: Annotated[Optional[str], typer.Option(help="Size of the vocabulary, one or several.")] = None,  # noqa: UP045
    hidden: Annotated[Optional[int], typer.Option(help="Size of the hidden states (linear, trainers).")] = None,  # noqa: UP045
    dtype: Annotated[Optional[str], typer.Option(help="bfloat16, float16 or float32.")] = None,  # noqa: UP045
    rounds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Timed rounds; default: 7, with --quick 3 (trainers: 3, 2)."),
    ] = None,
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

    One update by TRL, by TRL with our kernels, and by our own trainer; needs pip install "aepo-kernels[trl]"

        aepo bench trainers --device cpu --vocab 32000 --tokens 2048

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

        if config is not None or prompt_tokens is not None:
            fail("--config and --prompt-tokens: expected MODEL_DIR with them")
        raise typer.Exit(examine(as_json))  # without `explained`, whose kinds of errors need more than the kernels do
    with explained():
        from aepo.doctor.fit_tables import main as fits

        directory, file = user_path("MODEL_DIR", model), given_path("--config", config)
        fits(directory, file, overrides or (), prompt=prompt_tokens or 256, as_json=as_json)
