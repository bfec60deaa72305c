"""The training loop: question -> rollout -> reward -> advantage -> pack -> loss -> step -> engine.

Everything random is a function of (seed, step), so the state of a run between two steps is its weights, the moments of
the optimizer and the number of the step: that is what a checkpoint holds, and why a resumed run continues exactly.
"""

from __future__ import annotations

import contextlib
import random
import shlex
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from aepo.advantages import Sample, advantage_settings, make_samples
from aepo.agents.agent import Agent
from aepo.agents.question_checks import Context, check_questions, fitting, one_of_each_row
from aepo.agents.remembered import agent_facts, agent_parts, not_as_recorded
from aepo.config import Config, changed_settings, load_config, named_files, to_yaml
from aepo.evaluation import Evaluator, answer_metrics, sampled_questions
from aepo.interrupt import Interrupt
from aepo.learning.learner import Learner, Minibatch
from aepo.own_code import code_changes, code_facts, code_of, named_part
from aepo.parallel import OneProcess
from aepo.rollout.branching import branch_rule
from aepo.rollout.engines.make import make_engine
from aepo.rollout.sampler import Sampler
from aepo.rollout.tree import flatten
from aepo.run.checkpoint import CheckpointError, checkpoint_path, load_checkpoint, records_before, save_checkpoint
from aepo.run.checkpoint_fit import require_tokenizer, weights_sha256
from aepo.run.directory import RunDirectory, refuse_removal
from aepo.run.display import Display
from aepo.run.files import read_facts
from aepo.run.log import RunLog
from aepo.run.metrics import Record, StageClock, loss_metrics, memory_metrics, mismatch_metrics, rollout_metrics
from aepo.run.records import fingerprints, require_records
from aepo.scoring import Scorer
from aepo.types import Question, ScoredTree

if TYPE_CHECKING:
    from aepo.models.language_model import LanguageModel


