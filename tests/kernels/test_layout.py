"""Claims about memory: leading dimensions and views are followed without a copy, other strides are refused, empty
inputs work, and offsets beyond 2^31 elements are right."""

import pytest
import torch

from aepo_kernels import PolicyObjective, entropy_from_logits, logits_policy_loss, logprobs_and_entropy
from aepo_kernels.ops.rows import row_blocks
from aepo_kernels.testing import make_labels, make_logits

VOCAB = 37


def padded_rows(device):
    return make_logits(12, 64, device=device)[:, 3 : 3 + VOCAB]


def shifted_by_one(device):  # what every trainer does: position t predicts token t + 1
    return make_logits(12, VOCAB, device=device).view(3, 4, VOCAB)[:, :-1]


def transposed_batch(device):
    return make_logits(12, VOCAB, device=device).view(3, 4, VOCAB).transpose(0, 1)


def every_second_row(device):
    return make_logits(12, VOCAB, device=device)[::2]


def four_dimensions(device):
    return make_logits(24, VOCAB, device=device).view(2, 3, 4, VOCAB)[:, 1:, :-1]


def one_row(device):
    return make_logits(1, VOCAB, device=device)[0]


def expanded(device):
    return make_logits(1, VOCAB, device=device).expand(5, VOCAB)


LAYOUTS = [padded_rows, shifted_by_one, transposed_batch, every_second_row, four_dimensions, one_row, expanded]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_give_what_their_copies_give(layout, backend, device):
    view = layout(device)
    copy = view.clone(memory_format=torch.contiguous_format)
    labels = make_labels(copy.view(-1, VOCAB)).view(view.shape[:-1])
    assert all(block.untyped_storage().data_ptr() == view.untyped_storage().data_ptr() for block in row_blocks(view))

    def run(x):
        x = x.detach().requires_grad_()
        logprobs, entropy = logprobs_and_entropy(x, labels, backend=backend)
        assert logprobs.shape == entropy.shape == x.shape[:-1]
        (grad,) = torch.autograd.grad(logprobs.sum() + (entropy * entropy).sum(), x)
        return logprobs, entropy, grad

    # Not the same bits: a row that starts elsewhere is cut into vectors elsewhere.
    for got, expected in zip(run(view), run(copy), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [padded_rows, shifted_by_one, transposed_batch])
def test_in_place_through_a_view_writes_the_view_and_nothing_else(layout, backend, device):
    view = layout(device)
    base = view._base if view._base is not None else view
    before = base.clone()
    rows = view.shape[:-1]
    labels = make_labels(view.reshape(-1, VOCAB)).view(rows)
    given = {"advantages": torch.ones(rows, device=device), "mask": labels >= 0, "backend": backend}
    objective = PolicyObjective.preset("dapo")
    grads = []
    for logits, inplace in ((view.clone(), False), (view, True)):
        x = logits.requires_grad_()
        old = torch.full(rows, -3.5, device=device)
        loss = logits_policy_loss(x, labels, old, objective=objective, inplace_backward=inplace, **given).loss
        grads.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)
    assert torch.equal(view.detach(), grads[1])
    untouched = torch.ones_like(before, dtype=torch.bool)
    untouched.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    assert torch.equal(base.detach()[untouched], before[untouched])


def test_a_strided_vocabulary_is_refused_not_copied(backend, device):
    with pytest.raises(ValueError, match=r"logits must have a contiguous last dimension; got strides \(1, 4\)"):
        entropy_from_logits(torch.zeros(5, 4, device=device).t(), backend=backend)


