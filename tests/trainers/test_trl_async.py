"""AEPOAsyncTrainer against the published losses in float64, on samples that share prefixes in TRL's packed rows."""

import os
import subprocess
import sys
import types
from pathlib import Path

import async_toys
import pytest
import torch
import trl.experimental.async_grpo as theirs
from async_toys import TEMPERATURE, OwnLoss, make_async_trainer, oracle_batch, save_model, toy_model, tree_samples
from peft import LoraConfig
from policy_oracle import policy_oracle
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl_toys import make_tokenizer

from aepo.integrations.trl.asynchronous import AEPOAsyncConfig, AEPOAsyncTrainer
from aepo.integrations.trl.versions import check_async_overrides
from aepo_kernels import PolicyObjective

ROUNDED = 2e-6
"""Of float64 gradients of a model whose norms compute in float32 whatever its dtype; 3e-7 seen. One term left out, or
divided by another number, is 1e-3 at the least."""
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    async_toys.run_on_a_cpu(monkeypatch.setattr)


def train(folder, samples=None, **changed):
    trainer = make_async_trainer(AEPOAsyncTrainer, AEPOAsyncConfig, folder, samples or tree_samples(), **changed)
    trainer.train()
    return trainer


def oracle_gradients(objective, samples, **changed):
    model = toy_model()
    loss = policy_oracle(oracle_batch(model, samples), objective, **changed)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def far(found, expected):
    """Largest difference of any weight's gradient, in parts of the largest entry of that weight's own."""
    assert found.keys() == expected.keys()
    return max(((found[n] - g).abs().max() / g.abs().max()).item() for n, g in expected.items())


@pytest.mark.parametrize("preset", ["aepo", "arpo", "grpo", "dapo", "cispo", "gppo", "gspo"])
def test_gradients_of_two_micro_batches_are_those_of_the_published_loss(tmp_path, preset):
    samples = tree_samples()
    trainer = train(tmp_path, samples, preset=preset, per_device=4, accumulation=2)
    _, expected = oracle_gradients(PolicyObjective.preset(preset), samples)
    assert far(trainer.gradients.found, expected) < ROUNDED
    logged = trainer.state.log_history[0]
    assert logged["batch/packing_ratio"] > 1.5  # prefixes were shared
    assert logged["policy/clip_low" if preset != "cispo" else "policy/clip_high"] > 0 or preset == "cispo"


def test_settings_override_the_preset(tmp_path):
    samples = tree_samples()
    settings = {"epsilon": 0.1, "epsilon_high": 0.5, "delta": 1.8, "loss_type": "dr_grpo"}
    own = {"entropy_advantage": 1.5, "clamp_entropy_factor": True, "entropy_bonus": 0.01}
    trainer = train(tmp_path, samples, per_device=4, accumulation=2, objective=own, **settings)
    numbers = {"eps_low": 0.1, "eps_high": 0.5, "dual_clip": 1.8, "aggregation": "constant"}
    objective = PolicyObjective.preset("aepo", **numbers, **own)
    _, expected = oracle_gradients(objective, samples, denominator=8 * 8)  # samples times max_completion_length
    assert far(trainer.gradients.found, expected) < ROUNDED
    assert trainer.state.log_history[0]["policy/dual_clip"] > 0


def test_gradients_do_not_depend_on_the_cut_into_micro_batches(tmp_path):
    cuts = [train(tmp_path / str(n), per_device=n, accumulation=8 // n, preset="aepo") for n in (8, 4, 2)]
    whole = cuts[0].gradients.found
    assert max(far(cut.gradients.found, whole) for cut in cuts[1:]) < ROUNDED
    entropy = oracle_batch(toy_model(), tree_samples()).entropy
    for cut in cuts:
        assert cut.state.log_history[0]["policy/entropy_std"] == pytest.approx(entropy.std().item(), rel=1e-9)
    # One micro-batch has its statistics from its own forward; several cost a pass.
    assert ["perf/entropy_pass_s" in cut.state.log_history[0] for cut in cuts] == [False, True, True]


@pytest.mark.parametrize("preset", ["aepo", "grpo"])
def test_rows_of_a_token_budget_hold_as_many_samples_as_fit(tmp_path, preset):
    trainer = train(tmp_path, preset=preset, per_device=4, accumulation=2, token_budget=60)
    used = round(trainer.state.log_history[0]["batch/samples_per_step"])
    assert used % 2 == 1  # so micro-batches differ in their number of samples, not only in their tokens
    _, expected = oracle_gradients(PolicyObjective.preset(preset), tree_samples()[:used])
    assert far(trainer.gradients.found, expected) < ROUNDED


def test_where_trl_has_the_same_loss_gradients_are_trls(tmp_path):
    samples = tree_samples()
    one = make_async_trainer(theirs.AsyncGRPOTrainer, theirs.AsyncGRPOConfig, tmp_path / "trl", samples)
    one.train()
    trainer = train(tmp_path / "ours", samples, preset="dapo", epsilon=0.2)
    assert far(trainer.gradients.found, one.gradients.found) < 5e-6  # TRL's head computes float64 weights in float32


def test_every_metric_of_trl_is_there_with_the_same_value(tmp_path):
    one = make_async_trainer(
        theirs.AsyncGRPOTrainer, theirs.AsyncGRPOConfig, tmp_path / "trl", tree_samples(), per_device=4, accumulation=2
    )
    one.train()
    trainer = train(tmp_path / "ours", preset="dapo", epsilon=0.2, per_device=4, accumulation=2)
    (expected, _), (found, _) = one.state.log_history, trainer.state.log_history
    assert expected.keys() - found.keys() == set()
    assert {name for name in found.keys() - expected.keys() if not name.startswith("policy/")} == set()
    another_loss = {"loss", "grad_norm"}  # TRL's is the mean of the micro-batches' means
    for name in expected.keys() - another_loss:
        if not name.startswith(("perf/", "sample/rollout_queue")):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert found["policy/clip_low"] > 0


def test_clip_ratios_per_token_are_not_logged_of_a_loss_without(tmp_path):
    logged = train(tmp_path, preset="gspo").state.log_history[0]
    assert not any(name.startswith("clip_ratio") for name in logged)
    batch = oracle_batch(toy_model(), tree_samples())
    lengths = batch.cu_seqlens.diff().tolist()
    log_ratios = (batch.logprobs - batch.old_logprobs).split(lengths)
    ratios = torch.cat([one.mean().exp().expand(len(one)) for one in log_ratios])
    high, low = (ratios > 1 + 4e-4) & (batch.advantages > 0), (ratios < 1 - 3e-4) & (batch.advantages < 0)
    assert logged["policy/clip_high"] == pytest.approx(high.double().mean().item())
    assert logged["policy/clip_low"] == pytest.approx(low.double().mean().item())
    assert high.any()
    assert low.any()


def own_loss_gradients():
    """Of OwnLoss on all samples at once, and what it measured."""
    batch = oracle_batch(model := toy_model(), tree_samples())
    entropy = batch.entropy.detach()
    given = types.SimpleNamespace(
        advantages=batch.advantages,
        old_logprobs=batch.old_logprobs,
        old_entropy=entropy,
        entropy_stats=(entropy.mean().item(), entropy.std().item()),
        tokens=len(entropy),
        paths=8,
        cu_seqlens=batch.cu_seqlens,
    )
    loss, metrics = OwnLoss()(batch.logprobs, batch.entropy, given)
    loss.backward()
    return metrics, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("per_device", [8, 4])
def test_a_loss_of_ones_own(tmp_path, per_device):
    function = OwnLoss()
    trainer = train(tmp_path, per_device=per_device, accumulation=8 // per_device, own={"loss_fn": function})
    metrics, expected = own_loss_gradients()
    assert far(trainer.gradients.found, expected) < ROUNDED
    logged = trainer.state.log_history[0]
    assert "policy/mine" in logged
    assert not any(name.startswith("clip_ratio") for name in logged)
    if per_device == 8:
        assert logged["policy/mine"] == pytest.approx(metrics["mine"].item())
    seen = function.batches[0]
    assert seen.max_tokens == 8
    assert seen.temperature == TEMPERATURE
    assert torch.equal(seen.rollout_logprobs, seen.old_logprobs)


def test_a_sample_of_which_nothing_counts_is_still_one(tmp_path):
    samples = tree_samples()
    samples[3].completion_mask[:] = 0
    trainer = train(tmp_path, samples, preset="grpo")
    _, expected = oracle_gradients(PolicyObjective.preset("grpo"), samples, denominator=8)
    assert far(trainer.gradients.found, expected) < ROUNDED


def test_two_ranks_have_the_gradients_of_one(tmp_path):
    save_model(tmp_path)
    command = [sys.executable, "-W", "ignore", str(HERE / "async_ranks.py"), str(tmp_path)]
    paths = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    shared = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": paths}
    ranks = [subprocess.Popen(command, env=shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    try:
        assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    expected = {name: oracle_gradients(PolicyObjective.preset(name), tree_samples())[1] for name in ("aepo", "gspo")}
    expected["own"] = own_loss_gradients()[1]
    entropy = oracle_batch(toy_model(), tree_samples()).entropy
    for name, gradients in expected.items():
        for rank in "01":
            found, logged = torch.load(tmp_path / f"{name}-{rank}.pt")
            assert far(found, gradients) < ROUNDED, (name, rank)
            if name != "gspo":
                assert logged["policy/entropy_std"] == pytest.approx(entropy.std().item(), rel=1e-6)


def test_float32_weights_with_gradient_checkpointing(tmp_path):
    samples = tree_samples()
    changed = {"model_init_kwargs": None, "gradient_checkpointing": True}
    trainer = train(tmp_path, samples, per_device=4, accumulation=2, **changed)
    _, expected = oracle_gradients(PolicyObjective.preset("aepo"), samples)
    found = trainer.gradients.found
    assert {g.dtype for g in found.values()} == {torch.float32}
    # As near as float32 sums of some hundred terms through 2 layers; a flipped clip would be 1e-2.
    assert far(found, expected) < 3e-5


def test_adapters_get_their_part_of_the_gradient(tmp_path):
    samples = tree_samples()
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], lora_dropout=0.0)
    trainer = train(tmp_path, samples, per_device=4, accumulation=2, own={"peft_config": lora})
    _, expected = oracle_gradients(PolicyObjective.preset("aepo"), samples)
    found = trainer.gradients.found
    assert all("lora" in name for name in found)
    start = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    # W + 3 B A with B = 0 is W; A has not moved, its gradient being 0
    a = trainer.model.get_parameter(f"{start}A.default.weight").detach()
    whole = expected["model.layers.1.self_attn.q_proj.weight"]
    assert far({"B": found[f"{start}B.default.weight"]}, {"B": 3 * whole @ a.T}) < ROUNDED
    assert found[f"{start}A.default.weight"].abs().max() == 0


def test_the_loss_of_a_router_is_added_as_trl_adds_it(tmp_path, monkeypatch):
    samples = tree_samples()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    torch.manual_seed(0)
    shape = Qwen3MoeConfig(vocab_size=len(make_tokenizer()), num_attention_heads=2, head_dim=16, **sizes, **experts)
    moe = Qwen3MoeForCausalLM(shape)
    monkeypatch.setattr(async_toys, "make_model", lambda _: moe)
    changed = {"per_device": 4, "accumulation": 2, "model_init_kwargs": None}
    without, with_it = (
        train(tmp_path / str(coef), samples, router_aux_loss_coef=coef, **changed).state.log_history[0]
        for coef in (0.0, 0.5)
    )
    assert with_it["loss"] - without["loss"] == pytest.approx(0.5 * with_it["aux_loss"], rel=1e-4)


def test_settings_that_would_be_ignored_are_refused_by_name(tmp_path):
    def config(**changed):
        return AEPOAsyncConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **changed)

    for changed, named in (
        ({"preset": "reinforce++"}, "preset='reinforce.*worker makes them"),
        ({"preset": "gigpo"}, "preset='gigpo'.*worker makes them"),
        ({"preset": "aep"}, "got 'aep'"),
        ({"objective": {"kl_coef": 0.1}}, "kl_coef.*no reference model"),
        ({"objective": {"importance_cap": 2.0}}, "importance_cap.*server that sampled"),
        ({"objective": {"eps_high": 0.3}, "epsilon_high": 0.2}, "eps_high.*both given"),
        ({"preset": "cispo", "epsilon": 0.2}, "epsilon=0.2 would be ignored"),
        ({"loss": "async_toys:tree_samples", "epsilon": 0.2}, "epsilon=0.2 would be ignored"),
        ({"loss_type": "bnpo"}, "loss_type='bnpo'"),
    ):
        with pytest.raises(ValueError, match=named):
            config(**changed)
    for name in ("beta", "advantage", "scale_rewards", "branched_rollouts"):  # AEPOConfig's
        with pytest.raises(TypeError, match=name):
            config(**{name: 0.1})
    with pytest.raises(ValueError, match=r"epsilon=0.3 would be ignored"):
        AEPOAsyncTrainer("model", args=config(epsilon=0.3), loss_fn=OwnLoss())
    with pytest.raises(TypeError, match=r"args must be an AEPOAsyncConfig.*AsyncGRPOConfig"):
        AEPOAsyncTrainer("model", args=theirs.AsyncGRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_another_trl_is_told_apart():
    check_async_overrides(theirs.AsyncGRPOTrainer)

    class Renamed(theirs.AsyncGRPOTrainer):
        def compute_loss(self, model, batch, return_outputs=False, num_items_in_batch=None): ...

    class OtherNames(theirs.AsyncGRPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return inputs["token_index"], inputs["old_log_probs"], inputs["advantages"], inputs["global_n_tokens"]

    with pytest.raises(TypeError, match=r"Renamed of TRL .* AEPOAsyncTrainer.*compute_loss takes \(model, batch"):
        check_async_overrides(Renamed)
    with pytest.raises(TypeError, match=r"does not read 'global_n_forward_tokens' .* 'mean_seq_len' .* 'segment_id'"):
        check_async_overrides(OtherNames)
