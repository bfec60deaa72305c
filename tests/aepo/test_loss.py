"""Packed forward and loss against float64 truth: trajectories alone, and micro-batches against the whole batch."""

from __future__ import annotations

import pytest
import torch
from trainer_toys import random_samples, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import aepo.learning.loss
from aepo.config import Config, PolicyConfig
from aepo.learning.attention import packed_attention
from aepo.learning.batch import entropy_statistics
from aepo.learning.forward import check_packing, row_logits, with_old_policy, with_reference
from aepo.learning.learner import Learner
from aepo.learning.loss import loss_denominator, microbatch_loss, policy_objective
from aepo.learning.pack_paths import microbatches, pack
from aepo.parallel import OneProcess
from aepo_kernels import PolicyLoss, PolicyObjective, logits_policy_loss

PRESETS = ("aepo", "arpo", "grpo", "dapo", "cispo", "gppo", "gspo", "gigpo", "reinforce++")


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("scaling", [8**-0.5, 0.9])
def test_packed_logits_and_gradients_are_those_of_each_trajectory_alone(scaling: float) -> None:
    """scaling: of the scores, that of most models and one of another's own (Granite, Gemma)."""
    model, samples = tiny_model(), random_samples(6)
    for layer in model.model.layers:
        layer.self_attn.scaling = scaling
    batch = pack(samples, dtype=torch.float64)
    packed = row_logits(model, batch)
    direction = torch.linspace(-1, 1, packed.numel(), dtype=torch.float64).view_as(packed)
    (packed * direction).sum().backward()
    packed_gradients = gradients(model)

    model.zero_grad()
    alone = []
    for sample in samples:  # through transformers' own attention, one unpadded row
        ids = torch.tensor([sample.trajectory.token_ids])
        written = torch.tensor(sample.trajectory.generated[1:])
        alone.append(model(input_ids=ids, use_cache=False).logits[0, :-1][written])
    alone = torch.cat(alone)
    (alone * direction).sum().backward()
    assert (packed - alone).abs().max() < 1e-10
    assert (packed_gradients - gradients(model)).abs().max() < 1e-10 * gradients(model).abs().max()


@pytest.mark.parametrize("old_logprobs", ["engine", "recompute"])
@pytest.mark.parametrize("preset", PRESETS)
def test_microbatches_add_up_to_the_full_batch(preset: str, old_logprobs: str) -> None:
    model, samples = tiny_model(), random_samples(10)
    # Each term on top of the preset that could depend on how the batch was cut.
    policy = PolicyConfig(
        preset=preset,
        kl_coef=0.1,
        entropy_bonus=0.01,
        old_logprobs=old_logprobs,
        importance_cap=2.0 if old_logprobs == "recompute" else None,
    )
    objective, reference = policy_objective(policy), tiny_model(seed=1)

    def loss_and_gradient(tokens: int) -> tuple[float, torch.Tensor, int]:
        model.zero_grad()
        batches = [pack(part, dtype=torch.float64) for part in microbatches(samples, tokens)]
        if old_logprobs == "recompute":
            batches = [with_old_policy(model, batch, 0.8) for batch in batches]
        batches = [with_reference(reference, batch, 0.8) for batch in batches]
        stats = entropy_statistics(batches) if objective.entropy_advantage else None
        trained = sum(len(batch.rows) for batch in batches)
        losses = [
            microbatch_loss(
                model,
                batch,
                objective,
                temperature=0.8,
                denominator=loss_denominator(objective, trained, len(samples), 30),
                entropy_stats=stats,
            ).loss
            for batch in batches
        ]
        for loss in losses:
            loss.backward()
        return sum(loss.item() for loss in losses), gradients(model), len(batches)

    whole, whole_gradient, one = loss_and_gradient(10_000)
    cut, cut_gradient, several = loss_and_gradient(25)
    assert one == 1
    assert several >= 5
    assert cut == pytest.approx(whole, rel=1e-12, abs=1e-13)
    assert (cut_gradient - whole_gradient).abs().max() < 1e-11 * whole_gradient.abs().max()


