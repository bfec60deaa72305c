"""Claims about logits_policy_loss: its loss and gradient are those of the formulas chained through log_softmax in
float64, and of differences in the loss; equal inputs give equal bits; in place it gives the same bits over the same
memory, and PyTorch's version counter knows; rows that do not count are not read."""

import pytest
import torch
from policy_oracle import Batch, policy_oracle

from aepo_kernels import PolicyObjective, logits_policy_loss, logprobs_and_entropy, policy_loss
from aepo_kernels.objective import PRESETS
from aepo_kernels.testing import DTYPES, assert_within_budget, make_labels, make_logits

LENGTHS = [3, 1, 5, 6]
TOKENS, VOCAB = sum(LENGTHS), 301
BONUS = "aepo with bonus and kl"


def make_problem(dtype=torch.float32, device="cpu", objective=None, seed=0):
    """Keyword arguments of logits_policy_loss, without the objective."""
    g = torch.Generator().manual_seed(seed)
    logits = make_logits(TOKENS, VOCAB, "normal", dtype, seed)
    labels = make_labels(logits, seed)
    exact = torch.log_softmax(logits.double(), -1).gather(-1, labels[:, None])[:, 0]
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def near(scale):
        return (exact + scale * torch.randn(TOKENS, generator=g, dtype=torch.float64)).to(acc)

    problem = {
        "logits": logits,
        "labels": labels,
        "old_logprobs": near(0.4),
        "advantages": near(1.0) - exact.to(acc),
        "mask": torch.rand(TOKENS, generator=g) < 0.7,
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0),
    }
    if objective is not None and objective.kl_coef:
        problem["ref_logprobs"] = near(0.3)
    return {name: x.to(device) for name, x in problem.items()}


