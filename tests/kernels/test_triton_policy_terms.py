"""Claims about the Triton policy terms that depend on how they cut the tokens: into blocks, sequences and partial sums.
(What every backend must do is tested in test_policy_loss.py and test_policy_loss_gradients.py.)
"""

import pytest
import torch

pytest.importorskip("triton")

from aepo_kernels import reference
from aepo_kernels.kernels.policy_terms import BLOCK, policy_terms
from aepo_kernels.reference.policy_terms import METRICS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUMBERS = {
    "low": 0.8,
    "high": 1.2,
    "grad_low": 0.8,
    "grad_high": 1.2,
    "dual_clip": 3.0,
    "detached_ratio": False,
    "entropy_advantage": 0.4,
    "clamp_factor": False,
    "kl_coef": 0.05,
    "kl_estimator": 3,
    "entropy_bonus": 0.01,
    "importance_cap": 1.5,
}
SEQUENCES = [0, 0, 3, BLOCK - 1, 2 * BLOCK + 700, 2 * BLOCK + 700, 2 * BLOCK + 800]  # lengths 0, 3, < BLOCK, > BLOCK


def make_inputs(tokens, seed=0):
    """The seven per-token inputs, about a third of the tokens masked and NaN in all but their weight."""
    g = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(tokens, generator=g)
    old = logprobs + 0.4 * torch.randn(tokens, generator=g)
    advantages = torch.randn(tokens, generator=g)
    weight = torch.rand(tokens, generator=g) * (torch.rand(tokens, generator=g) < 0.7) / max(tokens, 1)
    entropy = 2 * torch.rand(tokens, generator=g)
    ref = logprobs + 0.3 * torch.randn(tokens, generator=g)
    rollout = old + 0.3 * torch.randn(tokens, generator=g)
    for x in (logprobs, old, advantages, entropy, ref, rollout):
        x[weight == 0] = torch.nan
    return [x.to(DEVICE) for x in (logprobs, old, advantages, weight, entropy, ref, rollout)]


def check(inputs, cu_seqlens=None, entropy_stats=None, **numbers):
    numbers = {**NUMBERS, **numbers}
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=DEVICE)
    exact = [None if x is None else x.double() for x in (*inputs, entropy_stats)]
    ours = policy_terms(*inputs, cu_seqlens, entropy_stats, *numbers.values())
    truth = reference.policy_terms(*exact[:-1], cu_seqlens, exact[-1], *numbers.values())
    # Sums are float64 inside; the numbers above come as float32 (6e-8) and so do the results.
    for name, one, other in zip(("loss", "grad_logprobs", "grad_entropy", "metrics"), ours, truth, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(
            one.double(), other, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    masked = inputs[3] == 0
    assert (ours[1][masked] == 0).all()
    return ours


@pytest.mark.parametrize("tokens", [0, 1, BLOCK, 2 * BLOCK + 1])
def test_any_number_of_tokens(tokens):
    check(make_inputs(tokens))


@pytest.mark.parametrize("detached", [False, True])
def test_sequences_of_any_length(detached):
    inputs = make_inputs(SEQUENCES[-1])
    loss, *_ = check(inputs, SEQUENCES, detached_ratio=detached)
    token_level, *_ = check(inputs, detached_ratio=detached)
    assert (loss - token_level).abs() > 1e-3 * loss.abs()  # the two ratios are not the same thing


@pytest.mark.parametrize(
    "numbers",
    [
        {"kl_estimator": 1},
        {"kl_estimator": 2},
        {"kl_coef": 0.0},
        {"entropy_advantage": 3.0},  # many negative factors: A changes its sign, and every rule follows
        {"entropy_advantage": 3.0, "clamp_factor": True},
        {"entropy_advantage": 0.0},
        {"dual_clip": float("inf"), "importance_cap": float("inf")},
        {"grad_low": 0.0, "grad_high": 0.0},
    ],
    ids=str,
)
def test_every_number(numbers):
    check(make_inputs(300), **numbers)


def test_every_optional_input_may_be_missing():
    logprobs, old, advantages, weight, entropy, ref, rollout = make_inputs(300)
    off = {"entropy_advantage": 0.0, "entropy_bonus": 0.0}
    check([logprobs, old, advantages, weight, None, None, None], **off)
    check([logprobs, old, advantages, weight, None, ref, None], **off)
    check([logprobs, old, advantages, weight, entropy, None, rollout], torch.tensor([0, 100, 300]).tolist(), **off)


def test_given_entropy_statistics_are_used():
    stats = torch.tensor([0.3, 0.7], device=DEVICE)
    inputs = make_inputs(300)
    loss, *_ = check(inputs, entropy_stats=stats)
    own, *_ = check(inputs)
    assert (loss - own).abs() > 1e-3 * own.abs()


@pytest.mark.parametrize("value", [0.1, 1e-3 / 3])  # no binary fraction: a rounded mean would leave a tiny std
def test_equal_entropies_have_a_std_of_exactly_zero_across_blocks(value):
    inputs = make_inputs(2 * BLOCK + 300)
    inputs[4] = torch.where(inputs[3] == 0, torch.nan, torch.full_like(inputs[3], value))
    *_, metrics = check(inputs)
    assert metrics[METRICS.index("entropy_std")] == 0
    assert metrics[METRICS.index("advantage_flips")] == 0


def test_a_mask_without_valid_tokens():
    inputs = make_inputs(300)
    inputs[3].zero_()
    unknown = torch.full((2,), torch.nan, device=DEVICE)  # the statistics of no tokens; they must not reach the loss
    loss, _, grad_entropy, metrics = check(inputs, [0, 100, 300], entropy_stats=unknown)
    assert loss == 0
    assert (grad_entropy == 0).all()
    assert (metrics == 0).all()


@pytest.mark.parametrize("which", range(7))
def test_nan_on_a_valid_token_shows(which):
    inputs = make_inputs(300)
    inputs[which][inputs[3].nonzero()[0]] = torch.nan
    loss, grad, _, _ = policy_terms(*inputs, None, None, *NUMBERS.values())
    assert loss.isnan()
    assert grad.isnan().any() or which == 4


def test_equal_inputs_give_equal_bits():
    inputs = make_inputs(2 * BLOCK + 300)
    cu_seqlens = torch.tensor([0, BLOCK + 200, 2 * BLOCK + 300], device=DEVICE)
    for layout in (None, cu_seqlens):
        runs = [policy_terms(*inputs, layout, None, *NUMBERS.values()) for _ in range(2)]
        for one, two in zip(*runs, strict=True):
            assert torch.equal(one, two)