@pytest.mark.parametrize("stats", [(1.5, 0.7), None], ids=["batch", "micro_batch"])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_pass_over_the_logits_gives_the_numbers_of_two(
    preset: str, stats: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is taken wherever a token's gradient follows from its own row."""
    model = tiny_model()
    batch = with_reference(tiny_model(seed=1), pack(random_samples(8), dtype=torch.float64), 0.8)
    objective = policy_objective(PolicyConfig(preset=preset, kl_coef=0.1, entropy_bonus=0.01))
    passes: list[bool] = []

    def spy(*args: object, single_pass: bool, inplace_backward: bool, **others: object) -> PolicyLoss:
        assert single_pass != inplace_backward
        passes.append(single_pass)
        return logits_policy_loss(*args, single_pass=single_pass, inplace_backward=inplace_backward, **others)

    def result() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        given = stats if objective.entropy_advantage else None
        loss, metrics = microbatch_loss(model, batch, objective, temperature=0.8, denominator=20, entropy_stats=given)
        (3 * loss).backward()  # the upstream gradient is not 1
        return torch.stack([loss.detach(), *metrics.values()]), gradients(model)

    monkeypatch.setattr(aepo.learning.loss, "logits_policy_loss", spy)
    numbers, gradient = result()
    assert passes == [preset != "gspo" and (preset != "aepo" or stats is not None)]
    monkeypatch.setattr(PolicyObjective, "follows_from_each_token", lambda self, entropy_stats: False)
    two, expected = result()
    assert passes[1:] == [False]
    torch.testing.assert_close(numbers, two, rtol=1e-13, atol=0)
    assert expected.abs().max() > 1e-3
    assert (gradient - expected).abs().max() < 1e-13 * expected.abs().max()


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"])
def test_the_denominator_is_what_the_aggregation_divides_by(aggregation: str) -> None:
    # CISPO without bounds and with ratio 1: the loss is the weighted sum of -A logprob, computed here by hand.
    model, samples = tiny_model(), random_samples(3)
    objective = policy_objective(PolicyConfig(preset="cispo", aggregation=aggregation))
    batch = with_old_policy(model, pack(samples, dtype=torch.float64), 1.0)
    denominator = loss_denominator(objective, len(batch.rows), len(samples), max_tokens=30)
    loss = microbatch_loss(model, batch, objective, temperature=1.0, denominator=denominator, entropy_stats=None).loss
    terms = [(-batch.advantages * batch.old_logprobs)[a:b] for a, b in batch.bounds.unfold(0, 2, 1)]
    expected = {
        "token-mean": sum(t.sum() for t in terms) / sum(len(t) for t in terms),
        "seq-mean-token-sum": sum(t.sum() for t in terms) / 3,
        "seq-mean-token-mean": sum(t.mean() for t in terms) / 3,
        "constant": sum(t.sum() for t in terms) / (3 * 30),
    }[aggregation]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_old_policy_is_the_model_itself() -> None:
    model, samples = tiny_model(), random_samples(4)
    batch = with_old_policy(model, pack(samples, dtype=torch.float64), 0.7)
    probabilities = (row_logits(model, batch) / 0.7).log_softmax(-1).detach()
    chosen = probabilities.gather(1, batch.labels[:, None])[:, 0]
    entropies = -(probabilities.exp() * probabilities).sum(-1)
    assert (batch.old_logprobs - chosen).abs().max() < 1e-12
    assert (batch.entropies - entropies).abs().max() < 1e-12
    assert torch.equal(batch.rollout_logprobs, pack(samples, dtype=torch.float64).old_logprobs), "the engine's stay"


def test_the_published_per_micro_batch_statistics_depend_on_the_cut_and_ours_do_not() -> None:
    model, samples = tiny_model(), random_samples(8)
    objective = policy_objective(PolicyConfig(preset="aepo"))

    def total(tokens: int, stats: tuple[float, float] | None) -> float:
        batches = [pack(part, dtype=torch.float64) for part in microbatches(samples, tokens)]
        trained = sum(len(b.rows) for b in batches)
        return sum(
            microbatch_loss(model, b, objective, temperature=1.0, denominator=trained, entropy_stats=stats).loss.item()
            for b in batches
        )

    assert total(20, (1.5, 0.7)) == pytest.approx(total(10_000, (1.5, 0.7)), rel=1e-12)
    assert abs(total(20, None) - total(10_000, None)) > 1e-4


def test_other_models_get_their_own_attention_back() -> None:
    model, batch = tiny_model(), pack(random_samples(2))
    before = model.config._attn_implementation
    row_logits(model, batch)
    assert model.config._attn_implementation == before


def test_start_up_check_refuses_what_packing_cannot_express() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    check_packing(tiny_model(torch.float32))
    check_packing(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)))
    check_packing(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4)).eval())
    windowed = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    with pytest.raises(ValueError, match="sliding_window"):
        check_packing(MistralForCausalLM(windowed))


def test_start_up_check_notices_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that mixes positions outside attention, as a state-space layer does."""
    model = tiny_model()
    inner = model.model.layers[0].forward

    def leaking(hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return inner(hidden + 0.1 * hidden.cumsum(1).roll(1, 1), *args, **kwargs)

    monkeypatch.setattr(model.model.layers[0], "forward", leaking)
    with pytest.raises(ValueError, match="cannot be trained on packed trajectories"):
        check_packing(model)


def test_start_up_check_passes_no_model_without_numbers() -> None:
    """NaN is not above the limit either."""
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"change by nan \(relative\) .* expected at most 0\.001"):
        check_packing(model)


@pytest.mark.parametrize(
    ("dtype", "leak", "passes"),
    [
        (torch.float32, 1e-4, True),
        (torch.float32, 2e-3, False),
        (torch.bfloat16, 0, True),
        (torch.bfloat16, 0.1, False),
    ],
)
def test_start_up_check_has_a_limit(
    dtype: torch.dtype, leak: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1e-3: these change the logits by 2e-4 and 4e-3. Of 0.03 in bfloat16, whose rounding alone gives 1e-2."""
    model = tiny_model(dtype)
    inner = model.model.norm.forward
    monkeypatch.setattr(model.model.norm, "forward", lambda hidden: inner(hidden + leak * hidden.cumsum(1)))
    if passes:
        check_packing(model)
    else:
        with pytest.raises(ValueError, match="cannot be trained on packed trajectories"):
            check_packing(model)


def test_a_learner_checks_its_model() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.raises(ValueError, match="sliding_window"):
        Learner(MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=4)), Config(), str, OneProcess())


def test_a_learner_trains_without_dropout() -> None:
    """It would make the ratio differ from 1 before any update."""
    assert not any(
        module.training for module in Learner(tiny_model().train(), Config(), str, OneProcess()).model.modules()
    )


def test_dropout_is_refused_in_packed_attention() -> None:
    rows = torch.zeros(1, 1, 3, 8)
    with pytest.raises(ValueError, match="packed attention has no dropout"):
        packed_attention(torch.nn.Module(), rows, rows, rows, None, lengths=(3,), dropout=0.1)
