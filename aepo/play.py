"""Lets a checkpoint of a run, or a model, work on questions without training, and reports what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console

from aepo import cli_shared
from aepo.agents.agent import Agent
from aepo.agents.question_checks import Context, Split, check_questions, fitting, one_of_each_row
from aepo.agents.remembered import agent_facts, agent_parts, not_as_recorded
from aepo.answers import AnsweredQuestion, read_answers, write_answers
from aepo.config import Config, config_value
from aepo.estimates import Interval
from aepo.evaluation import (
    Evaluator,
    answer_intervals,
    answer_metrics,
    questions_at_once,
    sampled_questions,
    scored_rollouts,
)
from aepo.evaluation_display import evaluation_tables, progress_display, rollout_table, say, wide_console
from aepo.models.language_model import LanguageModel
from aepo.own_code import code_changes, code_facts, code_of, named_part
from aepo.parallel import OneProcess
from aepo.rollout.branching import branch_rule
from aepo.rollout.engine import Engine
from aepo.rollout.engines.make import make_engine
from aepo.rollout.sampler import Sampler
from aepo.run.checkpoint import checkpoint_path
from aepo.run.checkpoint_fit import require_tokenizer
from aepo.run.checkpoint_load import load_weights
from aepo.run.files import write_file
from aepo.run.log import naming_its_directory, read_facts
from aepo.run.machine import machine_facts
from aepo.run.metrics import rollout_metrics
from aepo.run.outputs import refuse_output, refuse_run_files
from aepo.run.records import Record, finite
from aepo.run.saved_trees import tree_entry
from aepo.scoring import Scorer
from aepo.subject import Subject
from aepo.types import Question, ScoredTree


@dataclass(frozen=True)
class Player:
    """All that works on questions. facts: as in run.json."""

    config: Config
    agent: Agent
    engine: Engine
    facts: Record

    def scorer(self, questions: Sequence[Question]) -> Scorer:
        return Scorer(self.agent.rewards, self.agent.format, self.config.task.success, one_of_each_row(questions))

    def questions(self, heldout: bool, count: int | None, console: Console) -> Sequence[Question]:
        """`count` of them, None: all, without those that settings leave out. ValueError: some cannot be used."""
        split: Split = "held-out" if heldout else "training"
        chosen = sampled_questions(_questions(self.agent, split), count)
        check_questions(self.agent, chosen, split, console)
        context = Context.of(self.config, self.engine.max_positions)
        return fitting(self.agent, chosen, split, context, console, drop=self.config.task.long_prompts == "drop")


@contextlib.contextmanager
def loaded(subject: Subject, console: Console, own_rule: str | None = None) -> Iterator[Player]:
    """Weights, agent and engine; says where they are not those of the run. ValueError: nobody asked for that.

    own_rule: the branch rule, where it is used.
    """
    config = subject.config
    with naming_its_directory(subject.run):
        agent, language_model = cli_shared.load(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(closing(agent))
        facts, code = agent_facts(agent), code_of(agent_parts(agent) | named_part("rollout.branch_rule", own_rule))
        for name, was in subject.changed.items():
            say(console, f"set here: {name} = {config_value(config, name)!r} (the run: {was!r})")
        if subject.run is not None and subject.step is not None:
            recorded = read_facts(subject.run)
            for difference in not_as_recorded(subject.name, recorded, facts, named=subject.named):
                say(console, f"not as in the run: {difference}")
            for edited in code_changes(recorded.get("code"), code):
                say(console, f"warning: {edited}")
            checkpoint = checkpoint_path(subject.run / "checkpoints", subject.step)
            load_weights(checkpoint, language_model.model)
            require_tokenizer(checkpoint, language_model, config.model.name)
        directory = stack.enter_context(tempfile.TemporaryDirectory())  # where vLLM gets the weights from; not in a run
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=directory))
        engine = make_engine(config, language_model, agent.format.eos_ids, subject.step or 0, OneProcess())
        stack.enter_context(closing(engine))
        yield Player(config, agent, engine, _facts(subject, language_model, {**facts, "code": code_facts(code)}))


def run_evaluation(subject: Subject, every: bool, answers: Path | None, json_out: Path | TextIO | None) -> None:
    """every: all held-out questions, else `eval.questions` of them. Whatever ends it, what was finished is reported."""
    given = {"--answers": answers, "--json": json_out}
    paths = {name: path for name, path in given.items() if isinstance(path, Path)}
    for name, path in paths.items():
        refuse_output(name, path)
    if len(paths) == 2 and answers == json_out:
        raise ValueError(f"--answers {answers}: expected another file than that of --json")
    console = wide_console()
    with loaded(subject, console) as player:
        start = time.perf_counter()
        questions = player.questions(True, None if every else player.config.eval.questions, console)
        evaluator = Evaluator(player.engine, player.agent, player.scorer(questions), player.config)
        answered: list[AnsweredQuestion] = []
        try:
            with progress_display(console) as progress:
                for one in evaluator.answers(questions, progress):
                    answered.append(one)
        finally:
            if answered:
                metrics = answer_metrics(answered, subject.config.eval.pass_at)
                asked = {"questions.asked": len(questions), "seconds": time.perf_counter() - start}
                intervals = answer_intervals(answered, subject.config.eval.pass_at, subject.config.run.seed)
                if answers is not None:
                    write_answers(answers, subject.step, answered)
                if json_out is not None:
                    _write_json(json_out, _record(subject, player.agent, {**metrics, **asked}, intervals))
                _print_evaluation(subject, console, {**metrics, **asked}, intervals, answered)


def run_rollout(subject: Subject, count: int, heldout: bool, out: Path) -> None:
    """Trees of `count` questions as training samples them. Whatever ends it, those that were finished are written."""
    refuse_run_files("--out", out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: expected a new or an empty directory")
    try:
        out.mkdir(exist_ok=True)  # before the work, not after it
    except OSError as error:
        raise ValueError(f"--out {out}: expected a directory that can be made: {error.strerror}") from None
    console = wide_console()
    with loaded(subject, console, subject.config.rollout.branch_rule) as player:
        config, agent = player.config, player.agent
        questions = player.questions(heldout, count, console)
        sampler = Sampler(player.engine, agent, config.rollout, branch_rule(config.rollout))
        at_once, seed = questions_at_once(config, config.rollout.paths), config.run.seed << 32
        scorer = player.scorer(questions)
        scored: list[ScoredTree] = []
        try:
            with progress_display(console) as progress:
                for one in scored_rollouts(sampler, scorer, questions, seed, at_once=at_once, progress=progress):
                    scored.append(one)
        finally:
            if scored:
                page = _write_rollouts(out, subject, player, scored)
                part = f" of {len(questions)}, the others were not finished" * (len(scored) < len(questions))
                say(console, f"{subject}: {len(scored)} questions{part}")
                console.print(rollout_table(rollout_metrics(scored)))
                say(console, f"wrote {out}; look at {page}")


def _questions(agent: Agent, split: Split) -> Sequence[Question]:
    questions = agent.task.heldout if split == "held-out" else agent.task.train
    if not len(questions):
        raise ValueError(f"task {agent.task.name!r} has no {split} questions")
    return questions


def _facts(subject: Subject, language_model: LanguageModel, own: Record) -> Record:
    """As in run.json. own: of the agent and its code."""
    parameters = sum(p.numel() for p in language_model.model.parameters())
    model = {"name": subject.config.model.name, "parameters": parameters, "vocab_size": language_model.vocab_size}
    return {"name": str(subject), "model": model, **own, **machine_facts()}


def _record(subject: Subject, agent: Agent, metrics: Record, intervals: Mapping[str, Interval | None]) -> Record:
    """For machines: what was asked, flat metrics, and `interval.<metric>` with its two ends, or null."""
    return {
        "subject": subject.name,
        "step": subject.step,
        "task": agent.task.name,
        "temperature": subject.config.eval.temperature,
        "changed": {name: config_value(subject.config, name) for name in subject.changed},
        **finite(metrics),
        **{f"interval.{name}": found for name, found in intervals.items()},
    }


def _print_evaluation(
    subject: Subject,
    console: Console,
    record: Record,
    intervals: Mapping[str, Interval | None],
    answered: Sequence[AnsweredQuestion],
) -> None:
    count, asked, settings = len(answered), record["questions.asked"], subject.config.eval
    part = f" of {asked}, the others were not finished" * (count < asked)
    each = "1 answer" if settings.samples == 1 else f"{settings.samples} answers"
    say(
        console,
        f"{subject}: {count} questions{part}, {each} each at temperature {settings.temperature:g}, "
        f"{record['seconds']:.1f} s",
    )
    for table in evaluation_tables(record, intervals, answered):
        console.print(table)
    say(
        console,
        "95 %: of the mean over resampled questions; -: equal everywhere, or one question, which says nothing",
    )


def _write_rollouts(out: Path, subject: Subject, player: Player, scored: Sequence[ScoredTree]) -> Path:
    """The files of RUN/trees and RUN/answers, and the page."""
    from aepo.report import write_rollout_page

    step, config = subject.step or 0, player.config
    entries = [tree_entry(one, player.agent.format.decode) for one in scored]
    (out / "trees").mkdir()
    about = {"step": step, "vocab_size": player.facts["model"]["vocab_size"], "temperature": config.rollout.temperature}
    _write_json(out / "trees" / f"step_{step:06d}.json", {**about, "trees": entries})
    write_answers(out / "answers.jsonl", subject.step, [read_answers(one, player.agent.format) for one in scored])
    return write_rollout_page(entries, player.facts, out / "rollout.html", config=dataclasses.asdict(subject.config))


def _write_json(out: Path | TextIO, record: Record) -> None:
    """A file is whole, or what it was before."""
    text = json.dumps(record, default=str, indent=2 if "trees" not in record else None) + "\n"
    if not isinstance(out, Path):
        out.write(text)
        return
    write_file(out, text)
