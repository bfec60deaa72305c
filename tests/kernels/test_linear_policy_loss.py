"""Claims: the policy loss from hidden states equals that of whole float64 logits, for every objective and by both
schedules, with all gradients; tokens that do not count may hold anything and cost nothing; a schedule that cannot be is
an error."""

import pytest
import torch
from linear_oracle import losses, make_problem, policy_batch

from aepo_kernels import PolicyObjective, linear_policy_loss
from aepo_kernels.objective import PRESETS
from aepo_kernels.ops import linear
from aepo_kernels.testing import assert_within_budget

AEPO = PolicyObjective.preset("aepo", entropy_bonus=0.03)
STATS = (2.0, 0.7)


def check(problem, objective, backend, device, **settings):
    (ours, grads), (truth, true_grads) = losses(problem, objective, backend, device, **settings)
    # Every number went through logits, whose rounding is that of sums of D products of magnitudes up to a few.
    logits = (problem.hidden.double().abs() @ problem.weight.double().abs().T).max() + 10
    size = 10 * logits * (1 + problem.hidden.double().abs().max())
    assert_within_budget("loss", ours.loss, truth.loss.detach(), scale=size)
    assert ours.metrics.keys() == truth.metrics.keys()
    for name, value in ours.metrics.items():
        assert_within_budget(name, value, truth.metrics[name], scale=size * (1 + truth.metrics[name].abs()))
    for name, grad, true_grad in zip(("hidden", "weight", "bias"), grads, true_grads, strict=False):
        assert grad.dtype == problem.hidden.dtype
        # 16 bits: rounded once as the loss's gradient and once as 0.3 of it, which the budget's factor of 2 allows for.
        assert_within_budget(name, grad, true_grad, scale=size * true_grad.abs().max())


