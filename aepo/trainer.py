"""The training loop: questions -> trees -> scored trees -> rows -> update -> engine.

Everything random is a function of (seed, step), so the state of a run between two steps is its weights, the moments of
the optimizer and the number of the step: that is what a checkpoint holds, and why a resumed run continues exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

from aepo.agents.agent import Agent
from aepo.config import Config, named_files, to_yaml
from aepo.data import RunQuestions, stream
from aepo.evaluation import Evaluator
from aepo.heldout import HeldOut
from aepo.interrupt import Interrupt
from aepo.learning.learner import Learner
from aepo.models.language_model import LanguageModel
from aepo.parallel import OneProcess
from aepo.rollout.branching import branch_rule
from aepo.rollout.engines.make import make_engine
from aepo.rollout.sampler import Sampler
from aepo.run.checkpoints import Checkpoints
from aepo.run.clock import StageClock
from aepo.run.continuity import Continuity
from aepo.run.directory import RunDirectory
from aepo.run.display import Display
from aepo.run.files import read_facts
from aepo.run.log import RunLog
from aepo.run.recording import StepRecorder
from aepo.run.saving import Saver
from aepo.scoring import Scorer


class Trainer:
    """One run, whose directory this process holds until `train` ends. `train` works until the last step, an error or a
    signal; what was finished by then is saved.

    The language model's weights are trained in place. resume_step: continue from the checkpoint of that step in
    `config.run.dir`; None: a new run, which must not find another one there, or is to `overwrite` it: it is replaced
    when all else is in order. named: the settings that were given for this time. OSError: another process works there.
    ValueError: the run was begun with another agent (task, data, format, tools, rewards) or another reference, and no
    named setting says that it is meant; or with another tokenizer. What differs is printed and recorded.
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
        self.config, self.agent, self.language_model = config, agent, language_model
        self.questions = RunQuestions(config, agent)
        self.directory, self.step, resumed = Path(config.run.dir), resume_step or 0, resume_step is not None
        self.parallel, self.interrupt, self.display = OneProcess(), Interrupt(), Display(config.train.steps)
        console, allowed = self.display.console, self.interrupt.allowed
        with contextlib.ExitStack() as undo:  # what has been taken is given back if something is wrong
            self.run_directory = RunDirectory.claim(
                self.directory, resume_step=resume_step, overwrite=overwrite, needed=named_files(config)
            )
            undo.callback(self.run_directory.release)
            continuity = Continuity(config, agent, read_facts(self.directory) if resumed else None, named)
            rows = self.questions.one_of_each_row()
            self.scorer = Scorer(agent.rewards, agent.format, config.task.success, rows)
            self.scorer.try_out(rows[0])
            self.questions.check(console)
            rule = branch_rule(config.rollout)
            self.learner = Learner(language_model.model, config, agent.format.decode, self.parallel, allowed)
            continuity.compare_starting_weights(self.learner, self.parallel)
            self.checkpoints = Checkpoints(
                self.directory / "checkpoints",
                keep=config.checkpoint.keep,
                config_yaml=to_yaml(config),
                model=self.learner.model,
                tokenizer=language_model.tokenizer,
                optimizer=self.learner.optimizer,
                parallel=self.parallel,
            )
            if resume_step is not None:
                continuity.compare_checkpoint(self.checkpoints.load(resume_step), resume_step, language_model)
            self.engine = make_engine(config, language_model, agent.format.eos_ids, self.step, self.parallel)
            undo.callback(self.engine.close)
            continuity.compare_long_prompts(self.questions.drop_long_prompts(self.engine.max_positions, console))
            changed = continuity.announce(console)
            self.sampler = Sampler(self.engine, agent, config.rollout, rule)
            self.evaluator = Evaluator(self.engine, agent, self.scorer, config)
            if (aside := self.run_directory.make_room(resume_step)) is not None:
                console.print(f"what came after step {self.step} is now in {aside}", markup=False)
            self.log = RunLog(self.run_directory, config, continuity.facts, self.step, resumed=resumed, changed=changed)
            self.recorder = StepRecorder(self.log, self.display, config, language_model.vocab_size, agent.format.decode)
            self.evaluations = HeldOut(self.evaluator, self.questions.heldout, config, self.log, self.display, allowed)
            self.saver = Saver(self.checkpoints, self.log, self.display, resume_step)
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
                    if self.config.checkpoint.every and self.step % self.config.checkpoint.every == 0:
                        self.save()
                self.save()
                self.log.close("finished")
            except BaseException as error:
                self.interrupt.hold()
                self.saver.end_early(error, self.step, signalled=self.interrupt.came)
        self.interrupt.check()  # one that came while the last files were written

    def train_step(self) -> None:
        """One rollout batch, and the optimiser steps on it."""
        step, clock = self.step + 1, StageClock(self.display.stage)
        with self.interrupt.allowed():
            with clock("rollout"):
                questions, seed = self.questions.of_step(step), stream(self.config.run.seed, step)
                trees = self.sampler.rollout(questions, seed, progress=self.display.paths, judge=self.scorer.begin)
            with clock("reward"):
                scored = self.scorer.score(trees)
            with clock("pack"):
                batch = self.learner.pack(scored)
            with clock("old_logprobs"):
                batch = self.learner.add_log_probs(batch)
        with clock("update"):
            update = self.learner.update(step, batch)  # all or none
        with self.recorder.recording(step, clock, scored, batch, update):
            self.step = step
            with clock("refresh"):
                self.engine.refresh(step, self.parallel.full_weights(self.learner.model))

    def save(self) -> None:
        self.saver.save(self.step)

    def _evaluate_if_due(self) -> None:
        if self.evaluations.is_due(self.step) and self.evaluations.evaluate(self.step):
            self.save()