class Trainer:
    """One run, whose directory this process holds until `train` ends. `train` works until the last step, an error or a
    signal; what was finished by then is saved.

    The language model's weights are trained in place. resume_step: continue from the checkpoint of that step in
    `config.run.dir`; None: a new run, which must not find another one there, or is to `overwrite` it: it is replaced
    when all else is in order. OSError: another process works there. ValueError: the run was begun with another agent
    (task, data, format, tools, rewards) or another reference, unless `named`, the settings that were given for this
    time, holds one that says that it is meant; or with another tokenizer. What differs, settings and edited code too,
    is printed and recorded.
    """

    def __init__(
        self,
        config: Config,
        agent: Agent,
        language_model: LanguageModel,
        *,
        resume_step: int | None = None,
        overwrite: bool = False,
        named: Collection[str] = (),
    ) -> None:
        check_sizes(config, agent.task.name, agent.task.train, agent.task.heldout)
        self.config, self.agent, self.language_model = config, agent, language_model
        self.directory = Path(config.run.dir)
        self.interrupt = Interrupt()
        self.display = Display(config.train.steps)
        with contextlib.ExitStack() as undo:  # what has been taken is given back if something is wrong
            self.run_directory = RunDirectory.claim(self.directory, resume=resume_step is not None, overwrite=overwrite)
            undo.callback(self.run_directory.release)
            refuse_removal(self.directory, named_files(config), resume_step)
            facts, code = agent_facts(agent), code_of(agent_parts(agent) | _own_functions(config))
            self._remembered = {**facts, "code": code_facts(code)}  # as it is now: files may change during the run
            recorded = None if resume_step is None else read_facts(self.directory)
            changed = not_as_recorded(config.run.dir, recorded, facts, named=named)
            edited = [] if recorded is None else code_changes(recorded.get("code"), code)
            self.advantage_settings = advantage_settings(config.policy)
            self.train_questions = agent.task.train
            self.heldout: Sequence[Question] = sampled_questions(agent.task.heldout, config.eval.questions)
            rows = [*one_of_each_row(self.train_questions), *one_of_each_row(self.heldout)]
            self.scorer = Scorer(agent.rewards, agent.format, config.task.success, rows)
            self.scorer.try_out(rows[0])
            check_questions(agent, self.train_questions, "training", self.display.console)
            check_questions(agent, self.heldout, "held-out", self.display.console)
            rule = branch_rule(config.rollout)
            self.learner = Learner(language_model.model, config, agent.format.decode)
            if resume_step is None or self.learner.has_reference:
                self._remembered["starting_weights"] = weights_sha256(language_model.model)
                changed += _other_reference(config, recorded, self._remembered["starting_weights"], named)
            self.step = 0
            if resume_step is not None:
                path = checkpoint_path(self.directory / "checkpoints", resume_step)
                self.step = load_checkpoint(path, self.learner.model, self.learner.optimizer)
                require_tokenizer(path, language_model, config.model.name)
                require_records(self.directory, records_before(path), path)
                if self.step > config.train.steps:
                    raise ValueError(
                        f"train.steps = {config.train.steps}: expected {self.step} or more, it has made them"
                    )
                changed = [*_changed_settings(path / "run.yaml", config), *changed]
            self.engine = make_engine(config, language_model, agent.format.eos_ids, self.step, OneProcess())
            undo.callback(self.engine.close)
            dropped = self._drop_long_prompts()
            changed += not_as_recorded(config.run.dir, recorded, dropped, named=named)
            changed = list(dict.fromkeys(changed))
            for line in changed:
                self.display.console.print(f"not as in the run: {line}", markup=False, highlight=False)
            for line in edited:
                print(f"warning: {line}", file=sys.stderr)
            self.sampler = Sampler(self.engine, agent, config.rollout, rule)
            self.evaluator = Evaluator(self.engine, agent, self.scorer, config)
            if resume_step is None:
                self.run_directory.replace_old()
            elif (aside := self.run_directory.set_aside(self.step)) is not None:
                self.display.console.print(f"what came after step {self.step} is now in {aside}", markup=False)
            self.log = RunLog(
                self.run_directory,
                config,
                {**self._facts(), **dropped},
                self.step,
                resumed=resume_step is not None,
                changed=[*changed, *edited],
            )
            self._saved = (self.step, self._heldout_success()) if resume_step is not None else None
            undo.pop_all()

    def train(self) -> None:
        """KeyboardInterrupt after Ctrl-C, SIGTERM or SIGHUP, and every error, are raised again once the last finished
        step is saved."""
        with self.interrupt, self.run_directory, closing(self.engine), closing(self.agent), self.display:
            try:
                self.log.begin()
                if self.step:
                    self.display.resumed(self.step)
                self._evaluate_if_due()
                while self.step < self.config.train.steps:
                    self.interrupt.check()
                    self.train_step()
                    self._evaluate_if_due()
                    if self._due(self.config.checkpoint.every):
                        self.save()
                self.save()
                self.log.close("finished")
            except BaseException as error:
                self.interrupt.hold()
                self._end(error)
        self.interrupt.check()  # one that came while the last files were written

    def train_step(self) -> None:
        """One rollout batch, and the optimiser steps on it."""
        step, clock = self.step + 1, StageClock(self.display.stage)
        with self.interrupt.allowed():
            questions = questions_of_step(self.train_questions, self.config.run.seed, step, self.config.train.questions)
            with clock("rollout"):
                seed = stream(self.config.run.seed, step)
                trees = self.sampler.rollout(questions, seed, progress=self.display.paths, judge=self.scorer.begin)
            with clock("reward"):
                scored = self.scorer.score(trees)
            with clock("pack"):
                paths = [[flatten(tree, path.id) for path in tree.paths] for tree in trees]
                totals = [[reward.total for reward in one.rewards] for one in scored]
                samples = make_samples(paths, totals, self.advantage_settings, self.config.rollout.max_tokens)
                minibatches = self.learner.pack(samples, len(questions))
            with clock("old_logprobs"):
                minibatches = self.learner.add_log_probs(minibatches)
        with clock("update"):
            losses = self.update(step, minibatches, [question.id for question in questions])
        self.step = step
        try:
            with clock("refresh"):
                self.engine.refresh(step, OneProcess().full_weights(self.language_model.model))
        finally:  # the weights are those of this step, also if they did not reach the engine
            self._record(clock, scored, samples, minibatches, losses)

    def update(self, step: int, minibatches: Sequence[Minibatch], question_ids: Sequence[str]) -> Record:
        """The optimiser steps of a rollout batch, all or none. A signal before the last one means none; after it, it
        waits for the rest of the step."""
        stats = self.learner.entropy_stats(minibatches)
        order = [index for _ in range(self.config.train.epochs) for index in range(len(minibatches))]
        metrics, norms, rate = [], [], None
        with self.learner.all_or_nothing():
            for count, index in enumerate(order):
                with self.interrupt.allowed():  # no weight changes there
                    part, norm = self.learner.backward(minibatches[index], stats, question_ids)
                rate = self.learner.apply(step, count)
                metrics.append(part)
                norms.append(norm)
        grad_norm = sum(norms) / len(norms) if norms else None
        return {**loss_metrics(metrics), "optimizer.grad_norm": grad_norm, "optimizer.learning_rate": rate}

    def save(self) -> None:
        """The checkpoint of the last finished step, unless it is there. CheckpointError: it cannot be written."""
        directory = self.directory / "checkpoints"
        success = self._heldout_success()
        if self._saved == (self.step, success):
            return
        self.display.stage("checkpoint")
        self.log.flush()  # a checkpoint is never ahead of the records
        save_checkpoint(
            directory,
            self.step,
            self.learner.model,
            self.language_model.tokenizer,
            self.learner.optimizer,
            heldout_success=success,
            config_yaml=to_yaml(self.config),
            keep=self.config.checkpoint.keep,
            records=fingerprints(self.directory),
        )
        self._saved = (self.step, success)

    def _heldout_success(self) -> float | None:
        """At the present step."""
        return {record["step"]: record["success"] for record in self.log.evaluations()}.get(self.step)

    def _evaluate_if_due(self) -> None:
        """At the start, every `eval.every` steps and at the end; a resumed run does not repeat one."""
        done = self._heldout_success() is not None
        if done or not (self.step in (0, self.config.train.steps) or self._due(self.config.eval.every)):
            return
        self.display.stage("evaluation")
        start = time.perf_counter()
        with self.interrupt.allowed():
            answered = list(self.evaluator.answers(self.heldout, self.display.paths))
        record = {**answer_metrics(answered, self.config.eval.pass_at), "seconds": time.perf_counter() - start}
        best = max((r["success"] for r in self.log.evaluations()), default=-1.0)
        self.log.answers(self.step, answered)
        self.log.evaluation({"step": self.step, **record})
        self.display.evaluation({"step": self.step, **record})
        if record["success"] > best:
            self.save()

    def _due(self, every: int) -> bool:
        return every > 0 and self.step > 0 and self.step % every == 0

    def _end(self, error: BaseException) -> NoReturn:
        """Save the last finished step, whose weights and moments are the live ones, and raise: the error, or
        KeyboardInterrupt where a signal came, which a terminal sends to the engines' processes, too."""
        interrupted = self.interrupt.came or isinstance(error, KeyboardInterrupt)
        reason = None if interrupted else str(error) or type(error).__name__
        unsaved: BaseException | None = None
        if isinstance(error, CheckpointError):
            unsaved, reason = error, f"the state after step {self.step} is not saved: {error}"
        else:
            try:
                self.save()
                saved = checkpoint_path(self.directory / "checkpoints", self.step)
                self.display.console.print(f"the state after step {self.step} is saved in {saved}", markup=False)
                command = f"aepo train --resume {shlex.quote(str(self.directory))}"
                self.display.console.print(f"go on with: {command}", markup=False)
            except Exception as another:
                unsaved = another
                problem = f"the state after step {self.step} is not saved: {another}"
                print(f"warning: {problem}", file=sys.stderr)
                reason = "; ".join(filter(None, (reason, problem)))
        with contextlib.suppress(OSError):  # a full disk; the lock of the directory says that nothing runs there
            self.log.close("failed" if unsaved or not interrupted else "interrupted", reason)
        if unsaved is not None and interrupted:
            raise unsaved
        if interrupted and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise error

    def _record(
        self,
        clock: StageClock,
        scored: Sequence[ScoredTree],
        samples: Sequence[Sample],
        minibatches: Sequence[Minibatch],
        losses: Record,
    ) -> None:
        batches = [batch for minibatch in minibatches for batch in minibatch]
        rollout = rollout_metrics(scored)
        record = {
            "step": self.step,
            **rollout,
            **losses,
            **(mismatch_metrics(batches) if self.config.recomputes_old_logprobs else {}),
            "tokens.packed": sum(len(batch.input_ids) for batch in batches),
            **clock.metrics(rollout["tokens.generated"], losses["tokens.trained"]),
            **memory_metrics(),
        }
        try:
            self.log.step(record)
        finally:
            if self.step == 1 or self._due(self.config.log.trees_every):
                self._save_trees(scored, samples)
        self.display.step(record)

    def _save_trees(self, scored: Sequence[ScoredTree], samples: Sequence[Sample]) -> None:
        """The first questions of the batch. A path's advantage is that of its first token; 0 if it was left out."""
        kept = scored[: self.config.log.trees]
        firsts = {(s.question, s.path): s.advantages[s.trajectory.generated.index(True)] for s in samples}
        self.log.trees(
            self.step,
            kept,
            [[firsts.get((q, path.id), 0.0) for path in one.tree.paths] for q, one in enumerate(kept)],
            vocab_size=self.language_model.vocab_size,
            temperature=self.config.rollout.temperature,
            decode=self.agent.format.decode,
        )

    def _drop_long_prompts(self) -> Record:
        """The entry of run.json. ValueError: there are some, and `task.long_prompts` is not drop; or too few others."""
        config, context = self.config, Context.of(self.config, self.engine.max_positions)
        drop, before = config.task.long_prompts == "drop", (len(self.train_questions), len(self.heldout))
        for_people = self.display.console
        self.train_questions = fitting(self.agent, self.train_questions, "training", context, for_people, drop=drop)
        self.heldout = fitting(self.agent, self.heldout, "held-out", context, for_people, drop=drop)
        check_sizes(config, self.agent.task.name, self.train_questions, self.heldout)
        train, heldout = before[0] - len(self.train_questions), before[1] - len(self.heldout)
        return {"long_prompts_dropped": {"train": train, "heldout": heldout}} if drop else {}

    def _facts(self) -> Record:
        parameters = sum(p.numel() for p in self.learner.model.parameters())
        return {
            "model": {
                "name": self.config.model.name,
                "parameters": parameters,
                "vocab_size": self.language_model.vocab_size,
            },
            **self._remembered,
        }