@pytest.mark.parametrize(
    ("shape", "strides", "shared"),
    [
        ((5, 9), (4, 1), True),  # windows of one row
        ((2, 3, 9), (9, 9, 1), True),
        ((2, 3, 9), (20, 9, 1), True),
        ((3, 2, 9), (0, 9, 1), True),
        ((5, 9), (9, 1), False),
        ((2, 3, 9), (9, 18, 1), False),  # transposed
        ((1, 5, 9), (0, 12, 1), False),
        ((1, 9), (2, 1), False),
        ((0, 9), (2, 1), False),
    ],
)
def test_overlapping_rows_cannot_be_overwritten(shape, strides, shared, backend, device):
    logits = torch.arange(100.0, device=device).as_strided(shape, strides).requires_grad_()
    zeros = torch.zeros(shape[:-1], device=device)
    policy = (zeros.long(), zeros, zeros + 1, zeros == 0)

    def loss(**options):
        return logits_policy_loss(logits, *policy, objective=PolicyObjective(), backend=backend, **options).loss

    (expected,) = torch.autograd.grad(loss(), logits)
    if shared:
        with pytest.raises(ValueError, match="rows of their own; got expanded or overlapping logits, shape"):
            loss(inplace_backward=True)
    else:
        assert torch.equal(torch.autograd.grad(loss(inplace_backward=True), logits)[0], expected)


def test_expanded_logits_cannot_be_overwritten(backend, device):
    logits = expanded(device).requires_grad_()
    zeros = torch.zeros(5, device=device)
    with pytest.raises(ValueError, match="inplace_backward=True needs rows of their own"):
        logits_policy_loss(
            logits,
            zeros.long(),
            zeros,
            zeros,
            zeros == 0,
            objective=PolicyObjective.preset("dapo"),
            inplace_backward=True,
            backend=backend,
        )


@pytest.mark.parametrize("shape", [(0, VOCAB), (2, 0, VOCAB), (0, 4, VOCAB)])
def test_empty_batches(shape, backend, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.long, device=device)
    logprobs, entropy = logprobs_and_entropy(x, labels, backend=backend)
    assert logprobs.shape == entropy.shape == shape[:-1]
    (logprobs.sum() + entropy.sum()).backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_beyond_two_to_the_31_elements(inplace, backend, device):
    # Rows 2^30 + 8 elements apart: the stride fits into 32 bits, the last row's offset does not, in elements or bytes.
    # On the CPU 4.3 GB of address space, of which only the rows' own pages are ever touched; on a GPU its memory.
    rows, stride = 3, 2**30 + 8
    torch.utils.deterministic.fill_uninitialized_memory = False  # the fixture would touch all of it
    storage = torch.empty((rows - 1) * stride + VOCAB, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((rows, VOCAB), (stride, 1))
    far.copy_(make_logits(rows, VOCAB, "normal", torch.bfloat16))
    near = far.clone()
    labels = make_labels(near)
    given = {"objective": PolicyObjective(), "inplace_backward": inplace, "backend": backend}
    grads = []
    for logits in (near, far):
        x = logits.requires_grad_()
        zeros = torch.zeros(rows, device=device)
        loss = logits_policy_loss(x, labels, zeros - 3, zeros + 1, zeros == 0, **given).loss
        grads.append(torch.autograd.grad(loss, x)[0].clone())
    assert grads[0].abs().max() > 1e-3
    assert torch.equal(*grads)


def test_more_than_two_to_the_31_logits_on_a_gpu(backend, device):
    if (device, backend) != ("cuda", "triton"):
        pytest.skip("4.3 GB of logits, and several float32 copies of them in the reference")
    vocab = 151_936
    tokens = 2**31 // vocab + 8
    logits = torch.zeros(tokens, vocab, dtype=torch.bfloat16, device=device)
    last = make_logits(8, vocab, "normal", torch.bfloat16, device=device)
    logits[-8:] = last
    labels = torch.zeros(tokens, dtype=torch.long, device=device)
    labels[-8:] = make_labels(last)
    mask = torch.arange(tokens, device=device) >= tokens - 8
    given = {"objective": PolicyObjective(), "inplace_backward": True, "backend": backend}

    def run(x, rows):
        x = x.requires_grad_()
        zeros = torch.zeros_like(labels[rows], dtype=torch.float32)
        loss = logits_policy_loss(x, labels[rows], zeros - 3, zeros + 1, mask[rows], **given).loss
        return loss.detach(), torch.autograd.grad(loss, x)[0][-8:]

    # As many programs share a row of 8 as of 14,000 rows only by chance: not the same bits.
    for got, expected in zip(run(logits, slice(None)), run(last.clone(), slice(-8, None)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-9)
