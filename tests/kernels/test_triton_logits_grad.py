"""Claims about the Triton backward that depend on how it cuts a row: into tiles and programs, at any alignment of its
input and of its output. (What every backend must do is tested in test_token_stats.py and test_special_values.py.)
"""

import pytest
import torch

pytest.importorskip("triton")

from aepo_kernels import reference
from aepo_kernels.kernels.logits_grad import LANES, logits_grad, logits_grad_kernel
from aepo_kernels.testing import make_labels, make_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORE = -100
VEC = 8  # 16-bit logits per 16-byte word
TILE = LANES * VEC
TEMPERATURE = 0.7


def run(logits, labels, grad_logprobs, grad_entropy, out=None, stats=None):
    """(gradient from the kernel, gradient of the float64 reference) from float64-accurate statistics of the rows."""
    labels = labels if labels is None else labels.to(DEVICE)
    if stats is None:
        stats = reference.token_stats(logits.double(), labels, TEMPERATURE, IGNORE, False)
    _, entropy, maximum, log_sum = (stat.float() for stat in stats)
    out = torch.empty_like(logits) if out is None else out
    truth = torch.empty(logits.shape, dtype=torch.float64, device=DEVICE)
    rows = [None if x is None else x.to(DEVICE) for x in (grad_logprobs, grad_entropy)]
    exact = [None if x is None else x.double() for x in (maximum, log_sum, entropy, *rows)]
    reference.logits_grad(logits.double(), labels, *exact, TEMPERATURE, IGNORE, truth)
    logits_grad(logits, labels, maximum, log_sum, entropy, *rows, TEMPERATURE, IGNORE, out)
    return out, truth


def assert_rounded_once(ours, truth):
    """Within the float32 arithmetic's error plus one ulp of the dtype: the interpreter truncates where a GPU rounds."""
    eps = torch.finfo(ours.dtype).eps
    smallest = torch.finfo(ours.dtype).smallest_normal * eps  # one step among the subnormals
    torch.testing.assert_close(ours.double(), truth, rtol=eps + 2e-6, atol=smallest + 2e-6, equal_nan=True)


def coefficients(rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, generator=g), torch.randn(rows, generator=g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [8, TILE + 8, TILE + 3])
def test_a_narrower_output(vocab, dtype):
    # What the linear operations do on a GPU: float32 logits, a column block of wider rows, to 16-bit gradients.
    logits = make_logits(3, 2 * TILE).to(DEVICE)[:, 8 : 8 + vocab]
    out = torch.empty(3, vocab, dtype=dtype, device=DEVICE)
    assert_rounded_once(*run(logits, make_labels(logits.cpu()), *coefficients(3), out=out))


# One element; less than a word; one tile; one more; a nearly whole last tile; rows shared by two programs.
@pytest.mark.parametrize("vocab", [1, VEC - 1, TILE, TILE + 1, 2 * TILE - 1, 4 * TILE + 13])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_length_of_row_in_place(vocab, dtype):
    logits = make_logits(3, vocab, dtype=dtype)
    labels = make_labels(logits)
    labels[1] = IGNORE
    logits = logits.to(DEVICE)
    kept = logits.clone()
    _, truth = run(kept, labels, *coefficients(3))
    stats = reference.token_stats(kept.double(), labels.to(DEVICE), TEMPERATURE, IGNORE, False)
    ours, _ = run(logits, labels, *coefficients(3), out=logits, stats=stats)
    assert ours.data_ptr() == logits.data_ptr()
    assert_rounded_once(ours, truth)


@pytest.mark.parametrize("given", ["logprobs", "entropy"])
def test_each_part_alone(given):
    logits = make_logits(3, TILE + 5, dtype=torch.float32).to(DEVICE)
    logits[:, 7] = -torch.inf
    labels = make_labels(logits.cpu())
    of_logprobs, of_entropy = coefficients(3)
    if given == "logprobs":
        ours, truth = run(logits, labels, of_logprobs, None)
    else:
        ours, truth = run(logits, None, None, of_entropy)
    assert_rounded_once(ours, truth)
    assert (ours[:, 7] == 0).all()