def oracle(problem, objective, dtype):
    """Loss and gradient in the logits, on the CPU, by autograd through log_softmax and the printed formulas."""
    problem = {name: x.cpu() for name, x in problem.items()}
    x = problem["logits"].clone().requires_grad_()
    log_p = torch.log_softmax(x.to(dtype), dim=-1)
    per_token = {
        name: problem.get(name, problem["old_logprobs"]).to(dtype)
        for name in ("old_logprobs", "advantages", "ref_logprobs")
    }
    batch = Batch(
        logprobs=log_p.gather(-1, problem["labels"][:, None])[:, 0],
        entropy=-torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1),
        mask=problem["mask"],
        cu_seqlens=problem["cu_seqlens"],
        rollout_logprobs=per_token["old_logprobs"],
        **per_token,
    )
    loss = policy_oracle(batch, objective)
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in PRESETS), *((BONUS, d) for d in DTYPES[:3])], ids=str
)
def test_loss_and_gradient_against_float64(name, dtype, backend, device):
    objective = PolicyObjective.preset("aepo", entropy_bonus=0.05, kl_coef=0.1)
    if name != BONUS:
        objective = PolicyObjective.preset(name)
    problem = make_problem(dtype, device, objective)
    x = problem["logits"].clone().requires_grad_()
    out = logits_policy_loss(**{**problem, "logits": x}, objective=objective, backend=backend)
    out.loss.backward()

    in_double = {k: v.double() if v.is_floating_point() else v for k, v in problem.items()}
    true_loss, true_grad = oracle(in_double, objective, torch.float64)
    eager_loss, eager_grad = oracle(problem, objective, torch.float32)
    largest = true_grad.abs().amax()
    assert x.grad.dtype == dtype
    # Coefficients are sums of log-probs of size 10 and ratios that inherit their rounding.
    assert_within_budget("loss", out.loss, true_loss, eager_loss, scale=10)
    assert_within_budget("grad", x.grad, true_grad, eager_grad, scale=10 * largest)
    assert x.grad[~problem["mask"]].eq(0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("clip", ["ppo", "aepo", "gppo"])
def test_gradcheck(clip, level, backend, device):
    # Ratios inside the bounds: beyond them the loss of aepo and gppo has, by design, another slope than its gradient.
    if backend == "triton":
        pytest.skip("Triton has no float64 kernels")
    logits = make_logits(6, 5, "normal", torch.float64, device=device)
    labels = make_labels(logits)
    logprobs, _ = logprobs_and_entropy(logits, labels, 0.8, backend="reference")
    small = torch.linspace(-0.05, 0.05, 6, dtype=torch.float64, device=device)
    given = {
        "old_logprobs": logprobs + small,
        "advantages": 20 * small + 0.1,
        "mask": labels >= 0,
        "ref_logprobs": logprobs - 5 * small,
        "cu_seqlens": torch.tensor([0, 2, 6], device=device),
    }
    options = {"entropy_bonus": 0.3, "kl_coef": 0.5, "aggregation": "seq-mean-token-mean"}
    objective = PolicyObjective(clip=clip, ratio_level=level, **options)

    def loss(x):
        return logits_policy_loss(x, labels, objective=objective, temperature=0.8, backend=backend, **given).loss

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_equal_inputs_give_equal_bits(backend, device):
    problem = make_problem(torch.bfloat16, device)
    objective = PolicyObjective.preset("gspo", entropy_advantage=0.2, entropy_bonus=0.01)

    def run(threads):
        torch.set_num_threads(threads)
        x = problem["logits"].clone().requires_grad_()
        out = logits_policy_loss(**{**problem, "logits": x}, objective=objective, backend=backend)
        out.loss.backward()
        return out.loss.detach(), x.grad, *out.metrics.values()

    threads = torch.get_num_threads()
    try:
        first, *others = [run(n) for n in (1, 1, 3)]
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_gives_the_same_bits_over_the_same_memory(dtype, backend, device):
    problem = make_problem(dtype, device)
    objective = PolicyObjective.preset("aepo", entropy_bonus=0.01)
    received = []

    def run(inplace):
        leaf = problem["logits"].clone().requires_grad_()
        logits = leaf * 1  # a non-leaf, as a model's head makes it
        logits.register_hook(received.append)
        logits_policy_loss(
            **{**problem, "logits": logits}, objective=objective, inplace_backward=inplace, backend=backend
        ).loss.backward()
        return logits, leaf.grad

    plain, expected = run(False)
    logits, grad = run(True)
    assert torch.equal(grad, expected)
    assert torch.equal(plain.detach(), problem["logits"])  # untouched without being asked
    assert received[0].data_ptr() != plain.data_ptr()
    assert received[1].data_ptr() == logits.data_ptr()
    assert torch.equal(logits.detach(), grad)


def test_in_place_is_known_to_autograd(backend, device):
    problem = make_problem(device=device)
    objective = PolicyObjective.preset("aepo")
    leaf = problem["logits"].clone().requires_grad_()
    logits = leaf.tanh() * 30
    capped = logits.tanh()  # tanh saves its result for its own backward
    version = capped._version
    loss = logits_policy_loss(
        **{**problem, "logits": capped}, objective=objective, inplace_backward=True, backend=backend
    ).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert capped._version > version

    logits = leaf * 1
    loss = logits_policy_loss(
        **{**problem, "logits": logits}, objective=objective, inplace_backward=True, backend=backend
    ).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_rows_that_do_not_count_are_never_read(backend, device):
    problem = make_problem(device=device)
    objective = PolicyObjective.preset("aepo", entropy_bonus=0.01)

    def run(**changes):
        x = {**problem, **changes}["logits"].clone().requires_grad_()
        out = logits_policy_loss(**{**problem, **changes, "logits": x}, objective=objective, backend=backend)
        entropy = out.loss.grad_fn.saved_tensors[-1]
        out.loss.backward()
        return out.loss, x.grad, entropy

    loss, grad, _ = run()
    hidden = ~problem["mask"]
    assert hidden.any()
    nan = {name: problem[name].masked_fill(hidden, torch.nan) for name in ("old_logprobs", "advantages")}
    labels = problem["labels"].masked_fill(hidden, -100)
    logits = problem["logits"].masked_fill(hidden[:, None], torch.nan)
    dirty_loss, dirty_grad, entropy = run(logits=logits, labels=labels, **nan)
    assert entropy[hidden].eq(0).all()  # a row that is read and holds NaN has entropy NaN
    assert torch.equal(dirty_loss, loss)
    assert torch.equal(dirty_grad, grad)
    assert grad[hidden].eq(0).all()


def test_it_is_the_composition_of_its_parts(backend, device):
    problem = make_problem(device=device)
    objective = PolicyObjective.preset("aepo")
    whole = logits_policy_loss(**problem, objective=objective, temperature=0.8, backend=backend)
    logits, labels = problem.pop("logits"), problem.pop("labels")
    logprobs, entropy = logprobs_and_entropy(logits, labels, 0.8, backend=backend)
    parts = policy_loss(logprobs, **problem, entropy=entropy, objective=objective, backend=backend)
    assert torch.equal(whole.loss, parts.loss)
    assert whole.metrics == parts.metrics


@pytest.mark.parametrize("tokens", [0, 6])
def test_no_valid_token(tokens, backend, device):
    x = torch.full((tokens, 9), torch.nan, device=device, requires_grad=True)
    zeros = torch.zeros(tokens, device=device)
    out = logits_policy_loss(
        x,
        torch.full((tokens,), -100, device=device),
        zeros,
        zeros,
        zeros != 0,
        objective=PolicyObjective.preset("aepo"),
        backend=backend,
    )
    out.loss.backward()
    assert out.loss.item() == 0
    assert x.grad.shape == (tokens, 9)
    assert x.grad.eq(0).all()


def test_a_nan_row_that_counts_shows_in_the_loss_and_only_in_its_own_gradient(backend, device):
    problem = make_problem(device=device)
    problem["mask"][:] = True
    problem["logits"][3, 17] = torch.nan
    x = problem["logits"].requires_grad_()
    out = logits_policy_loss(**problem, objective=PolicyObjective.preset("dapo"), backend=backend)
    out.loss.backward()
    assert out.loss.isnan()
    assert x.grad[3].isnan().all()
    assert x.grad[torch.arange(TOKENS, device=device) != 3].isfinite().all()
