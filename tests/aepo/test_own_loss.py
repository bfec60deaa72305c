"""A loss of one's own in the trainer: what the function gets, that it is the loss, and what every mistake says."""

from __future__ import annotations

import functools
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import outcome, same, trainer_for, weights
from torch import Tensor
from trainer_toys import random_samples, tiny_model
from typer.testing import CliRunner

from aepo.config import OBJECTIVE_KEYS, PolicyConfig, load_config
from aepo.learning.batch import Batch, entropy_statistics
from aepo.learning.learner import Learner
from aepo.learning.nonfinite import NonFiniteError
from aepo.own_loss import CLIPPED, MEASURED, LossBatch, OwnLossError, own_loss, try_own_loss
from aepo.parallel import OneProcess
from aepo.report import write_report
from aepo.run.checkpoint import list_checkpoints
from aepo.run.log import read_records
from aepo.run.metrics import loss_metrics
from aepo_kernels import PolicyObjective

ROOT = Path(__file__).parents[2]
HERE = "policy.loss=test_own_loss:"


def ppo(ratio: Tensor, advantages: Tensor, bound: float = 0.2) -> Tensor:
    """Per token."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - bound, 1 + bound) * advantages)


def arpo(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
    terms = ppo((logprobs - batch.old_logprobs).exp(), batch.advantages)
    return torch.where(batch.advantages < 0, terms.clamp(max=-3 * batch.advantages), terms).sum() / batch.tokens


def aepo(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The clip keeps the bound's gradient, written as the paper does: bound / sg(ratio) * ratio."""
    ratio = (logprobs - batch.old_logprobs).exp()
    mean, std = batch.entropy_stats
    advantages = batch.advantages * (1 + 0.2 * (entropy.detach() - mean) / std)
    high = ratio > 1.2
    bounded = torch.where(high, 1.2 * ratio / ratio.detach(), ratio.clamp(min=0.8))
    terms = torch.maximum(-ratio * advantages, -bounded * advantages)
    terms = torch.where(advantages < 0, terms.clamp(max=-3 * advantages), terms)
    return terms.sum() / batch.tokens, {"high": high.double().mean(), "count": len(ratio)}


