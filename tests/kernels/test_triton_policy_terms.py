"""Claims about the Triton policy terms that depend on how they cut the tokens: into blocks, sequences and partial sums.
(What every backend must do is tested in test_policy_loss.py and test_policy_loss_gradients.py.)
"""

import pytest
import torch

pytest.importorskip("triton")

from aepo_kernels.kernels.policy_terms import BLOCK, policy_terms
from aepo_kernels.objective import METRICS, PRESETS, ObjectiveNumbers, PolicyObjective
from aepo_kernels.reference.policy_terms import policy_terms as reference_terms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OBJECTIVE = PolicyObjective(
    clip="gppo", dual_clip=3.0, entropy_advantage=0.4, kl_coef=0.05, entropy_bonus=0.01, importance_cap=1.5
)
NUMBERS = OBJECTIVE.numbers()
DETACHED = NUMBERS._replace(detached_ratio=1.0, dual_clip=float("inf"), grad_low=0.0, grad_high=0.0)
SEQUENCES = [0, 0, 3, BLOCK - 1, 2 * BLOCK + 700, 2 * BLOCK + 700, 2 * BLOCK + 800]  # lengths 0, 3, < BLOCK, > BLOCK


def make_inputs(tokens, seed=0, counted=False):
    """The eight per-token inputs, about a third of the tokens masked, and NaN in all but what masks them."""
    g = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(tokens, generator=g)
    old = logprobs + 0.4 * torch.randn(tokens, generator=g)
    advantages = torch.randn(tokens, generator=g)
    mask = torch.rand(tokens, generator=g) < 0.7
    weight = torch.rand(tokens, generator=g) * mask / max(tokens, 1)
    entropy = 2 * torch.rand(tokens, generator=g)
    ref = logprobs + 0.3 * torch.randn(tokens, generator=g)
    rollout = old + 0.3 * torch.randn(tokens, generator=g)
    counts = None
    if counted:
        counts = torch.randint(1, 5, (tokens,), generator=g).float() * mask
        weight[::5] = 0.0  # counted, without a share in the loss
        weight[~mask] = torch.nan
    for x in (logprobs, old, advantages, entropy, ref, rollout):
        x[~mask] = torch.nan
    inputs = (logprobs, old, advantages, weight, counts, entropy, ref, rollout)
    return [None if x is None else x.to(DEVICE) for x in inputs]