def _changed_settings(then: Path, config: Config) -> list[str]:
    """Since the checkpoint was written that has these settings."""
    before = load_config(then)
    changed = changed_settings(before, config)
    return [f"{name} was {was!r} and is {now!r}" for name, (was, now) in changed.items() if name != "run.dir"]


def _other_reference(
    config: Config, recorded: Mapping[str, Any] | None, digest: str, named: Collection[str]
) -> list[str]:
    """What the run is told of the frozen weights where they are others than it was begun with. ValueError: nothing in
    the command says that this is meant. Runs of before have no record of them."""
    was = (recorded or {}).get("starting_weights", digest)
    if was == digest:
        return []
    if not {"model.name", "model.dtype"} & {*named}:
        raise ValueError(
            f"model.name = {config.model.name!r}: expected the weights that {config.run.dir} was begun with, which are "
            f"its reference (SHA-256 {was[:12]}..), got others ({digest[:12]}..). Put them back, or give model.name in "
            "this command, to say that these are meant from here on"
        )
    return [f"the frozen starting weights were {was[:12]}.. and are {digest[:12]}.."]


def _own_functions(config: Config) -> dict[str, list[Any]]:
    """Those of the user's own that are no part of the agent."""
    policy, rollout = config.policy, config.rollout
    return {
        **named_part("policy.loss", policy.loss),
        **named_part("policy.advantage", policy.advantage),
        **named_part("rollout.branch_rule", rollout.branch_rule),
    }


def check_sizes(config: Config, task: str, train: Sequence[Question], heldout: Sequence[Question]) -> None:
    """ValueError where the task of that name is too small for the configuration."""
    if len(train) < config.train.questions:
        raise ValueError(
            f"train.questions = {config.train.questions}: expected <= the task's {len(train)} training questions"
        )
    if not heldout:
        raise ValueError(f"task {task!r} has no held-out questions")


def stream(seed: int, step: int) -> int:
    """The seed of everything random in a step."""
    return (seed << 32) + step


def questions_of_step(questions: Sequence[Question], seed: int, step: int, count: int) -> list[Question]:
    """The `count` different questions of a step (1, 2, ...): every pass over the data is a new shuffle, and ends where
    no full batch is left."""
    batches = len(questions) // count
    epoch, batch = divmod(step - 1, batches)
    order = list(range(len(questions)))
    random.Random(stream(seed, epoch)).shuffle(order)
    return [questions[i] for i in order[batch * count : (batch + 1) * count]]