def gspo_and_kl(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
    """One ratio per path, k3 to the reference, an entropy bonus: everything that a batch has."""
    difference, terms = batch.ref_logprobs - logprobs, []
    for start, end in batch.cu_seqlens.unfold(0, 2, 1).tolist():
        path = slice(start, end)
        ratio = (logprobs - batch.old_logprobs)[path].mean().exp()
        bounded = ratio.clamp(1 - 3e-4, 1 + 4e-4)
        policy = -torch.minimum(ratio * batch.advantages[path], bounded * batch.advantages[path])
        kl = difference[path].exp() - 1 - difference[path]
        terms.append((policy + 0.1 * kl - 0.01 * entropy[path]).mean())
    return torch.stack(terms).sum() / batch.paths


def constant(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
    return ppo((logprobs - batch.old_logprobs).exp(), batch.advantages).sum() / (batch.paths * batch.max_tokens)


IDS = ["q0", "q1", "q2"]


def learner_for(*overrides: str, tokens: int = 10_000) -> Learner:
    config = load_config(overrides=[f"train.tokens_per_microbatch={tokens}", "rollout.temperature=0.8", *overrides])
    learner = Learner(tiny_model(), config, str, OneProcess())
    if learner._reference is not None:  # a copy of the model would have a KL of 0
        learner._reference = tiny_model(seed=1)
    return learner


def gradients(learner: Learner) -> tuple[float, Tensor, int]:
    """Loss and gradient of one optimiser step on 10 paths, and the number of micro-batches."""
    batch = learner.add_log_probs(learner.pack_samples(random_samples(10), IDS))
    (minibatch,) = batch.minibatches
    parts, norm = learner.backward(minibatch, learner.entropy_stats(batch), IDS)
    raw = torch.cat([p.grad.flatten() for p in learner.model.parameters()]) * max(norm, 1)
    return sum(part["loss"] for part in parts), raw, len(minibatch)


@pytest.mark.parametrize("tokens", [10_000, 25], ids=["whole", "cut"])
@pytest.mark.parametrize(
    ("function", "preset"),
    [
        ("arpo", ["policy.preset=arpo"]),
        ("aepo", ["policy.preset=aepo"]),
        ("gspo_and_kl", ["policy.preset=gspo", "policy.kl_coef=0.1", "policy.entropy_bonus=0.01"]),
        ("constant", ["policy.preset=reinforce++", "policy.aggregation=constant"]),
    ],
)
def test_a_preset_written_as_a_function_is_the_preset(function: str, preset: list[str], tokens: int) -> None:
    own = learner_for(HERE + function, f"policy.reference={'kl' in function}", tokens=tokens)
    loss, gradient, cut = gradients(own)
    truth, expected, _ = gradients(learner_for(*preset))
    assert (cut > 4) == (tokens == 25)
    assert abs(truth) > 1e-3
    assert loss == pytest.approx(truth, rel=1e-11)
    assert (gradient - expected).abs().max() < 1e-10 * expected.abs().max()


def test_the_batch_holds_the_trained_tokens_and_nothing_else() -> None:
    seen: list[LossBatch] = []

    def spy(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
        seen.append(batch)
        return (logprobs * batch.advantages).sum() / batch.tokens

    learner = learner_for(HERE + "arpo", "policy.reference=true", "rollout.max_tokens=77", tokens=25)
    learner.own_loss = spy
    batch = learner.add_log_probs(learner.pack_samples(random_samples(10), IDS))
    (minibatch,) = batch.minibatches
    learner.backward(minibatch, learner.entropy_stats(batch), IDS)
    assert len(seen) == len(minibatch) > 4
    written = {(sample.question, sample.path): sample.trajectory.generated for sample in random_samples(10)}
    for given, packed in zip(seen, minibatch, strict=True):
        assert (given.tokens, given.paths, given.max_tokens) == (sum(len(b.rows) for b in minibatch), 10, 77)
        assert given.temperature == 0.8
        assert given.entropy_stats == entropy_statistics(minibatch)
        for name in ("old_logprobs", "advantages", "rollout_logprobs", "ref_logprobs"):
            assert torch.equal(getattr(given, name), getattr(packed, name)), name
        assert torch.equal(given.old_entropy, packed.entropies)
        lengths = [sum(written[origin]) for origin in packed.origins]
        assert given.cu_seqlens.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]


def test_without_a_reference_there_is_none() -> None:
    learner = learner_for(HERE + "arpo")
    assert learner._reference is None
    assert learner.add_log_probs(learner.pack_samples(random_samples(4), ["q0"])).minibatches[0][0].ref_logprobs is None


def test_its_metrics_are_means_over_tokens() -> None:
    learner = learner_for(HERE + "aepo", tokens=25)
    batch = learner.pack_samples(random_samples(10), IDS)
    (minibatch,) = batch.minibatches
    parts, _ = learner.backward(minibatch, learner.entropy_stats(batch), IDS)
    record, whole = loss_metrics([parts]), learner_for("policy.preset=aepo")
    one = whole.pack_samples(random_samples(10), IDS)
    truth = loss_metrics([whole.backward(one.minibatches[0], whole.entropy_stats(one), IDS)[0]])
    sizes = [len(rows.rows) for rows in minibatch]
    assert record["policy.count"] == pytest.approx(sum(size * size for size in sizes) / sum(sizes))
    assert 0 < record["policy.high"] < 1
    for name in ("entropy", "entropy_std", "ratio_mean", "ratio_max", "approx_kl", "loss"):
        assert record[f"policy.{name}"] == pytest.approx(truth[f"policy.{name}"], rel=1e-11), name
    assert record["policy.clip_high"] is None, "what a clip is only the function knows"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in two optimiser steps each."""
    directory = tmp_path_factory.mktemp("own") / "run"
    trainer_for(directory, "train.steps=4", HERE + "aepo", "train.minibatches=2", "train.epochs=2").train()
    return directory


def test_metrics_reach_the_log_and_the_report(run: Path, tmp_path: Path) -> None:
    records = read_records(run / "metrics.jsonl")
    assert all(record["policy.count"] > 0 and record["policy.high"] is not None for record in records)
    page = write_report([run], tmp_path / "report.html").read_text()
    chart = json.loads(page.split('"title":"Metrics of policy.loss"')[1].split('"series":', 1)[1].split("]")[0] + "]")
    assert [line["key"] for line in chart] == ["policy.count", "policy.high"]
    assert "test_own_loss:aepo" in page


def test_the_report_of_a_preset_has_no_such_chart(tmp_path: Path) -> None:
    settings = ("policy.old_logprobs=recompute", "policy.kl_coef=0.1", "train.steps=1")
    trainer_for(tmp_path / "run", *settings).train()
    assert "Metrics of policy.loss" not in write_report([tmp_path / "run"]).read_text()
    (record,) = read_records(tmp_path / "run" / "metrics.jsonl")
    logged = {key.removeprefix("policy.") for key in record if key.startswith("policy.")}
    assert logged == MEASURED | CLIPPED


def test_a_resumed_run_remembers_the_loss(run: Path, tmp_path: Path) -> None:
    settings = (HERE + "aepo", "train.minibatches=2", "train.epochs=2")
    trainer_for(tmp_path / "run", "train.steps=2", *settings).train()
    config = load_config(tmp_path / "run" / "config.yaml", [])
    assert config.policy.loss == "test_own_loss:aepo"
    trainer_for(
        tmp_path / "run", "train.steps=4", f"policy.loss={config.policy.loss}", *settings[1:], resume_step=2
    ).train()
    assert outcome(tmp_path / "run") == outcome(run)


def test_the_loop_learns_with_it(tmp_path: Path) -> None:
    settings = ("run.seed=1", "train.steps=30", "train.questions=8", "rollout.paths=8", "rollout.max_tokens=4")
    settings += ("optimizer.learning_rate=4e-3", "eval.every=0", "policy.loss=examples.own_losses:sapo")
    trainer_for(tmp_path / "run", *settings).train()
    success = [record["train.success"] for record in outcome(tmp_path / "run")[0]]
    assert success[0] < 0.3
    assert sum(success[-5:]) / 5 > 0.6  # who does not read the question gets 0.5 at most; measured with this seed: 0.75


def nothing(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> None:
    logprobs.sum()


def per_token(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
    return -batch.advantages * logprobs


def no_gradient(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
    return (batch.advantages * logprobs.detach()).sum()


def not_finite(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
    return (logprobs / (batch.tokens - batch.tokens)).sum()


def steep(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
    return (logprobs - logprobs.detach()).abs().sqrt().sum()


def in_place(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
    logprobs.sub_(batch.old_logprobs)
    return logprobs.sum()


def typo(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
    return (batch.advantage * logprobs).sum()


def ref(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
    return (logprobs - batch.ref_logprobs).sum()


def other_none(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
    return (logprobs - batch.ref_logprobs + None).sum()


def shapes(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
    return (logprobs * batch.cu_seqlens).sum()


def taken(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> tuple[Tensor, dict[str, float]]:
    return logprobs.sum(), {"kl": 1.0}


def spaces(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> tuple[Tensor, dict[str, float]]:
    return logprobs.sum(), {"clip rate": 1.0}


def vector(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> tuple[Tensor, dict[str, Tensor]]:
    return logprobs.sum(), {"ratios": logprobs}


def writes_the_batch(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
    batch.tokens = 1  # type: ignore[misc]
    return logprobs.sum()


def bounded(logprobs: Tensor, entropy: Tensor, batch: LossBatch, bound: float) -> Tensor:
    return ppo(logprobs - batch.old, batch.advantages, bound).sum()


class Gate:
    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
        return logprobs

    @staticmethod
    def loss(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
        return logprobs.sum()


def draws(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
    return (logprobs * torch.rand_like(logprobs)).sum() / batch.tokens


wider = functools.partial(bounded, bound=0.3)
gate = Gate()
NUMBER = 3.0


MISTAKES = pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "loss_fn test_own_loss.nothing must return a loss [] or (loss [], {name: number}); got a NoneType"),
        ("per_token", "loss_fn test_own_loss.per_token must return a loss of shape (), one number; got shape ("),
        ("no_gradient", "loss_fn test_own_loss.no_gradient must return a loss that depends on logprobs or entropy"),
        ("not_finite", "loss_fn test_own_loss.not_finite must be finite where log-probs and entropies are; got a loss"),
        ("steep", "loss_fn test_own_loss.steep must be finite where log-probs and entropies are; got gradients that"),
        ("in_place", "in_place raised RuntimeError: a leaf Variable that requires grad is being used in an in-place"),
        ("typo", "typo raised AttributeError: 'LossBatch' object has no attribute 'advantage'"),
        (
            "ref",
            "ref raised TypeError: unsupported operand type(s) for -: 'Tensor' and 'NoneType' "
            "(test_own_loss.py, line {}); batch.ref_logprobs is None without policy.reference=true",
        ),
        (
            "spaces",
            "spaces: names of metrics must be letters, digits and _ . / -, begin with a letter or _, and not with "
            "policy., which the trainer writes before them; got 'clip rate'",
        ),
        ("shapes", "shapes raised RuntimeError: The size of tensor a ("),
        ("taken", "taken: metric 'kl' must have another name, the trainer logs its own policy.kl"),
        ("vector", "loss_fn test_own_loss.vector: metric 'ratios' must be one number; got shape ("),
        ("gate", "loss_fn test_own_loss.Gate.__call__ must return a loss of shape (), one number; got shape ("),
        ("wider", "bounded raised AttributeError: 'LossBatch' object has no attribute 'old'"),
        ("writes_the_batch", "writes_the_batch raised FrozenInstanceError: cannot assign to field 'tokens'"),
    ],
)


def with_line(message: str) -> str:
    """The number of the function's first line, for {}."""
    lines = enumerate(Path(__file__).read_text().splitlines(), 1)
    start = next((n for n, text in lines if f"def {message.split()[0]}(" in text), 0)
    return message.replace("{}", str(start + 1))


@MISTAKES
def test_a_mistake_is_found_before_anything_is_made(tmp_path: Path, function: str, message: str) -> None:
    from aepo.cli import app

    run = tmp_path / "run"
    settings = [f"model.cache_dir={tmp_path}", f"run.dir={run}", "warm_start.steps=0", "train.steps=0", HERE + function]
    result = CliRunner().invoke(app, ["train", *settings])
    assert result.exit_code == 1
    assert result.output.startswith(f"error: policy.loss: {with_line(message)}")
    assert result.output.endswith(" (tried on made-up tokens before the start)\n")
    assert result.output.count("\n") == 1
    with pytest.raises(OwnLossError) as error:
        trainer_for(run, HERE + function)
    assert f"error: {error.value}\n" == result.output
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(("model", "dtype"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_the_made_up_batch_is_as_a_real_one(model: torch.dtype, dtype: torch.dtype, reference: bool) -> None:
    seen: list[tuple[Tensor, Tensor, LossBatch]] = []

    def spy(*given: Any) -> Tensor:
        seen.append(given)
        return (given[0] * given[2].advantages).sum() / given[2].tokens

    settings = (f"policy.reference={str(reference).lower()}", "rollout.max_tokens=77", "rollout.temperature=0.8")
    config = load_config(overrides=[HERE + "arpo", *settings])
    for _ in range(2):
        try_own_loss(spy, config, dtype, "cpu")
    learner = Learner(tiny_model(model), config, str, OneProcess())
    learner.own_loss = spy
    batch = learner.add_log_probs(learner.pack_samples(random_samples(10), IDS))
    (minibatch,) = batch.minibatches
    learner.backward(minibatch, learner.entropy_stats(batch), IDS)
    (logprobs, entropy, given), (again, _, _), (_, _, real) = seen
    assert torch.equal(logprobs, again)
    assert logprobs.shape == entropy.shape == (12,)
    assert logprobs.dtype == entropy.dtype == dtype
    assert (logprobs >= -4).all()
    assert (logprobs <= -0.05).all()
    assert (entropy > 0).all()
    for field in fields(LossBatch):
        ours, theirs = getattr(given, field.name), getattr(real, field.name)
        assert type(ours) is type(theirs), field.name
        if isinstance(ours, Tensor):
            assert ours.dtype == theirs.dtype, field.name
            assert ours.shape == ((4,) if field.name == "cu_seqlens" else (12,)), field.name
    assert given.advantages.min() < 0 < given.advantages.max()
    assert 0.01 < (logprobs - given.old_logprobs).abs().max() < 0.5
    assert given.old_logprobs.max() < 0 < given.old_entropy.min()
    assert given.rollout_logprobs is given.old_logprobs
    assert given.cu_seqlens.tolist() == [0, 3, 8, 12]
    assert (given.tokens, given.paths, given.max_tokens, given.temperature) == (12, 3, 77, 0.8)
    assert given.entropy_stats == pytest.approx((given.old_entropy.mean().item(), given.old_entropy.std().item()))


def test_the_made_up_engine_differs_from_the_trainer_where_real_ones_do() -> None:
    def differs(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
        assert 0.01 < (batch.rollout_logprobs - batch.old_logprobs).abs().max() < 0.5
        return logprobs.sum()

    config = load_config(overrides=[HERE + "arpo", "policy.old_logprobs=recompute"])
    try_own_loss(differs, config, torch.float32, "cpu")


def test_trying_a_function_leaves_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    try_own_loss(draws, load_config(overrides=[HERE + "draws"]), torch.float32, "cpu")
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_hint_on_a_missing_reference_is_not_given_where_there_is_one() -> None:
    with pytest.raises(OwnLossError, match=r"line \d+\) \(tried"):
        learner_for(HERE + "other_none", "policy.reference=true")


def test_a_wrong_field_is_answered_with_all_of_them_the_nearest_first() -> None:
    with pytest.raises(OwnLossError) as error:
        learner_for(HERE + "typo")
    assert str(error.value).endswith(
        "; it has advantages, cu_seqlens, entropy_stats, max_tokens, old_entropy, old_logprobs, paths, ref_logprobs, "
        "rollout_logprobs, temperature, tokens (tried on made-up tokens before the start)"
    )


@pytest.mark.parametrize("name", ["high", "_x", "is/clip-rate.high_2", "policy", "policy/x", "Kl"])
def test_names_of_metrics(name: str) -> None:
    config = load_config(overrides=[HERE + "arpo"])
    try_own_loss(lambda logprobs, *_: (logprobs.sum(), {name: 1.0}), config, torch.float32, "cpu")


@pytest.mark.parametrize("name", ["", "a b", "2x", "-x", ".x", "policy.x", "é", "x\n", "a=b", 3])
def test_what_is_no_name_of_a_metric(name: Any) -> None:
    config = load_config(overrides=[HERE + "arpo"])
    with pytest.raises(OwnLossError, match=r"names of metrics must be letters, .*; got ") as error:
        try_own_loss(lambda logprobs, *_: (logprobs.sum(), {name: 1.0}), config, torch.float32, "cpu")
    assert repr(name) in str(error.value)


@MISTAKES
def test_what_a_function_does_wrong_ends_the_run_in_one_line(tmp_path: Path, function: str, message: str) -> None:
    """A mistake that made-up tokens did not show."""
    trainer = trainer_for(tmp_path / "run", HERE + "arpo")
    trainer.learner.own_loss = own_loss(f"test_own_loss:{function}")
    before = weights(trainer)
    with pytest.raises(OwnLossError) as error:
        trainer.train()
    assert str(error.value).startswith(f"policy.loss: {with_line(message)}")
    assert "made-up" not in str(error.value)
    assert "\n" not in str(error.value)
    if " raised " in message:
        assert with_line(f"{message.split()[0]} (test_own_loss.py, line {{}})").partition(" ")[2] in str(error.value)
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (status["status"], status["reason"]) == ("failed", str(error.value))
    assert same(before, weights(trainer))
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].step == 0


@pytest.mark.parametrize("name", ["old_logprobs", "advantages", "entropies"])
def test_what_is_not_finite_before_the_function_is_not_its_fault(tmp_path: Path, name: str) -> None:
    trainer = trainer_for(tmp_path / "run", HERE + "aepo")
    inner = trainer.learner.pack

    def pack_with_nan(*args: object) -> Batch:
        batch = inner(*args)
        getattr(batch.minibatches[0][0], name)[2] = torch.nan
        return batch

    trainer.learner.pack = pack_with_nan  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"question q\d, path \d, token") as error:
        trainer.train()
    words = {"old_logprobs": "old log-prob", "advantages": "advantage", "entropies": "old entropy"}
    assert f"{words[name]} nan" in str(error.value)


@pytest.mark.parametrize("name", OBJECTIVE_KEYS)
def test_a_setting_that_the_function_would_not_see_is_refused(name: str) -> None:
    values = {"clip": "ppo", "ratio_level": "token", "clamp_entropy_factor": False, "kl_estimator": "k3"}
    values |= {"aggregation": "token-mean", "dual_clip": 3.0}
    with pytest.raises(ValueError, match=rf"^policy\.{name} = .*: expected not to be set with policy\.loss"):
        PolicyConfig(loss="a:b", **{name: values.get(name, 0.5)})


def test_the_refused_settings_are_those_of_the_objective() -> None:
    assert set(OBJECTIVE_KEYS) <= set(PolicyObjective.__dataclass_fields__)
    with pytest.raises(ValueError, match=r"policy\.entropy_stats = 'micro_batch': expected not to be set"):
        PolicyConfig(loss="a:b", entropy_stats="micro_batch")
    with pytest.raises(ValueError, match=r"policy\.clip = 'ppo'.* would not see it, nor policy\.eps_low, nor policy\."):
        PolicyConfig(loss="a:b", clip="ppo", eps_low=0.1, kl_coef=0.0)
    with pytest.raises(ValueError, match=r"policy\.reference = true: expected policy\.loss"):
        PolicyConfig(reference=True)
    PolicyConfig(loss="a:b", reference=True, advantage="batch", preset="gigpo", step_weight=0.5)


def test_a_function_must_be_one_and_take_what_it_gets() -> None:
    assert own_loss("test_own_loss:Gate.loss") is Gate.loss
    assert own_loss("test_own_loss:gate") is gate
    assert own_loss("test_own_loss:wider") is wider
    for name, message in {
        "NUMBER": "expected a function (logprobs, entropy, batch); it is of type float",
        "random_samples": "it is random_samples(count: 'int', seed: 'int' = 0) -> 'list[Sample]': too many positional",
        "Gate": "it is Gate(): too many positional",
    }.items():
        with pytest.raises(ValueError) as error:  # noqa: PT011, the text is compared below
            own_loss(f"test_own_loss:{name}")
        assert message in str(error.value)
