"""AEPOLoss against float64, called as torchtitan calls it: whole, in micro-batches, in chunks. `make test-titan`."""

import dataclasses

import pytest
import torch
import tyro
from titan_toys import VOCAB, build, entropy_stats, exact, make_step, rl_package, run, together

from aepo.integrations.titan import AEPOLoss
from aepo_kernels import PolicyObjective

rl_package()
from torchtitan.experiments.rl.losses import DAPOLoss, GRPOLoss  # noqa: E402

TOKEN_MEAN = {"aggregation": "token-mean"}
OBJECTIVES = [
    ("aepo", {}),
    ("aepo", {"clamp_entropy_factor": True, "entropy_advantage": 2.0}),
    ("arpo", {}),
    ("grpo", TOKEN_MEAN),
    ("dapo", {}),
    ("dapo", {"entropy_bonus": 0.1}),
    ("cispo", {"eps_high": 0.2}),
    ("gppo", {}),
    ("gigpo", {}),
    ("reinforce++", {"eps_low": 0.1}),
]
# Logits come from a float32 product of 6 numbers of size 1; the kernels add 3e-7 to log-probs and entropies.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def close(got, want):
    for one, truth in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), truth, **CLOSE)


@pytest.mark.parametrize("chunks", [None, 1, 4])
@pytest.mark.parametrize(("preset", "objective"), OBJECTIVES)
def test_every_objective_whole_and_in_chunks(preset, objective, chunks):
    step = make_step()
    chosen = PolicyObjective.preset(preset, **objective)
    stats = entropy_stats(step) if chosen.entropy_advantage else None
    loss = build(chunks, stats, preset=preset, objective=objective)
    want = exact(step, chosen, entropy_stats=stats)
    got = run(loss, step, step.tokens())
    close(got[:3], want[:3])
    assert got[1].abs().max() > 1e-3


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("chunks", [None, 2])
def test_micro_batches_add_up_with_their_metrics(chunks, inplace):
    step = make_step(seed=1, rows=5)
    stats, tokens = entropy_stats(step), step.tokens()
    objective = PolicyObjective.preset("aepo", entropy_advantage=2.0)
    loss = build(chunks, stats, objective={"entropy_advantage": 2.0}, inplace_backward=inplace)
    parts = [run(loss, step, tokens, rows=rows) for rows in (slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 5))]
    want = exact(step, objective, entropy_stats=stats)
    close([sum(p[0] for p in parts), torch.cat([p[1] for p in parts]), sum(p[2] for p in parts)], want[:3])

    metrics = together([p[3] for p in parts])
    counted = step.counted()
    ratio = (want[3] - step.generator_logprobs.double()).exp()[counted]
    factor = 1 + 2.0 * (want[4][counted] - stats[0]) / stats[1]
    advantage = step.advantages[counted] * factor
    truth = {
        "loss/mean": want[0],
        "loss/ratio_mean": ratio.mean(),
        "loss/ratio/max": ratio.max(),
        "loss/approx_kl/mean": (ratio - 1 - ratio.log()).mean(),
        "loss/clip_high_frac": ((ratio > 1.2) & (advantage > 0)).double().mean(),
        "loss/clip_low_frac": ((ratio < 0.8) & (advantage < 0)).double().mean(),
        "loss/dual_clip_frac": ((ratio > 3) & (advantage < 0)).double().mean(),
        "loss/advantage_flips_frac": (factor < 0).double().mean(),
        "trainer/entropy/mean": want[4][counted].mean(),
    }
    assert metrics.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(
            metrics[name].double(), value, msg=lambda text, name=name: f"{name}: {text}", **CLOSE
        )
    assert truth["loss/advantage_flips_frac"] > 0
    assert truth["loss/clip_high_frac"] > 0


def test_what_does_not_count_may_be_anything():
    step = make_step()
    want = run(build(preset="dapo"), step, step.tokens())
    dirty = dataclasses.replace(step, hidden=step.hidden.clone(), advantages=step.advantages.clone())
    dirty.hidden[~step.counted()] = torch.nan
    dirty.advantages[~step.counted()] = torch.nan
    got = run(build(preset="dapo"), dirty, step.tokens())
    assert torch.equal(got[0], want[0])
    assert {name: x.item() for name, x in got[3].items()} == {name: x.item() for name, x in want[3].items()}
    assert torch.equal(got[1][step.counted()], want[1][step.counted()])


