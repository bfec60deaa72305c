"""A loss that the caller wrote: one function of per-token log-probs and entropies, differentiated by autograd.

Its part is O(T); what is O(T V) stays in the fused operations, which take the function's two gradients as the
coefficients of `logits_grad`. The gradients are taken at once, so that what the function did wrong shows in the call
that ran it, and nothing of its graph is kept.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aepo_kernels.ops import rows
from aepo_kernels.ops.checks import check_mask, check_mask_tensor
from aepo_kernels.ops.policy_loss import KnownGradients, PolicyLoss

LossFunction = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Mapping[str, Tensor | float]]"]
"""(logprobs [..], entropy [..]) -> loss [], or (loss [], metrics)."""


class TokenLoss(NamedTuple):
    """A loss with its gradients in log-probs and entropies, which are 0 where a token does not count."""

    loss: Tensor  # []
    metrics: dict[str, Tensor]
    grad_logprobs: Tensor  # [..]
    grad_entropy: Tensor | None  # [..]; None: the loss does not depend on the entropy


def check_loss_function(loss_fn: LossFunction, mask: Tensor, shape: torch.Size, device: torch.device) -> None:
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function (logprobs, entropy) -> loss; got {type(loss_fn).__name__}")
    check_mask_tensor(mask, shape, device)
    if mask.is_floating_point() and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        check_mask(mask)


def masked_labels(labels: Tensor, mask: Tensor) -> Tensor:
    """Labels [..] with those that do not count left out. A mask of 0.5, which only the CPU raises for, makes its label
    one outside the vocabulary, and so the loss NaN."""
    labels = labels.to(torch.int64).masked_fill(mask == 0, rows.NO_LABEL)
    return labels.masked_fill((mask != 0) & (mask != 1), -1) if mask.is_floating_point() else labels


def loss_of_function(loss_fn: LossFunction, logprobs: Tensor, entropy: Tensor, counted: Tensor) -> PolicyLoss:
    """The loss of `loss_fn`, differentiable in logprobs and entropy [..]; counted [..] bool."""
    if torch.compiler.is_compiling():  # one graph with the caller's; the values are not looked at
        loss, metrics = _result(loss_fn, loss_fn(logprobs, entropy), logprobs)
        return PolicyLoss(loss, {"loss": loss.detach().clone(), **metrics})
    found = differentiate(loss_fn, logprobs, entropy, counted, wanted=logprobs.requires_grad)
    found = finite(loss_fn, found, logprobs, entropy, counted)
    loss = KnownGradients.apply(logprobs, entropy, found.loss, found.grad_logprobs, found.grad_entropy)
    return PolicyLoss(loss, {"loss": found.loss, **found.metrics})


def differentiate(
    loss_fn: LossFunction, logprobs: Tensor, entropy: Tensor, counted: Tensor, wanted: bool = True
) -> TokenLoss:
    """Run `loss_fn` on leaves of its own, and take its gradients where they are wanted."""
    given = (logprobs.detach(), entropy.detach())
    leaves = tuple(x.clone().requires_grad_(wanted) for x in given)
    with torch.set_grad_enabled(wanted):
        loss, metrics = _result(loss_fn, _call(loss_fn, *leaves), logprobs)
    _check_untouched(loss_fn, leaves, given)
    gradients: list[Tensor | None] = [None, None]
    if wanted:
        _check_graph(loss_fn, loss, leaves)
        gradients = [
            None if x is None else x.masked_fill(~counted, 0)
            for x in torch.autograd.grad(loss, leaves, allow_unused=True)
        ]
    grad_logprobs, grad_entropy = gradients
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(given[0])
    return TokenLoss(loss.detach(), metrics, grad_logprobs, grad_entropy)


def finite(loss_fn: LossFunction, found: TokenLoss, logprobs: Tensor, entropy: Tensor, counted: Tensor) -> TokenLoss:
    """The same; where loss or gradients are not finite although log-probs and entropies are, an error on the CPU and a
    NaN loss elsewhere, where looking would wait for the device. NaN in the logits stays visible as everywhere."""
    loss, _, *gradients = found
    broken = ~loss.isfinite()
    for x in gradients:
        broken = broken if x is None else broken | ~x.isfinite().all()
    if loss.device.type == "cpu" and broken and all(x.isfinite().all() for x in (logprobs, entropy)):
        what = "gradients that are not finite" if loss.isfinite() else f"a loss of {loss.item()}"
        hint = ""
        if not counted.any():
            hint = "; no token counts in this call: divide by at least 1"
        elif not counted.all():
            hint = "; what it captures may be anything where the mask is 0: torch.where(mask, .., 0) keeps that out"
        raise ValueError(f"{name_of(loss_fn)} must be finite where log-probs and entropies are; got {what}{hint}")
    return found._replace(loss=torch.where(broken, torch.nan, loss))


def name_of(loss_fn: LossFunction) -> str:
    name = getattr(loss_fn, "__qualname__", None)
    return f"loss_fn {loss_fn.__module__}.{name}" if name else f"loss_fn {loss_fn!r}"


def _call(loss_fn: LossFunction, logprobs: Tensor, entropy: Tensor) -> Any:
    try:
        return loss_fn(logprobs, entropy)
    except RuntimeError as error:
        if "in-place operation" in str(error):
            raise RuntimeError(f"{name_of(loss_fn)} must not write over its arguments: {error}") from error
        raise


def _result(loss_fn: LossFunction, returned: Any, like: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What the function returned, checked: (loss [] in the dtype of `like`, detached metrics)."""
    loss, metrics = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    if not isinstance(loss, Tensor) or not isinstance(metrics, Mapping):
        what = "a tuple" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
        raise TypeError(f"{name_of(loss_fn)} must return a loss [] or (loss [], {{name: number}}); got {what}")
    if loss.shape != ():
        raise ValueError(
            f"{name_of(loss_fn)} must return a loss of shape (), one number; got shape {tuple(loss.shape)}"
        )
    if not loss.is_floating_point() or loss.device != like.device:
        raise TypeError(
            f"{name_of(loss_fn)} must return a floating-point loss on {like.device}; got {loss.dtype} on {loss.device}"
        )
    if isinstance(returned, PolicyLoss):  # one of our own losses inside, whose metrics have the loss too
        metrics = {name: value for name, value in metrics.items() if name != "loss"}
    detached = {}
    for key, value in metrics.items():
        if not isinstance(key, str):
            raise TypeError(f"{name_of(loss_fn)}: names of metrics must be texts; got {key!r}")
        if key == "loss":
            raise ValueError(f"{name_of(loss_fn)}: metric 'loss' must have another name, the loss itself is called so")
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            detached[key] = value.detach().clone().reshape(())
        elif isinstance(value, numbers.Real):
            detached[key] = torch.full((), float(value), dtype=like.dtype, device=like.device)
        else:
            got = type(value).__name__
            if isinstance(value, Tensor):
                got = str(value.dtype) if value.is_complex() else f"shape {tuple(value.shape)}"
            raise TypeError(f"{name_of(loss_fn)}: metric {key!r} must be one number; got {got}")
    return loss.to(like.dtype), detached


