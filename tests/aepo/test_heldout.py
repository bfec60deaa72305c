"""What a held-out evaluation while a run goes on leads to."""

from __future__ import annotations

from pathlib import Path

from test_trainer import config_for
from trainer_toys import ToyLanguageModel, ToyTask, toy_agent

from aepo.run.checkpoint import list_checkpoints
from aepo.run.log import read_records
from aepo.trainer import Trainer
from aepo.types import Question, Response, Reward


class Scripted(ToyTask):
    """As many of the four held-out questions are answered as the script says of the step."""

    right = (2, 1, 3, 3, 0, 2, 4, 2)
    trainer: Trainer | None = None

    def reward(self, question: Question, response: Response) -> Reward:
        step = 0 if self.trainer is None else self.trainer.step
        heldout = [one.id for one in self.heldout]
        success = question.id in heldout[: self.right[step]]
        return Reward(float("7" in response.text), {}, success)


def test_a_checkpoint_is_saved_at_an_evaluation_that_is_better_than_all_before(tmp_path: Path) -> None:
    """And at no other: one of 7 B takes minutes. After a worse one, what counts is still the best of all."""
    settings = ("train.steps=7", "eval.every=1", "checkpoint.every=0", "checkpoint.keep=100")
    task = Scripted()
    task.trainer = Trainer(config_for(tmp_path / "run", *settings), toy_agent(task), ToyLanguageModel())
    task.trainer.train()
    evaluations = read_records(tmp_path / "run" / "evals.jsonl")
    assert [record["success"] for record in evaluations] == [count / 4 for count in Scripted.right]
    saved = [(one.step, one.heldout_success) for one in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert saved == [(0, 0.5), (2, 0.75), (6, 1.0), (7, 0.5)], "the first, the better ones, and the last step"