@pytest.mark.parametrize("tokens", [17, 0, torch.tensor(0)])
def test_a_call_without_tokens_is_zero(tokens):
    """Where the whole step has none, too."""
    step = make_step().rows(slice(3, 4))
    for loss in (build(), build(preset="dapo"), build(chunks=2), build(loss="own:dapo"), build(loss="own:of_means")):
        value, hidden, weight, metrics = run(loss, step, tokens)
        assert value == 0
        assert not hidden.any()
        assert not weight.any()
        assert not any(metrics.values())


def test_a_call_with_all_tokens_of_the_step_measures_its_own_statistics():
    step = make_step()
    want = exact(step, PolicyObjective.preset("aepo"), entropy_stats=entropy_stats(step))
    close(run(build(), step, step.tokens())[:3], want[:3])
    close(run(build(chunks=1), step, torch.tensor(step.tokens()))[:3], want[:3])


@pytest.mark.parametrize("tokens", [30, None])
@pytest.mark.parametrize("chunks", [None, 4])
def test_a_part_of_the_step_does_not_scale_advantages_by_its_own_entropies(tokens, chunks):
    step = make_step()
    here = step.tokens() if chunks is None else int(step.counted()[:, :2].sum())
    with pytest.raises(ValueError, match=f"entropy_advantage=0.2 needs .* has {here} of its .* set_entropy_stats"):
        run(build(chunks), step, tokens)


def test_without_the_number_of_tokens_it_is_a_sum():
    step = make_step()
    want = exact(step, PolicyObjective.preset("dapo"), denominator=1)
    close(run(build(preset="dapo"), step, None)[:3], want[:3])


def test_a_constant_denominator_is_the_configured_one():
    step = make_step()
    config = {"preset": "grpo", "objective": {"aggregation": "constant"}, "denominator": 64.0}
    want = exact(step, PolicyObjective.preset("grpo", aggregation="constant"), denominator=64)
    got = run(build(**config), step, step.tokens())
    close(got[:3], want[:3])
    torch.testing.assert_close(got[3]["trainer/entropy/mean"].double(), want[4][step.counted()].mean(), **CLOSE)


@pytest.mark.parametrize(
    ("theirs", "preset", "objective"),
    [(GRPOLoss.Config(), "grpo", TOKEN_MEAN), (DAPOLoss.Config(ratio_clip_high=0.28), "dapo", {})],
)
def test_torchtitans_own_losses_are_the_presets_of_their_name(theirs, preset, objective):
    """Where no log-ratio is beyond 10, at which theirs is cut."""
    step = make_step(spread=1.0)
    step.labels[2, 1] = 0  # theirs counts an ignored label, as a token of probability 1
    got = run(build(preset=preset, objective=objective), step, step.tokens())
    want = run(theirs.build(), step, step.tokens())
    close(got[:3], [x.double() for x in want[:3]])
    for name in ("loss/mean", "loss/ratio_mean", "trainer/entropy/mean"):
        torch.testing.assert_close(got[3][name], want[3][name], **CLOSE)


def test_far_from_the_generator_only_ours_has_a_gradient():
    """A token of negative advantage that became e^11 times likelier: cut in theirs, pushed down in ours."""
    step = make_step().rows(slice(0, 1))
    logprobs = exact(step, PolicyObjective())[3]
    step = dataclasses.replace(step, generator_logprobs=(logprobs - 11).float(), advantages=-torch.ones(1, 8))
    assert not run(DAPOLoss.Config().build(), step, step.tokens())[1].any()
    assert run(build(preset="dapo"), step, step.tokens())[1].abs().max() > 1
    assert not run(build(preset="dapo", objective={"dual_clip": 3.0}), step, step.tokens())[1].any()


@pytest.mark.parametrize("chunks", [None, 4])
def test_a_loss_of_your_own(chunks):
    step = make_step()
    want = exact(step, PolicyObjective.preset("dapo"))
    got = run(build(chunks, loss="own:dapo"), step, step.tokens())
    close(got[:3], want[:3])
    counted = step.counted()
    ratio = (want[3] - step.generator_logprobs.double()).exp()[counted]
    for name, truth in {
        "loss/mean": want[0],
        "loss/advantage/mean": step.advantages[counted].double().mean(),
        "loss/ratio_mean": ratio.mean(),
        "trainer/entropy/mean": want[4][counted].mean(),
    }.items():
        torch.testing.assert_close(got[3][name].double(), truth, **CLOSE)