def _check_untouched(loss_fn: LossFunction, leaves: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> None:
    """By versions, and on the CPU by values: `.data` is written without a trace."""
    for name, leaf, before in zip(("logprobs", "entropy"), leaves, given, strict=True):
        touched = not leaf.is_inference() and leaf._version != 0
        if not touched and leaf.device.type == "cpu":
            touched = not torch.equal(leaf.detach().nan_to_num(nan=torch.inf), before.nan_to_num(nan=torch.inf))
        if touched:
            raise RuntimeError(f"{name_of(loss_fn)} must not write over its arguments; it changed {name} in place")


def _check_graph(loss_fn: LossFunction, loss: Tensor, leaves: tuple[Tensor, ...]) -> None:
    """The loss depends on the leaves, and on nothing else that requires a gradient, which would be lost here."""
    if not loss.requires_grad:
        raise ValueError(
            f"{name_of(loss_fn)} must return a loss that depends on logprobs or entropy; its loss has no gradient"
        )
    nodes: list[Any] = [loss.grad_fn]
    seen, found = {None}, any(loss is leaf for leaf in leaves)
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() != "torch::autograd::AccumulateGrad":
            nodes += [following for following, _ in node.next_functions]
        elif not any(node.variable is leaf for leaf in leaves):
            raise ValueError(
                f"{name_of(loss_fn)} uses another tensor that requires a gradient, of shape "
                f"{tuple(node.variable.shape)}, which would get none: detach what the function captures, and add other "
                "terms to what comes back"
            )
        else:
            found = True
    if not found:
        raise ValueError(
            f"{name_of(loss_fn)} must return a loss that depends on logprobs or entropy; its loss does not"
        )
