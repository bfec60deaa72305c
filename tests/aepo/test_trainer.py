"""The loop on a toy task with real rollouts: it learns, every preset runs, and nothing is lost when it is stopped."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
from pathlib import Path

import pytest
import torch
from trainer_toys import ToyLanguageModel, ToyTask, toy_agent

from aepo.agents.protocol import AgentError
from aepo.config import Config, load_config
from aepo.data import questions_of_step
from aepo.learning.batch import Batch
from aepo.learning.learner import Learner, learning_rate
from aepo.learning.nonfinite import NonFiniteError
from aepo.models.adapters import refuse_adapters
from aepo.rollout.engines.make import make_engine
from aepo.run.checkpoint import CheckpointError, list_checkpoints
from aepo.run.log import read_records
from aepo.trainer import Trainer
from aepo.types import Question, Response, Reward

MEASURED = ("seconds", "memory.", "tools.seconds")


def config_for(directory: Path, *overrides: str) -> Config:
    base = ["train.steps=3", "train.questions=4", "rollout.paths=4", "rollout.max_tokens=10", "eval.every=2"]
    base += ["optimizer.learning_rate=1e-2", "checkpoint.every=2", "log.tensorboard=false", "eval.questions=4"]
    return load_config(overrides=[*base, f"run.dir={directory}", *overrides])


def trainer_for(directory: Path, *overrides: str, resume_step: int | None = None) -> Trainer:
    return Trainer(config_for(directory, *overrides), toy_agent(), ToyLanguageModel(), resume_step=resume_step)


def outcome(directory: Path) -> tuple[list[dict], list[dict]]:
    """Metrics and evaluations without what is a measurement."""

    def comparable(name: str) -> list[dict]:
        return [
            {k: v for k, v in record.items() if not k.startswith(MEASURED) and not k.endswith("per_second")}
            for record in read_records(directory / name)
        ]

    return comparable("metrics.jsonl"), comparable("evals.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 4 steps."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    trainer_for(directory, "train.steps=4").train()
    return directory


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.learner.model.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("preset", ["aepo", "arpo", "grpo", "dapo", "cispo", "gppo", "gspo", "gigpo", "reinforce++"])
def test_every_preset_trains(tmp_path: Path, preset: str) -> None:
    trainer = trainer_for(tmp_path / "run", f"policy.preset={preset}", "train.minibatches=2")
    before = weights(trainer)
    trainer.train()
    metrics, evaluations = outcome(tmp_path / "run")
    assert [record["step"] for record in metrics] == [1, 2, 3]
    assert [record["step"] for record in evaluations] == [0, 2, 3]
    assert all(record["policy.loss"] is not None for record in metrics)
    assert not same(before, weights(trainer))
    assert all(p.isfinite().all() for p in trainer.learner.model.parameters())


def test_the_loop_learns(tmp_path: Path) -> None:
    """Even questions want another digit than odd ones: an agent that does not read the question gets 0.5 at most."""
    settings = ("run.seed=1", "train.steps=30", "train.questions=8", "rollout.paths=8", "rollout.max_tokens=4")
    trainer_for(tmp_path / "run", *settings, "optimizer.learning_rate=4e-3", "eval.every=0").train()
    success = [record["train.success"] for record in outcome(tmp_path / "run")[0]]
    assert success[0] < 0.3
    assert sum(success[-5:]) / 5 > 0.8  # measured with seeds 0, 1, 2: 0.87, 0.97, 0.87


@pytest.mark.parametrize("extra", [(), ("policy.kl_coef=0.1", "policy.old_logprobs=recompute", "train.epochs=2")])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, extra: tuple[str, ...]) -> None:
    whole = trainer_for(tmp_path / "whole", "train.steps=5", *extra)
    whole.train()
    trainer_for(tmp_path / "parts", "train.steps=3", "checkpoint.every=1", *extra).train()
    # The checkpoint of step 3 has seen an evaluation that the whole run does not do there: resume from step 2.
    resumed = trainer_for(tmp_path / "parts", "train.steps=5", *extra, resume_step=2)
    resumed.train()
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    assert same(weights(resumed), weights(whole))
    status = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert status["status"] == "finished"
    assert [entry["step"] for entry in status["resumed"]] == [2]


class InterruptIn:
    """Ctrl-C, as a real signal, when the wrapped function is called for the nth time."""

    def __init__(self, owner: object, name: str, nth: int) -> None:
        self.inner, self.left = getattr(owner, name), nth
        setattr(owner, name, self)

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    ("place", "finished"),
    [
        ("rollout", 1),  # before anything was computed in step 2
        ("backward", 1),  # with half of its gradients
        ("apply", 2),  # in the middle of the optimiser step: it is finished, then the run stops
        ("refresh", 2),  # after it, before the step was counted
    ],
)
def test_ctrl_c_in_the_middle_of_a_step(tmp_path: Path, whole: Path, place: str, finished: int) -> None:
    trainer = trainer_for(tmp_path / "run", "train.steps=4")
    owners = {"rollout": trainer.sampler, "refresh": trainer.engine}
    InterruptIn(owners.get(place, trainer.learner), place, nth=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].step == finished
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == finished
    trainer_for(tmp_path / "run", "train.steps=4", resume_step=finished).train()
    assert outcome(tmp_path / "run") == outcome(whole)


def test_ctrl_c_between_two_optimiser_steps_undoes_the_first(tmp_path: Path) -> None:
    several = ("train.steps=3", "train.minibatches=2", "train.epochs=2")
    trainer_for(tmp_path / "whole", *several).train()
    trainer = trainer_for(tmp_path / "run", *several)
    InterruptIn(trainer.learner, "backward", nth=4 + 3)  # step 2 has made two of its four optimiser steps
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].step == 1
    trainer_for(tmp_path / "run", *several, resume_step=1).train()
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_an_interrupted_evaluation_is_made_up_for(tmp_path: Path, whole: Path) -> None:
    trainer = trainer_for(tmp_path / "run", "train.steps=4")
    InterruptIn(trainer.evaluator, "answers", nth=2)  # the one after step 2
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    (last,) = (one for one in list_checkpoints(tmp_path / "run" / "checkpoints") if one.step == 2)
    assert last.heldout_success is None
    resumed = trainer_for(tmp_path / "run", "train.steps=4", resume_step=2)
    resumed._evaluate_if_due()
    resumed.save()
    (last,) = (one for one in list_checkpoints(tmp_path / "run" / "checkpoints") if one.step == 2)
    assert last.heldout_success == outcome(whole)[1][1]["success"]
    resumed.train()
    assert outcome(tmp_path / "run") == outcome(whole)


def poison_gradient(trainer: Trainer, value: float) -> None:
    """A gradient that is not finite out of finite losses, in the head alone."""
    head = trainer.learner.model.get_output_embeddings().weight
    head.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), value))


@pytest.mark.parametrize("fault", ["loss", "inf", "nan"])
def test_a_non_finite_step_changes_nothing_and_names_the_tokens(tmp_path: Path, fault: str) -> None:
    trainer = trainer_for(tmp_path / "run")
    trainer.train_step()
    before = weights(trainer)
    if fault == "loss":
        inner = trainer.learner.pack

        def pack_with_nan(*args: object) -> Batch:
            batch = inner(*args)
            batch.minibatches[0][0].old_logprobs[2] = torch.nan  # as an engine with a bug would deliver it
            return batch

        trainer.learner.pack = pack_with_nan  # type: ignore[method-assign]
    else:
        poison_gradient(trainer, float(fault))
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    assert same(before, weights(trainer))
    assert "question q" in str(error.value)
    assert "path " in str(error.value)
    assert ", token " in str(error.value)
    assert str(error.value).startswith("the loss is nan; " if fault == "loss" else f"the gradient norm is {fault}; ")
    assert fault != "loss" or "old log-prob nan" in str(error.value)
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (status["status"], status["reason"]) == ("failed", str(error.value))
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert saved.step == 1
    good = trainer_for(tmp_path / "run", resume_step=1)
    assert same(before, weights(good))


def test_an_optimiser_step_that_makes_a_weight_infinite_is_undone(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run")
    trainer.train_step()
    before, norm = weights(trainer), trainer.learner.model.model.norm.weight
    trainer.learner.optimizer.register_step_post_hook(lambda *_: norm.data[3:4].fill_(torch.inf))
    with pytest.raises(
        NonFiniteError, match=r"^model\.norm\.weight is not finite after an optimiser step with learning"
    ):
        trainer.train()
    assert same(before, weights(trainer))
    assert [one.step for one in list_checkpoints(tmp_path / "run" / "checkpoints")] == [1]


def test_a_step_without_any_signal_changes_no_weight(tmp_path: Path) -> None:
    class SameForAll(ToyTask):
        def reward(self, question: Question, response: Response) -> Reward:
            return Reward(1.0, {}, True)

    trainer = Trainer(
        config_for(tmp_path / "run", "policy.preset=dapo", "policy.overlong_buffer=0"),
        toy_agent(SameForAll()),
        ToyLanguageModel(),
    )
    before = weights(trainer)
    trainer.train()
    assert same(before, weights(trainer))
    metrics, _ = outcome(tmp_path / "run")
    assert [record["policy.loss"] for record in metrics] == [None] * 3
    assert metrics[0]["advantage.zero_groups"] == 1.0


def test_trees_are_saved_with_the_text_of_every_token(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run", "log.trees_every=2", "log.trees=1")
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "run" / "trees").iterdir()) == [
        "step_000001.json",
        "step_000002.json",
    ]
    record = json.loads((tmp_path / "run" / "trees" / "step_000002.json").read_text())
    (entry,) = record["trees"]
    assert (record["vocab_size"], record["temperature"]) == (19, 1.0)
    assert len(entry["rewards"]) == len(entry["advantages"]) == len(entry["tree"]["paths"]) == 4
    for node, texts in zip(entry["tree"]["nodes"], entry["texts"], strict=True):
        assert "".join(texts) == trainer.agent.format.decode(node["token_ids"])
        assert len(texts) == len(node["token_ids"])


def test_a_directory_with_a_run_is_not_touched(tmp_path: Path) -> None:
    trainer_for(tmp_path / "run").train()
    with pytest.raises(FileExistsError, match="already holds a run: continue it with --resume"):
        trainer_for(tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_a_clear_error(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot save checkpoint"):
        trainer.train()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_questions_of_a_step() -> None:
    questions = ToyTask(train=10).train
    epoch = [questions_of_step(questions, seed=3, step=step, count=4) for step in (1, 2)]
    ids = [question.id for batch in epoch for question in batch]
    assert len(set(ids)) == 8, "no question twice in a pass; the last two of ten wait for the next pass"
    assert epoch == [questions_of_step(questions, seed=3, step=step, count=4) for step in (1, 2)]
    assert epoch[0] != questions_of_step(questions, seed=3, step=3, count=4), "the next pass is shuffled anew"
    assert epoch[0] != questions_of_step(questions, seed=4, step=1, count=4)


def test_a_task_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected <= the task's 8 training questions"):
        trainer_for(tmp_path / "run", "train.questions=9")
    assert not (tmp_path / "run").exists()


def test_learning_rate() -> None:
    constant = load_config(overrides=["optimizer.learning_rate=1", "optimizer.warmup_steps=4"]).optimizer
    assert [learning_rate(constant, i, 8) for i in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    linear = load_config(
        overrides=["optimizer.learning_rate=1", "optimizer.warmup_steps=2", "optimizer.schedule=linear"]
    ).optimizer
    assert [learning_rate(linear, i, 6) for i in range(7)] == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]


def test_gradients_are_clipped_to_the_configured_norm(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run", "optimizer.max_grad_norm=0.01")
    norms = []
    inner = Learner.backward

    def spy(*args: object) -> object:
        result = inner(trainer.learner, *args)
        norms.append(torch.cat([p.grad.flatten() for p in trainer.learner.model.parameters()]).norm().item())
        return result

    trainer.learner.backward = spy  # type: ignore[method-assign]
    trainer.train_step()
    assert norms == [pytest.approx(0.01, rel=1e-3)]
    assert read_records(tmp_path / "run" / "metrics.jsonl")[0]["optimizer.grad_norm"] > 0.02, "the norm before clipping"


def test_training_outside_the_main_thread_works(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run", "train.steps=1")
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_every_held_out_answer_is_kept(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run", "eval.questions=4")
    trainer.train()
    files = sorted((tmp_path / "run" / "answers").iterdir())
    assert [path.name for path in files] == ["step_000000.jsonl", "step_000002.jsonl", "step_000003.jsonl"]
    for path, evaluation in zip(files, read_records(tmp_path / "run" / "evals.jsonl"), strict=True):
        lines = read_records(path)
        assert len(lines) == evaluation["questions"] == 4
        assert {line["step"] for line in lines} == {evaluation["step"]}
        successes = [sample["success"] for line in lines for sample in line["samples"]]
        assert sum(successes) / len(successes) == evaluation["success"]


def test_a_reward_that_cannot_work_is_found_before_the_first_step(tmp_path: Path) -> None:
    agent = dataclasses.replace(toy_agent(), rewards={lambda completions: [1.0]: 1.0})
    with pytest.raises(AgentError, match=r"expected a list of 2 numbers.*tried at the start"):
        Trainer(config_for(tmp_path / "run"), agent, ToyLanguageModel())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["training", "held-out"])
def test_questions_of_both_splits_are_checked_before_the_first_step(tmp_path: Path, split: str) -> None:
    task = ToyTask()
    questions = task.train if split == "training" else task.heldout
    questions[-1] = questions[0]
    with pytest.raises(ValueError, match=f"task toy: 1 ids belong to several {split} questions"):
        Trainer(config_for(tmp_path / "run"), toy_agent(task), ToyLanguageModel())
    assert not (tmp_path / "run").exists()


def test_a_model_with_adapters_is_refused_and_lets_go_of_the_directory(tmp_path: Path) -> None:
    """Its checkpoints could not be loaded."""
    adapted = ToyLanguageModel()
    adapted.model.peft_config = {}  # as PEFT leaves it on the model that it was given
    with pytest.raises(ValueError, match="expected one without adapters"):
        Trainer(config_for(tmp_path / "run"), toy_agent(), adapted)
    assert not (tmp_path / "run").exists()
    trainer_for(tmp_path / "run", "train.steps=0").train()


def test_a_layer_of_peft_is_an_adapter_also_where_no_configuration_is_left() -> None:
    adapted = ToyLanguageModel().model
    refuse_adapters(adapted)
    adapted.lm_head = type("Linear", (torch.nn.Linear,), {"__module__": "peft.tuners.lora.layer"})(2, 2)
    with pytest.raises(ValueError, match="model: expected one without adapters, got Linear in lm_head: merge it"):
        refuse_adapters(adapted)


def test_the_first_evaluation_is_the_best_so_far_also_where_nothing_succeeded(tmp_path: Path) -> None:
    class Hopeless(ToyTask):
        def reward(self, question: Question, response: Response) -> Reward:
            return Reward(float("7" in response.text), {}, False)

    config = config_for(tmp_path / "run", "train.steps=1", "checkpoint.every=0")
    Trainer(config, toy_agent(Hopeless()), ToyLanguageModel()).train()
    assert [one.step for one in list_checkpoints(tmp_path / "run" / "checkpoints")] == [0, 1]


def test_a_resumed_run_does_not_save_again_what_it_has_read(tmp_path: Path) -> None:
    trainer_for(tmp_path / "run", "train.steps=1").train()
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_000001")
    before = saved.stat().st_ino, saved.stat().st_mtime_ns
    trainer_for(tmp_path / "run", "train.steps=1", resume_step=1).train()
    assert (saved.stat().st_ino, saved.stat().st_mtime_ns) == before


def test_a_failed_start_closes_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def made(*arguments: object) -> object:
        engine = make_engine(*arguments)  # type: ignore[arg-type]
        engine.close = lambda: closed.append(engine)  # type: ignore[method-assign]
        return engine

    def full(*arguments: object, **options: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("aepo.trainer.make_engine", made)
    monkeypatch.setattr("aepo.trainer.RunLog", full)
    with pytest.raises(OSError, match="no room"):
        trainer_for(tmp_path / "run")
    assert len(closed) == 1
