"""Claims about what the tests themselves rest on (aepo_kernels/testing.py): the budget refuses an error that is worth
noticing, and poisoned memory reaches whatever a backend allocates, its C++ code included."""

import pytest
import torch

from aepo_kernels import logprobs_and_entropy
from aepo_kernels.testing import assert_within_budget, make_labels, make_logits


def test_the_budget_is_twice_eagers_error_and_one_rounding():
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    eager = truth + torch.tensor([0.0, 3e-5], dtype=torch.float64)  # its worst element counts for both
    for actual in (truth + 1e-7, truth + 5e-5):
        assert_within_budget("x", actual.float(), truth, eager)
    for actual, against in ((truth + 7e-5, eager), (truth + 8 * eps, None)):
        with pytest.raises(AssertionError, match=r"x: worst element \[0\] of \[2\]: .* 2 elements over budget"):
            assert_within_budget("x", actual.float(), truth, against)
    assert_within_budget("x", (truth + 8 * eps).float(), truth, scale=10)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_the_budget_compares_what_is_not_finite(wrong):
    truth = torch.tensor([1.0, -torch.inf, torch.nan], dtype=torch.float64)
    assert_within_budget("x", truth.float(), truth)
    for place in range(3):
        actual = truth.float()
        actual[place] = wrong
        if not torch.equal(actual.double().nan_to_num(), truth.nan_to_num()):
            with pytest.raises(AssertionError, match=rf"worst element \[{place}\]"):
                assert_within_budget("x", actual, truth)
    with pytest.raises(AssertionError, match=r"shape \(2,\), expected \(3,\)"):
        assert_within_budget("x", truth[:2].float(), truth)


def test_poison_is_in_everything_that_a_backend_allocates(backend, device):
    logits = make_logits(3, 5000, "normal", torch.bfloat16, device=device).requires_grad_()
    labels = make_labels(logits)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        outputs = logprobs_and_entropy(logits, labels, backend=backend)
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    # PyTorch poisons by filling inside the allocation, whoever asks for it; the profiler sees both, in C++ too.
    allocations = [event for event in profile.events() if event.name in ("aten::empty", "aten::empty_strided")]
    # The gradient, and where a kernel writes them also the four statistics of each row. (Those of C++ become 0 after
    # that, for rows that are skipped; a row that is forgotten is then 0, which is not its entropy.)
    assert len(allocations) >= (1 if backend == "reference" else 5)
    assert all("aten::fill_" in [child.name for child in event.cpu_children] for event in allocations)
    assert torch.empty(3, device=device).isnan().all()