def test_what_a_function_writes_into_is_its_own():
    step = make_step()
    before = step.generator_logprobs.clone()
    want = exact(step, PolicyObjective.preset("dapo"))
    close(run(build(loss="own:that_writes"), step, step.tokens())[:3], want[:3])
    torch.testing.assert_close(step.generator_logprobs, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("config", [{"preset": "dapo"}, {"loss": "own:dapo"}])
def test_logits_are_written_over_where_that_is_asked_for(config, inplace):
    step = make_step()
    logits = step.head(step.hidden)
    before = logits.detach().clone()
    loss, _ = build(inplace_backward=inplace, **config)(logits, step.labels, step.tokens(), **step.inputs())
    loss.backward()
    assert torch.equal(logits.detach(), before) != inplace


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("per_path", "per_path raised .*batch.cu_seqlens is not known in torchtitan.*tokens"),
        ("with_old_entropy", "batch.old_entropy is not known in torchtitan"),
        ("misspelt", "batch has no 'advantage'.*; it has advantages, "),
    ],
)
def test_a_loss_of_your_own_that_asks_for_too_much(function, words):
    step = make_step()
    with pytest.raises(ValueError, match=words):
        run(build(loss=f"own:{function}"), step, step.tokens())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"preset": "grpo"}, "preset='grpo' .*aggregation='seq-mean-token-mean' needs sequences.*token-mean"),
        ({"preset": "gspo"}, "ratio_level='sequence' needs sequences"),
        ({"preset": "gpro"}, "did you mean 'grpo'"),
        ({"objective": {"kl_coef": 0.1}}, "kl_coef needs ref_logprobs"),
        ({"objective": {"importance_cap": 2.0}}, "importance_cap needs old_logprobs"),
        ({"objective": {"aggregation": "constant"}}, "aggregation='constant' needs denominator"),
        ({"denominator": 3.0}, "aggregation='token-mean' would ignore denominator=3.0"),
        ({"objective": {"eps_hihg": 0.1}}, "did you mean 'eps_high'"),
        ({"loss": "own:dapo", "preset": "dapo"}, "preset='dapo' would be ignored beside loss='own:dapo'"),
        ({"loss": "own:dapo", "objective": {"eps_low": 0.1}}, "objective=.* would be ignored beside loss"),
        ({"loss": "own:dapo", "denominator": 3.0}, "denominator=3.0 would be ignored beside loss='own:dapo'"),
        ({"loss": "own:nothing"}, "AEPOLoss.Config.loss = 'own:nothing'"),
    ],
)
def test_what_the_protocol_has_no_place_for_is_refused_by_name(config, words):
    with pytest.raises((ValueError, TypeError), match=words):
        AEPOLoss.Config(**config).build()


def test_inputs_of_other_shapes_are_refused_by_name():
    step = make_step()
    bad = dataclasses.replace(step, advantages=step.advantages[:, :1])
    with pytest.raises(ValueError, match=r"advantages and loss_mask must have shape \(4, 8\).* \(4, 1\)"):
        run(build(preset="dapo"), bad, 3)
    with pytest.raises(ValueError, match="nothing would use them"):
        build(preset="dapo").set_entropy_stats(1.0, 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_as_they_are(dtype):
    """The loss of exactly these numbers, and a gradient in their dtype."""
    step = make_step()
    logits = step.head(step.hidden).detach().to(dtype)
    got, want = (x.clone().requires_grad_() for x in (logits, logits.double()))
    value, _ = build(preset="dapo")(got * 1, step.labels, step.tokens(), **step.inputs())
    value.backward()
    truth, _ = build(preset="dapo")(want * 1, step.labels, step.tokens(), **step.inputs())
    truth.backward()
    torch.testing.assert_close(value.double(), truth, **CLOSE)
    rounding = torch.finfo(dtype).eps  # one, to 8 or 11 bits
    torch.testing.assert_close(got.grad.double(), want.grad, rtol=rounding, atol=1e-6)
    assert got.shape[-1] == VOCAB


def test_the_command_line_of_torchtitan_sets_fields_of_the_objective():
    arguments = ["--preset", "dapo", "--objective.eps-high", "0.3", "--objective.dual-clip", "None"]
    loss = tyro.cli(AEPOLoss.Config, args=arguments).build()
    assert loss.objective == PolicyObjective.preset("dapo", eps_high=0.3, dual_clip=None)