def check(inputs, cu_seqlens=None, entropy_stats=None, numbers=NUMBERS):
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=DEVICE)
    exact = [None if x is None else x.double() for x in (*inputs, entropy_stats)]
    numbers = ObjectiveNumbers(*(torch.tensor(x).item() for x in numbers))  # in float32, as a GPU takes them
    ours = policy_terms(*inputs, cu_seqlens, entropy_stats, numbers)
    truth = reference_terms(*exact[:-1], cu_seqlens, exact[-1], numbers)
    # Sums are float64 inside; only the results are rounded, to float32 (6e-8).
    for name, one, other in zip(("loss", "grad_logprobs", "grad_entropy", "metrics"), ours, truth, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(
            one.double(), other, rtol=2e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    masked = (inputs[3] if inputs[4] is None else inputs[4]) == 0
    assert (ours[1][masked] == 0).all()
    return ours


@pytest.mark.parametrize("tokens", [0, 1, BLOCK, 2 * BLOCK + 1])
def test_any_number_of_tokens(tokens):
    check(make_inputs(tokens))


@pytest.mark.parametrize("counted", [False, True], ids=["once", "counts"])
@pytest.mark.parametrize("numbers", [NUMBERS, DETACHED], ids=["attached", "detached"])
def test_sequences_of_any_length(numbers, counted):
    inputs = make_inputs(SEQUENCES[-1], counted=counted)
    loss, *_ = check(inputs, SEQUENCES, numbers=numbers)
    token_level, *_ = check(inputs, numbers=numbers)
    assert (loss - token_level).abs() > 1e-3 * loss.abs()  # the two ratios are not the same thing


@pytest.mark.parametrize("counted", [False, True], ids=["once", "counts"])
@pytest.mark.parametrize(
    "changed",
    [
        {"kl_estimator": 1.0},
        {"kl_estimator": 2.0},
        {"kl_coef": 0.0},
        {"entropy_advantage": 3.0},  # many negative factors: A changes its sign, and every rule follows
        {"entropy_advantage": 3.0, "clamp_factor": 1.0},
        {"entropy_advantage": 0.0},
        {"entropy_bonus": 0.0},
        {"dual_clip": float("inf"), "importance_cap": float("inf")},
        {"dual_clip": 1.25},  # reached by many
        {"grad_low": 0.0, "grad_high": 0.0},
        {"low": 0.5, "high": 2.0},
        {"detached_ratio": 1.0},  # the dual clip, still set, has no meaning and shows in no metric
    ],
    ids=str,
)
def test_every_number(changed, counted):
    check(make_inputs(300, counted=counted), numbers=NUMBERS._replace(**changed))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(name):
    check(make_inputs(300), [0, 120, 300], numbers=PolicyObjective.preset(name).numbers())


@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 90, 100]])
@pytest.mark.parametrize("numbers", [NUMBERS, DETACHED], ids=["attached", "detached"])
def test_a_count_stands_for_repeated_tokens(numbers, cu_seqlens):
    inputs = make_inputs(100, counted=True)
    times = inputs[4].long()
    repeats = times.clamp(min=1)  # a masked token once
    index = torch.arange(100, device=DEVICE).repeat_interleave(repeats)
    repeated = [None if i == 4 else x[index] for i, x in enumerate(inputs)]
    # Without counts a weight of 0 is a mask, so the counted tokens without a share get a tiny one.
    weight = inputs[3].nan_to_num(0.0).where((inputs[3] != 0) | (times == 0), 1e-30)
    inputs[3] = weight * times
    repeated[3] = weight[index]
    ends = None if cu_seqlens is None else torch.cat((repeats.new_zeros(1), repeats.cumsum(0)))[cu_seqlens]
    loss, grad, grad_entropy, metrics = check(inputs, cu_seqlens, numbers=numbers)
    others = check(repeated, None if ends is None else ends.tolist(), numbers=numbers)
    torch.testing.assert_close(loss, others[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics, others[3], rtol=1e-6, atol=0)
    for one, other in ((grad, others[1]), (grad_entropy, others[2])):
        sums = torch.zeros(100, dtype=torch.float64, device=DEVICE).index_put((index,), other.double(), accumulate=True)
        torch.testing.assert_close(one.double(), sums, rtol=1e-6, atol=1e-9)  # of parts of 1e-2, float32


def test_every_optional_input_may_be_missing():
    logprobs, old, advantages, weight, _, entropy, ref, rollout = make_inputs(300)
    off = NUMBERS._replace(entropy_advantage=0.0, entropy_bonus=0.0)
    check([logprobs, old, advantages, weight, None, None, None, None], numbers=off)
    check([logprobs, old, advantages, weight, None, None, ref, None], numbers=off)
    check([logprobs, old, advantages, weight, None, entropy, None, rollout], [0, 100, 300], numbers=off)


def test_given_entropy_statistics_are_used():
    stats = torch.tensor([0.3, 0.7], device=DEVICE)
    inputs = make_inputs(300)
    loss, *_ = check(inputs, entropy_stats=stats)
    own, *_ = check(inputs)
    assert (loss - own).abs() > 1e-3 * own.abs()


@pytest.mark.parametrize("value", [0.1, 1e-3 / 3])  # no binary fraction: a rounded mean would leave a tiny std
def test_equal_entropies_have_a_std_of_exactly_zero_across_blocks(value):
    inputs = make_inputs(2 * BLOCK + 300)
    inputs[5] = torch.where(inputs[3] == 0, torch.nan, torch.full_like(inputs[3], value))
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


@pytest.mark.parametrize("which", [0, 1, 2, 3, 5, 6, 7])
def test_nan_on_a_valid_token_shows(which):
    inputs = make_inputs(300)
    inputs[which][inputs[3].nonzero()[0]] = torch.nan
    loss, grad, _, _ = policy_terms(*inputs, None, None, NUMBERS)
    assert loss.isnan()
    assert grad.isnan().any() or which == 5


def test_equal_inputs_give_equal_bits():
    inputs = make_inputs(2 * BLOCK + 300)
    cu_seqlens = torch.tensor([0, BLOCK + 200, 2 * BLOCK + 300], device=DEVICE)
    for layout in (None, cu_seqlens):
        runs = [policy_terms(*inputs, layout, None, NUMBERS) for _ in range(2)]
        for one, two in zip(*runs, strict=True):
            assert torch.equal(one, two)
