"""Settings of rollout, eval, optimizer and train, from a configuration to where they act in a real run."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_trainer import config_for, trainer_for
from trainer_toys import ToyLanguageModel, ToyTask, tiny_model, toy_agent

from aepo.advantages import Sample
from aepo.config import load_config
from aepo.learning.batch import Batch
from aepo.learning.learner import Learner
from aepo.parallel import OneProcess
from aepo.rollout.engine import Generation, GenerationRequest
from aepo.run.display import Display
from aepo.run.log import read_records
from aepo.trainer import Trainer
from aepo.types import ScoredTree

DOUBLE = ("rollout.max_tokens=40", "rollout.temperature=0.7", "train.tokens_per_microbatch=60")


def double_trainer(directory: Path, *settings: str) -> Trainer:
    """In float64, so that a number is right to 1e-10 or wrong."""
    return Trainer(config_for(directory, *DOUBLE, *settings), toy_agent(), ToyLanguageModel(torch.float64))


def requests_of(trainer: Trainer) -> list[GenerationRequest]:
    """Filled with what the engine is asked for from now on."""
    asked: list[GenerationRequest] = []
    generate = trainer.engine.generate

    async def seen(requests: Sequence[GenerationRequest]) -> list[Generation]:
        asked.extend(requests)
        return await generate(requests)

    trainer.engine.generate = seen  # type: ignore[method-assign]
    return asked


def samples_of(trainer: Trainer) -> list[Sample]:
    """Filled with what is trained on from now on."""
    packed: list[Sample] = []
    pack = trainer.learner.pack

    def seen(scored: Sequence[ScoredTree]) -> Batch:
        batch = pack(scored)
        packed.extend(batch.samples)
        return batch

    trainer.learner.pack = seen  # type: ignore[method-assign]
    return packed


def test_evaluations_ask_the_engine_at_their_own_temperature_for_so_many_samples(tmp_path: Path) -> None:
    settings = ("rollout.temperature=0.7", "eval.temperature=0.3", "eval.samples=3", "train.steps=0")
    trainer = trainer_for(tmp_path / "run", *settings)
    asked = requests_of(trainer)
    trainer.train()
    assert {request.temperature for request in asked} == {0.3}
    prompts = {trainer.agent.prompt_tokens(question, None) for question in trainer.questions.heldout}
    first = [request for request in asked if request.token_ids in prompts]
    assert len(first) == 3 * len(prompts) == 12
    assert len({request.seed for request in first}) == 12
    (line, *_) = read_records(tmp_path / "run" / "answers" / "step_000000.jsonl")
    assert len(line["samples"]) == 3


def test_training_asks_the_engine_at_its_temperature_for_so_many_tokens(tmp_path: Path) -> None:
    settings = ("rollout.temperature=0.7", "eval.temperature=0.3", "rollout.max_segment_tokens=4")
    trainer = trainer_for(tmp_path / "run", *settings)
    asked = requests_of(trainer)
    trainer.train_step()
    assert {request.temperature for request in asked} == {0.7}
    assert max(request.max_new_tokens for request in asked) == 4


def test_before_the_first_update_the_policy_is_the_one_that_sampled(tmp_path: Path) -> None:
    """So the temperature of the loss is that of the rollout: at another one no ratio is 1."""
    double_trainer(tmp_path / "run", "train.steps=1").train()
    (record,) = read_records(tmp_path / "run" / "metrics.jsonl")
    assert record["policy.ratio_max"] == pytest.approx(1, abs=1e-9)
    assert record["policy.ratio_mean"] == pytest.approx(1, abs=1e-9)
    assert record["policy.approx_kl"] == pytest.approx(0, abs=1e-12)
    assert record["tokens.trained"] > 100


def test_the_entropy_factor_is_taken_over_the_whole_batch(tmp_path: Path) -> None:
    """Where every ratio is 1, the loss is the mean of -A (1 + a (H - mean H) / std H), however the batch is cut."""
    trainer = double_trainer(tmp_path / "run", "policy.entropy_advantage=0.5")
    samples = samples_of(trainer)
    trainer.train_step()
    written = [
        (sample.advantages[i], sample.trajectory.entropies[i])
        for sample in samples
        for i, by_model in enumerate(sample.trajectory.generated)
        if by_model
    ]
    advantages, entropies = torch.tensor(written, dtype=torch.float64).T
    factor = 1 + 0.5 * (entropies - entropies.mean()) / entropies.std()
    (record,) = read_records(tmp_path / "run" / "metrics.jsonl")
    assert sum(len(s.trajectory.token_ids) - 1 for s in samples) > 2 * 60, "one micro-batch"
    assert record["policy.loss"] == pytest.approx(-(advantages * factor).mean().item(), rel=1e-9)
    assert abs((advantages * (factor - 1)).mean()) > 1e-4


def test_the_reference_is_the_model_as_training_began(tmp_path: Path) -> None:
    trainer = double_trainer(tmp_path / "run", "policy.kl_coef=0.1", "optimizer.learning_rate=3e-3")
    start = copy.deepcopy(trainer.learner.model)
    trainer.train_step()
    trainer.train_step()
    now, samples = copy.deepcopy(trainer.learner.model), samples_of(trainer)
    trainer.train_step()

    def logprobs(model: Any) -> torch.Tensor:
        found = []
        for sample in samples:
            ids, written = torch.tensor([sample.trajectory.token_ids]), torch.tensor(sample.trajectory.generated[1:])
            with torch.no_grad():
                rows = (model(input_ids=ids, use_cache=False).logits[0, :-1] / 0.7).log_softmax(-1)
            found.append(rows.gather(1, ids[0, 1:, None])[written, 0])
        return torch.cat(found)

    difference = logprobs(start) - logprobs(now)
    first, _, third = (record["policy.kl"] for record in read_records(tmp_path / "run" / "metrics.jsonl"))
    assert first == pytest.approx(0, abs=1e-12)
    assert third == pytest.approx((difference.exp() - 1 - difference).mean().item(), rel=1e-9)
    assert third > 1e-4


def test_every_optimiser_step_of_a_batch_is_taken(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run", "train.epochs=3", "train.minibatches=2")
    trainer.train_step()
    assert {int(state["step"]) for state in trainer.learner.optimizer.state.values()} == {6}


def test_every_optimiser_step_of_a_batch_has_a_gradient_of_its_own(tmp_path: Path) -> None:
    """And the norm that is logged is their mean. Without a learning rate the weights stay, so both can be had again."""
    trainer = double_trainer(tmp_path / "run", "train.minibatches=2", "optimizer.learning_rate=0")
    samples = samples_of(trainer)
    trainer.train_step()
    (record,) = read_records(tmp_path / "run" / "metrics.jsonl")
    model, norms = trainer.learner.model, []
    batch = Learner(model, trainer.config, str, OneProcess()).pack_samples(samples, ["", "", "", ""])
    stats = trainer.learner.entropy_stats(batch)
    for minibatch in batch.minibatches:
        model.zero_grad()
        norms.append(trainer.learner.backward(minibatch, stats, ["", "", "", ""])[1])
    assert record["optimizer.grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-9)
    assert abs(norms[0] - norms[1]) > 1e-3


def test_no_random_number_is_drawn_twice(tmp_path: Path) -> None:
    """Neither in two steps on the same questions, nor by paths of one step."""
    trainer = trainer_for(tmp_path / "run", "train.questions=8", "rollout.max_tokens=30")
    asked = requests_of(trainer)
    trainer.train_step()
    first = {request.seed for request in asked}
    trainer.train_step()
    assert len({request.seed for request in asked}) == len(asked) > len(first) > 32


def test_success_is_where_the_configuration_says(tmp_path: Path) -> None:
    """The toy's rewards say themselves what a success is, so here is a function that gives a number."""

    class Half(ToyTask):
        rewards = {lambda completions: [0.5] * len(completions): 1.0}  # noqa: RUF012

    for threshold, share in ((0.4, 1.0), (0.5, 1.0), (0.6, 0.0)):
        config = config_for(tmp_path / str(threshold), f"task.success={threshold}", "train.steps=0")
        Trainer(config, toy_agent(Half()), ToyLanguageModel()).train()
        (record,) = read_records(tmp_path / str(threshold) / "evals.jsonl")
        assert record["success"] == share