# The rows of out may lie on 16-byte boundaries like those of the logits, elsewhere in a word, or elsewhere in each row.
@pytest.mark.parametrize(("first", "width"), [(3, 16), (4, 16), (3, 11)])
def test_out_may_lie_anywhere_and_nothing_beside_it_is_written(first, width):
    vocab = TILE + 5
    logits = torch.zeros(8, vocab + 16, dtype=torch.bfloat16, device=DEVICE)[:, 3 : 3 + vocab]
    logits.copy_(make_logits(8, vocab, dtype=torch.bfloat16))
    canvas = torch.full((8, vocab + width), 7.0, dtype=torch.bfloat16, device=DEVICE)
    ours, truth = run(logits, make_labels(logits.cpu()), *coefficients(8), out=canvas[:, first : first + vocab])
    assert_rounded_once(ours, truth)
    assert (canvas[:, :first] == 7).all()
    assert (canvas[:, first + vocab :] == 7).all()


def test_unused_rows_are_zeroed_without_being_read():
    logits = make_logits(4, 2 * TILE + 3, dtype=torch.bfloat16).to(DEVICE)
    labels = make_labels(logits.cpu())
    labels[2] = IGNORE
    logits[[1, 2]] = torch.nan
    of_logprobs, of_entropy = coefficients(4)
    of_logprobs[1] = of_entropy[1] = of_entropy[2] = 0.0
    ours, truth = run(logits, labels, of_logprobs, of_entropy, out=logits)
    assert_rounded_once(ours[[0, 3]], truth[[0, 3]])
    assert torch.equal(ours[[1, 2]].view(torch.int16), torch.zeros_like(ours[[1, 2]]).view(torch.int16))  # +0 as bits


def test_a_nan_coefficient_shows_in_its_row_alone():
    logits = make_logits(3, 40, dtype=torch.float32).to(DEVICE)
    of_logprobs, of_entropy = coefficients(3)
    of_logprobs[1] = torch.nan
    ours, truth = run(logits, make_labels(logits.cpu()), of_logprobs, of_entropy)
    assert ours.isnan().all(dim=1).tolist() == [False, True, False]
    assert_rounded_once(ours[[0, 2]], truth[[0, 2]])


def test_masked_logits_get_zero_and_poison_nothing():
    logits = make_logits(4, 2 * TILE + 3, dtype=torch.float32).to(DEVICE)
    logits[0, 9] = -torch.inf
    logits[1, : TILE + 4] = -torch.inf
    logits[2, 1:] = -torch.inf
    logits[3] -= 300.0
    labels = torch.tensor([0, TILE + 10, 0, 5])
    ours, truth = run(logits, labels, *coefficients(4))
    assert_rounded_once(ours, truth)
    assert (ours[logits.isneginf()] == 0).all()


def test_labels_outside_the_vocabulary_mark_no_logit():
    logits = make_logits(4, 37, dtype=torch.float32).to(DEVICE)
    labels = torch.tensor([-1, 37, 2**32 + 5, -(2**63)])  # the last two are 5 and 0 when cut to 32 bits
    ours, truth = run(logits, labels, *coefficients(4))
    assert_rounded_once(ours, truth)


def test_more_rows_than_the_second_grid_dimension_holds(monkeypatch):
    grids = []
    monkeypatch.setattr(logits_grad_kernel, "run", lambda *args, grid, **kwargs: grids.append(grid))
    row = torch.zeros(70_000, device=DEVICE)
    logits = torch.zeros(70_000, 8, device=DEVICE)
    logits_grad(logits, row.long(), row, row, row, row, row, 1.0, IGNORE, logits)
    assert grids == [(70_000, 1)]
