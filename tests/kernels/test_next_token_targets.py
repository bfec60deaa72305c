"""Claim: with the shifted labels and mask the whole logits give what the slices of a hand-written trainer give."""

import pytest
import torch

from aepo_kernels import PolicyObjective, logits_policy_loss, logprobs_and_entropy, next_token_targets
from aepo_kernels.testing import make_logits

# Prompt 11 12, the model's 13 14, a tool's 15 16, the model's 17, padding; and one padded on the left.
INPUT_IDS = torch.tensor([[11, 12, 13, 14, 15, 16, 17, 0], [0, 0, 0, 21, 22, 23, 24, 25]])
MASK = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 1, 1]])
LABELS = [[-100, 13, 14, -100, -100, 17, -100, -100], [-100, -100, -100, 22, -100, 24, 25, -100]]
SHIFTED = [[0, 1, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1, 1, 0]]


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_case_by_hand(ids_dtype, mask_dtype, device):
    input_ids, mask = INPUT_IDS.to(device, ids_dtype), MASK.to(device, mask_dtype)
    before = mask.clone()
    labels, shifted = next_token_targets(input_ids, mask)
    assert (labels.tolist(), labels.dtype, labels.device) == (LABELS, torch.int64, input_ids.device)
    assert (shifted.long().tolist(), shifted.dtype) == (SHIFTED, mask_dtype)
    assert torch.equal(mask, before)
    labels, shifted = next_token_targets(input_ids[0], mask[0])
    assert (labels.tolist(), shifted.long().tolist()) == (LABELS[0], SHIFTED[0])


def test_a_last_token_that_the_model_wrote_is_not_the_first_one_s_label():
    """The row ends with a 1 and begins with one: nothing goes around the end."""
    labels, mask = next_token_targets(torch.tensor([[7, 8, 9]]), torch.tensor([[True, False, True]]))
    assert (labels.tolist(), mask.tolist()) == ([[-100, 9, -100]], [[False, True, False]])


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (1, 1)])
def test_no_token_has_no_successor(shape):
    labels, mask = next_token_targets(torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool))
    assert labels.shape == mask.shape == shape
    assert not mask.any()


def test_the_loss_is_that_of_the_slices(backend, device):
    vocab = 26
    logits = make_logits(16, vocab, device=device).view(2, 8, vocab)
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(2, generator=generator)
    old_logprobs = -3 + 0.3 * torch.randn(2, 8, generator=generator)  # at the place of the token itself

    x64 = logits.cpu().double().requires_grad_()
    logprobs = x64[:, :-1].log_softmax(-1).gather(-1, INPUT_IDS[:, 1:, None])[..., 0]
    ratio = (logprobs - old_logprobs[:, 1:].double()).exp()
    surrogate = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    truth = -surrogate[MASK[:, 1:] == 1].mean()
    (gradient64,) = torch.autograd.grad(truth, x64)

    labels, mask = next_token_targets(INPUT_IDS.to(device), MASK.to(device))
    x = logits.requires_grad_()
    got, _ = logprobs_and_entropy(x, labels, backend=backend)
    counted = (MASK[:, 1:] == 1).nonzero(as_tuple=True)
    torch.testing.assert_close(got[counted].cpu().double(), logprobs[counted], rtol=1e-5, atol=1e-5)
    old = old_logprobs.roll(-1, -1).to(device)
    wide = advantages[:, None].expand(labels.shape).to(device)
    objective = PolicyObjective(eps_low=0.2, eps_high=0.2)
    loss, metrics = logits_policy_loss(x, labels, old, wide, mask, objective=objective, backend=backend)
    (gradient,) = torch.autograd.grad(loss, x)
    assert metrics["valid_tokens"] == 6
    torch.testing.assert_close(loss.cpu().double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.cpu().double(), gradient64, rtol=1e-4, atol=1e-7)


def test_it_compiles_in_one_graph():
    got = torch.compile(next_token_targets, fullgraph=True, backend="eager")(INPUT_IDS, MASK)
    assert [x.tolist() for x in got] == [LABELS, SHIFTED]


@pytest.mark.parametrize(
    ("input_ids", "mask", "error", "message"),
    [
        (INPUT_IDS.float(), MASK, TypeError, "input_ids must have an integer dtype; got torch.float32"),
        (INPUT_IDS, MASK[:, 1:], ValueError, r"mask must have shape \(2, 8\) like input_ids; got \(2, 7\)"),
        (INPUT_IDS.tolist(), MASK, TypeError, r"input_ids must be a tensor \[.., L\]"),
        (torch.tensor(3), torch.tensor(1), TypeError, r"input_ids must be a tensor \[.., L\]"),
        (INPUT_IDS, None, TypeError, r"mask must be a tensor \[.., L\]; got None"),
    ],
)
def test_bad_arguments_are_named(input_ids, mask, error, message):
    with pytest.raises(error, match=message):
        next_token_targets(input_ids, mask)