def test_questions_are_divided_among_the_optimiser_steps(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run", "train.minibatches=2")
    parts: list[set[int]] = []
    backward = trainer.learner.backward

    def seen(minibatch: Any, *others: Any) -> Any:
        parts.append({question for rows in minibatch for question, _ in rows.origins})
        return backward(minibatch, *others)

    trainer.learner.backward = seen  # type: ignore[method-assign]
    trainer.train_step()
    assert parts == [{0, 1}, {2, 3}]


def test_the_learning_rate_runs_over_all_optimiser_steps_of_the_run() -> None:
    settings = ["train.steps=2", "train.epochs=2", "train.minibatches=2", "optimizer.learning_rate=1"]
    config = load_config(overrides=[*settings, "optimizer.warmup_steps=2", "optimizer.schedule=linear"])
    learner = Learner(tiny_model(), config, str, OneProcess())
    rates = [learner.apply(step, index) for step in (1, 2) for index in range(4)]
    assert rates == pytest.approx([1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_two_optimiser_steps_are_those_of_adamw() -> None:
    """arXiv 1711.05101, algorithm 2, with weight decay on matrices alone."""
    settings = ["optimizer.learning_rate=0.01", "optimizer.betas=[0.6,0.7]", "optimizer.weight_decay=0.3"]
    model = tiny_model()
    learner = Learner(model, load_config(overrides=["train.steps=2", *settings]), str, OneProcess())
    draw = torch.Generator().manual_seed(0)
    truth = [p.detach().clone() for p in model.parameters()]
    first, second = ([torch.zeros_like(x) for x in truth] for _ in range(2))
    for step in (1, 2):
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            first[i] = 0.6 * first[i] + 0.4 * parameter.grad
            second[i] = 0.7 * second[i] + 0.3 * parameter.grad**2
            change = first[i] / (1 - 0.6**step) / ((second[i] / (1 - 0.7**step)).sqrt() + 1e-8)
            decay = 0.3 if parameter.dim() > 1 else 0.0
            truth[i] = truth[i] - 0.01 * (change + decay * truth[i])
        learner.apply(step, 0)
    for parameter, wanted in zip(model.parameters(), truth, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-9, atol=1e-12)


def test_saved_trees_have_the_advantages_that_were_trained_on(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run", "log.trees=4")
    samples = samples_of(trainer)
    trainer.train_step()
    trees = json.loads((tmp_path / "run" / "trees" / "step_000001.json").read_text())["trees"]
    saved = {(q, j): advantage for q, tree in enumerate(trees) for j, advantage in enumerate(tree["advantages"])}
    assert saved == {(s.question, s.path): s.advantages[s.trajectory.generated.index(True)] for s in samples}
    assert len(set(saved.values())) > 2


def test_a_line_of_the_display_says_what_the_record_holds() -> None:
    keys = ("reward.mean", "train.success", "policy.entropy", "policy.clip_high", "policy.clip_low")
    keys += ("rollout.fresh_paths", "tools.calls", "tools.failures", "optimizer.grad_norm")
    record: dict[str, Any] = {key: i + 1 for i, key in enumerate(keys)}
    text = io.StringIO()
    display = Display(20, Console(file=text, width=200))
    display.step({**record, "step": 7, "tokens.per_second": 1234.4, "seconds.step": 5.25})
    assert text.getvalue().strip() == (
        "step  7/20  reward 1.00  success 2.00  entropy 3.00  clipped 4.00+5.00  fresh 6.0  tools 7 (8 failed)  "
        "grad 9.00  1234 tok/s  5.2 s"
    )


def always(point) -> float:
    """A branch rule of one's own."""
    return 0.875


def test_a_branch_rule_of_ones_own_decides(tmp_path: Path) -> None:
    settings = ("rollout.branch_rule=test_settings_reach:always", "rollout.fresh_paths=2", "rollout.max_tokens=40")
    trainer = trainer_for(tmp_path / "run", "log.trees=4", *settings)
    trainer.train_step()
    trees = json.loads((tmp_path / "run" / "trees" / "step_000001.json").read_text())["trees"]
    assert {decision["probability"] for tree in trees for decision in tree["tree"]["decisions"]} == {0.875}


def test_every_optimiser_step_has_the_learning_rate_of_its_place_in_the_run(tmp_path: Path) -> None:
    several = ("train.steps=2", "train.minibatches=2", "train.epochs=2", "optimizer.warmup_steps=8")
    trainer = trainer_for(tmp_path / "run", *several)
    optimizer, rates = trainer.learner.optimizer, []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.train()
    assert rates == pytest.approx([0.01 * place / 8 for place in range(1, 9)], rel=1e-12)