@pytest.mark.parametrize("schedule", ["keep", "recompute"])
@pytest.mark.parametrize("name", PRESETS)
def test_objectives_and_schedules(name, schedule, monkeypatch, backend, device):
    slow = backend == "triton" and device == "cpu"
    if slow and name not in ("aepo", "cispo"):
        pytest.skip("slow in the interpreter")
    for place in ("cpu", "cuda"):
        # Several chunks, the last one cut; the vocabulary in tiles, and where `keep` serves CUDA whole.
        columns = 64 if place == "cpu" else linear.WHOLE_VOCABULARY
        monkeypatch.setitem(linear.TILING, place, linear.Tiling((5, 64), (7, columns), 0))
    objective = PolicyObjective.preset(name)
    settings = {"schedule": schedule, "cu_seqlens": torch.tensor([0, 3, 3, 9])}
    tokens = 9
    if not slow:
        tokens, settings["cu_seqlens"] = 40, torch.tensor([0, 11, 11, 25, 40])
    if objective.ratio_level == "sequence":
        settings["schedule"] = "recompute"
    if objective.entropy_advantage:
        settings["entropy_stats"] = STATS
    dtype = torch.float32 if slow or device == "cuda" else torch.float64
    check(make_problem(tokens, 150, 6, dtype, bias=True, softcap=9.0), objective, backend, device, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_dtypes_at_the_real_tile_sizes(schedule, dtype):
    problem = make_problem(1100, 9000, 16, dtype, bias=True, temperature=0.8)
    check(problem, AEPO, "cpu", "cpu", schedule=schedule, entropy_stats=STATS)


def test_statistics_of_this_call_need_all_tokens(monkeypatch, backend, device):
    monkeypatch.setitem(linear.TILING, "cpu", linear.Tiling((4, 16), (4, 16), 0))
    problem = make_problem(9, 40, 4)
    check(problem, AEPO, backend, device)
    with pytest.raises(ValueError, match="schedule='keep' needs coefficients"):
        losses(problem, AEPO, backend, device, schedule="keep")
    gspo = PolicyObjective.preset("gspo")
    with pytest.raises(ValueError, match="ratio_level='token'"):
        losses(problem, gspo, backend, device, schedule="keep", cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="schedule must be None, 'keep' or 'recompute'; got 'fast'"):
        losses(problem, AEPO, backend, device, schedule="fast")


@pytest.fixture
def products(monkeypatch):
    """Operations of all matrix products, in units of one product of all valid tokens with the whole weight."""
    total, multiply = [], linear.multiply

    def counted(out, a, b, add=False):
        total.append(out.numel() * a.shape[1])
        multiply(out, a, b, add)

    monkeypatch.setattr(linear, "multiply", counted)
    return total


@pytest.mark.parametrize(("schedule", "forward", "backward"), [("keep", 3, 0), ("recompute", 1, 3), (None, 1, 3)])
def test_flops_are_those_of_the_model(schedule, forward, backward, products):
    problem = make_problem(60, 5000, 8).to()
    old, advantages, mask = policy_batch(problem)
    unit = int(mask.sum()) * 5000 * 8
    objective = PolicyObjective.preset("reinforce++", eps_low=1.0, eps_high=1e9)  # nothing is clipped
    out = linear_policy_loss(
        problem.hidden, problem.weight, problem.labels, old, advantages, mask, objective=objective, schedule=schedule
    )
    assert sum(products) == forward * unit
    products.clear()
    out.loss.backward()
    assert sum(products) == backward * unit


def test_clipped_tokens_leave_the_products(products):
    problem = make_problem(60, 5000, 8).to()
    old, advantages, mask = policy_batch(problem)
    clipped = torch.arange(60) % 2 == 0
    old, advantages = torch.where(clipped, old - 5, old), advantages.abs()  # a ratio of e^5, A > 0: no gradient in PPO
    out = linear_policy_loss(
        problem.hidden, problem.weight, problem.labels, old, advantages, mask, objective=PolicyObjective()
    )
    products.clear()
    out.loss.backward()
    assert sum(products) <= 3 * int((mask & ~clipped).sum()) * 5000 * 8


@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_only_wanted_gradients(schedule, products):
    problem = make_problem(20, 300, 8).to()
    problem.weight.requires_grad_(False)
    old, advantages, mask = policy_batch(problem)
    out = linear_policy_loss(
        problem.hidden, problem.weight, problem.labels, old, advantages, mask,
        objective=PolicyObjective(), schedule=schedule,
    )  # fmt: skip
    out.loss.backward()
    assert problem.weight.grad is None
    assert sum(products) <= (2 if schedule == "keep" else 3) * int(mask.sum()) * 300 * 8
    products.clear()
    with torch.no_grad():
        linear_policy_loss(
            problem.hidden, problem.weight, problem.labels, old, advantages, mask, objective=PolicyObjective()
        )
    assert sum(products) == int(mask.sum()) * 300 * 8


@pytest.mark.parametrize("schedule", ["keep", "recompute"])
def test_masked_tokens_may_hold_anything(schedule, backend, device):
    problem = make_problem(8, 50, 4)
    old, advantages, mask = (x.to(device) for x in policy_batch(problem))
    mask = torch.arange(8, device=device) % 2 == 0

    def run(hidden, labels):
        hidden, weight = (x.to(device).requires_grad_() for x in (hidden, problem.weight.clone()))
        out = linear_policy_loss(
            hidden, weight, labels.to(device), old, advantages, mask,
            objective=AEPO, entropy_stats=STATS, schedule=schedule, backend=backend,
        )  # fmt: skip
        return out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))

    clean = run(problem.hidden.clone(), problem.labels)
    hidden, labels = problem.hidden.clone(), problem.labels.clone()
    hidden[1::2], labels[1::2] = torch.nan, torch.tensor([-1, 10**9, -100, 50])
    for x, y in zip(run(hidden, labels), clean, strict=True):
        assert torch.equal(x, y)
    assert clean[1][1::2].eq(0).all()


@pytest.mark.parametrize("schedule", ["keep", "recompute"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_learn_from(tokens, schedule, backend, device):
    problem = make_problem(tokens, 20, 4, bias=True).to(device)
    old = torch.zeros(tokens, device=device)
    out = linear_policy_loss(
        problem.hidden, problem.weight, problem.labels, old, old, torch.zeros_like(old, dtype=torch.bool),
        objective=AEPO, bias=problem.bias, entropy_stats=STATS, schedule=schedule, backend=backend,
    )  # fmt: skip
    assert out.loss == 0
    assert [x.abs().sum().item() for x in torch.autograd.grad(out.loss, problem.leaves)] == [0, 0, 0]


def test_micro_batches_add_up():
    problem = make_problem(30, 200, 5, torch.float64).to()
    old, advantages, mask = policy_batch(problem)

    def run(part):
        return linear_policy_loss(
            problem.hidden[part], problem.weight, problem.labels[part], old[part], advantages[part], mask[part],
            objective=AEPO, entropy_stats=STATS, denominator=int(mask.sum()), schedule="keep",
        ).loss  # fmt: skip

    whole = torch.autograd.grad(run(slice(None)), problem.leaves)
    parts = torch.autograd.grad(run(slice(0, 11)) + run(slice(11, 30)), problem.leaves)
    for x, y in zip(whole, parts, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)
