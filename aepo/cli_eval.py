"""`aepo eval` and `aepo rollout`: what a run, or a model, does with questions, without training."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Optional

import typer

from aepo.cli_shared import ConfigFile, Overrides, explained, given_path
from aepo.files.user_paths import user_path

SubjectName = Annotated[
    str,
    typer.Argument(metavar="RUN|MODEL", help="A run directory, or a model: a directory, or tiny.", show_default=False),
]
Step = Annotated[Optional[int], typer.Option(help="Of the run's checkpoint; default: the newest.")]  # noqa: UP045
Best = Annotated[bool, typer.Option("--best", help="The run's checkpoint with the highest held-out success.")]


def evaluate(
    subject: SubjectName,
    overrides: Overrides = None,
    config: ConfigFile = None,
    step: Step = None,
    best: Best = False,
    samples: Annotated[Optional[int], typer.Option(min=1, help="Answers to each question: eval.samples.")] = None,  # noqa: UP045
    pass_at: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="K,K", help="Chance that one of k answers is right: eval.pass_at."),
    ] = None,
    temperature: Annotated[Optional[float], typer.Option(help="0: greedy. eval.temperature.")] = None,  # noqa: UP045
    questions: Annotated[Optional[int], typer.Option(min=1, help="Held-out questions; default: all.")] = None,  # noqa: UP045
    json_path: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--json", metavar="FILE", help="All numbers as JSON; -: to standard output, and nothing else."),
    ] = None,
    answers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="Every answer, one JSON line per question."),
    ] = None,
) -> None:
    """Success on held-out questions, with intervals.

    A run, with its own task, data and format

        aepo eval runs/demo --best

    The chance that one of 1, 5 or 10 answers is right, of 20 that are sampled

        aepo eval runs/demo --samples 20 --pass-at 1,5,10 --temperature 1

    A model as it is, and what it answers, beside the run that was trained from it

        aepo eval models/qwen --config my.yaml --answers before.jsonl

        aepo eval runs/mine --answers after.jsonl

    A run on other questions (docs/evaluation.md)

        aepo eval runs/mine task.heldout=harder.jsonl --json harder.json
    """
    shorthands = {
        "eval.samples": samples,
        "eval.pass_at": pass_at and f"[{pass_at}]",
        "eval.temperature": temperature,
        "eval.questions": questions,
    }
    given = [*(overrides or ()), *(f"{key}={value}" for key, value in shorthands.items() if value is not None)]
    every = not any(override.startswith("eval.questions=") for override in given)
    to_stdout, stdout = json_path == "-", sys.stdout
    with explained(), contextlib.redirect_stdout(sys.stderr) if to_stdout else contextlib.nullcontext():
        from aepo.play import run_evaluation
        from aepo.subject import find_subject

        json_out = stdout if to_stdout else given_path("--json", json_path)
        asked = find_subject(subject, given_path("--config", config), given, step, best)
        run_evaluation(asked, every, given_path("--answers", answers), json_out)


def rollout(
    subject: SubjectName,
    out: Annotated[str, typer.Option(metavar="DIR", help="A new directory for trees, answers and the page.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    step: Step = None,
    best: Best = False,
    questions: Annotated[int, typer.Option(min=1, help="How many, drawn from the data, always the same.")] = 8,
    heldout: Annotated[
        bool, typer.Option("--heldout", help="Of the held-out questions, not those of training.")
    ] = False,
) -> None:
    """Sample rollout trees as training does, without training, and write them with a page to look at.

    What a training step on your own data would see: before the first step

        aepo rollout models/qwen --config my.yaml --out rollouts/before

    and after the last one, with more branches

        aepo rollout runs/mine --out rollouts/after rollout.paths=16 rollout.branch_threshold=0.3
    """
    with explained():
        from aepo.play import run_rollout
        from aepo.subject import find_subject

        asked = find_subject(subject, given_path("--config", config), overrides or (), step, best)
        run_rollout(asked, questions, heldout, user_path("--out", out))
