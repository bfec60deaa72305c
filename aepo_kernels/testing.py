"""Inputs, truth and error budgets, shared by the tests and the benchmarks.

The rule of all numerical tests: truth is float64 from the inputs as they are stored (bfloat16 included), by formulas
written differently from the kernels'; the budget is twice the error that plain PyTorch makes at the same precision,
plus twice one rounding. So no tolerance is chosen by hand, and a kernel may not be worse than eager.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _tiny_entropy(x: Tensor, g: torch.Generator) -> Tensor:
    """Rows whose entropy runs from about 1e-8 nats to about 1: one logit leads all others by a set gap."""
    gap = torch.linspace(31, 5, x.shape[0], dtype=x.dtype)[:, None]
    leader = torch.randint(x.shape[1], (x.shape[0], 1), generator=g)
    return (x * 0.5).scatter(1, leader, gap)


def _with_minus_inf(x: Tensor, g: torch.Generator) -> Tensor:
    """A leading run of -inf as long as a kernel's block, a random third besides, and at least one finite logit."""
    vocab = x.shape[1]
    x = x.masked_fill(torch.rand(x.shape, generator=g) < 0.33, -torch.inf)
    x[::2, : vocab // 2] = -torch.inf
    return x.index_fill(1, torch.tensor([vocab - 1]), 0.5)


REGIMES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "normal": lambda x, g: x * 3,
    "flat": lambda x, g: x * 1e-3,
    "peaked": lambda x, g: x * 3 + 25 * (torch.rand(x.shape, generator=g) < 2 / x.shape[1]),
    "tiny_entropy": _tiny_entropy,
    "minus_inf": _with_minus_inf,
    "dtype_min": lambda x, g: _with_minus_inf(x * 3, g).clamp(min=-6e4),  # masks written as the smallest finite number
    "ties": lambda x, g: x.round().clamp(max=1),  # the maximum, 1, is shared by about a third of the row
    "far_negative": lambda x, g: x * 3 - 300,  # a kernel that starts its maximum at 0 underflows
    "offset": lambda x, g: x * 3 + 1e4,
    "ascending": lambda x, g: (x * 3).sort(dim=1).values,  # the maximum moves at every step of an online softmax
}


def make_logits(
    tokens: int,
    vocab: int,
    regime: str = "normal",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Seeded logits [tokens, vocab] in one of REGIMES, the same numbers on every device."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, vocab, generator=g, dtype=torch.float64)
    return REGIMES[regime](x, g).to(dtype).to(device)


def make_labels(logits: Tensor, seed: int = 0) -> Tensor:
    """Seeded labels [T] with finite logits, beside them; every third one the row's most likely token."""
    g = torch.Generator().manual_seed(seed)
    here = logits.detach().cpu()
    chance = torch.rand(here.shape, generator=g).masked_fill(here.isinf(), -1.0)
    labels = chance.argmax(-1)
    labels[::3] = here[::3].argmax(-1)
    return labels.to(logits.device)


class TokenStats(NamedTuple):
    logprobs: Tensor
    """[T]"""
    entropy: Tensor
    """[T]"""
    grad: Tensor
    """[T, V]: gradient of sum(grad_logprobs * logprobs + grad_entropy * entropy) in the logits."""


def eager_token_stats(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    grad_logprobs: Tensor | None = None,
    grad_entropy: Tensor | None = None,
    dtype: torch.dtype | None = None,
    ignore_index: int = -100,
) -> TokenStats:
    """log_softmax and autograd, the way a trainer without kernels does it, computed in `dtype` (None: float32).

    Inputs may be on any device; it is computed on the CPU, and its results are there. In float64 this is the truth. The
    gradient comes in the logits' dtype if that is what it would be in training (`dtype` None), else in `dtype`.
    """
    labels = labels.cpu()
    x = logits.detach().cpu().clone()
    x = (x if dtype is None else x.to(dtype)).requires_grad_()
    log_p = torch.log_softmax(x.to(dtype or torch.float32) / temperature, dim=-1)
    # A -inf logit: p = 0 and its log must not enter, neither forward (0 * inf) nor backward.
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)).sum(-1)
    ignored = labels == ignore_index
    logprobs = log_p.gather(-1, labels.masked_fill(ignored, 0)[..., None])[..., 0].masked_fill(ignored, 0.0)
    total = torch.zeros((), dtype=log_p.dtype)
    for value, coefficient in ((logprobs, grad_logprobs), (entropy, grad_entropy)):
        if coefficient is not None:
            total = total + (value * coefficient.cpu().to(log_p.dtype)).sum()
    grad = torch.autograd.grad(total, x)[0] if total.requires_grad else torch.zeros_like(x)
    return TokenStats(logprobs.detach(), entropy.detach(), grad)


def assert_within_budget(
    name: str, actual: Tensor, truth: Tensor, eager: Tensor | None = None, *, scale: float | Tensor = 1.0
) -> None:
    """|actual - truth| <= 2 * (eager's error + one rounding), element by element, and finite where the truth is.

    truth: float64. eager: the same quantity from plain PyTorch at the precision of the kernel; its largest finite error
    along the last dimension counts. One rounding is half an ulp of the result in the dtype of `actual` plus one ulp, in
    the accumulation dtype, of `scale`: the largest number that had to be rounded on the way (1 for a probability).
    The message shows the worst element.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    ours, truth = actual.detach().cpu().double(), truth.cpu().double()
    acc = torch.float64 if actual.dtype == torch.float64 else torch.float32
    scale = torch.as_tensor(scale, dtype=torch.float64, device="cpu")
    rounding = truth.abs() * torch.finfo(actual.dtype).eps / 2 + scale * torch.finfo(acc).eps
    rounding = rounding + torch.finfo(actual.dtype).smallest_normal  # a result below it may be flushed to 0
    eager_error = torch.zeros_like(truth)
    if eager is not None:
        eager_error = (eager.cpu().double() - truth).abs().nan_to_num(0.0, 0.0)
        eager_error = eager_error.amax(-1, keepdim=True) if eager_error.dim() else eager_error
    budget = 2 * (eager_error + rounding)

    same = (ours == truth) | (ours.isnan() & truth.isnan())  # infinities and NaN have to agree
    excess = torch.where(same, -torch.inf, (ours - truth).abs() - budget).nan_to_num(torch.inf, torch.inf, -torch.inf)
    worst = int(excess.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
    if excess.flatten()[worst] > 0:
        theirs = "" if eager is None else f", eager {eager[at].item():.9g}"
        raise AssertionError(
            f"{name}: worst element {list(at)} of {list(truth.shape)}: got {ours[at].item():.9g}, truth "
            f"{truth[at].item():.9g}{theirs}; error {(ours - truth).abs()[at].item():.3g}, "
            f"budget {budget.expand(truth.shape)[at].item():.3g}; {int((excess > 0).sum())} elements over budget"
        )


@contextlib.contextmanager
def poisoned_memory(warn_only: bool = False) -> Iterator[None]:
    """Fill every uninitialised tensor with NaN (integers with their maximum), those of C++ code included.

    Code that relies on memory being 0, or forgets to write an element, then fails instead of passing by luck. PyTorch
    does this only together with its deterministic mode, which also refuses operations that add in any order (warn_only:
    which warns of them).
    """
    settings: Any = torch.utils.deterministic  # its attribute is set by a property that type checkers do not see
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill
