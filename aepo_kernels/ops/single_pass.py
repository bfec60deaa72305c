"""The policy loss and its gradient in one visit to every row of logits: the gradient is written in the forward.

Registers aepo::single_pass and aepo::single_pass_ (over the logits themselves), and aepo::scale_, the backward.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aepo_kernels import backend as backends
from aepo_kernels.objective import METRICS, ObjectiveNumbers, PolicyObjective
from aepo_kernels.ops import rows
from aepo_kernels.ops.call import POLICY_CALL, PolicyCall
from aepo_kernels.ops.checks import check_labels
from aepo_kernels.ops.logprobs_and_entropy import is_traced, may_overwrite
from aepo_kernels.ops.policy_tensors import policy_tensors, run_policy_terms
from aepo_kernels.ops.vocab_parallel import Shard

ARGUMENTS = f"Tensor labels, float temperature, {POLICY_CALL}"
torch.library.define("aepo::single_pass", f"(Tensor logits, {ARGUMENTS}) -> (Tensor loss, Tensor metrics, Tensor grad)")
torch.library.define("aepo::single_pass_", f"(Tensor(a!) logits, {ARGUMENTS}) -> (Tensor loss, Tensor metrics)")
torch.library.define("aepo::scale_", "(Tensor(a!) x, Tensor factor, str? backend) -> ()")


def check_single_pass(logits: Tensor, objective: PolicyObjective, entropy_stats: bool, shard: Shard) -> None:
    if logits.dtype == torch.float16:
        # Of 65,536 tokens' mean loss, to be scaled by as much, all of the gradient but the labels' would be 0.
        raise ValueError(
            "single_pass=True rounds the gradient before the loss scale is known, which float16 cannot carry; got "
            "float16 logits: take inplace_backward=True, or bfloat16"
        )
    if not objective.follows_from_each_token(entropy_stats=entropy_stats):
        raise ValueError(
            "single_pass=True needs coefficients that follow from each token alone: entropy_stats with an "
            "entropy-aware advantage, and ratio_level='token'"
        )
    if shard.group is not None:
        raise ValueError("single_pass=True needs the whole vocabulary on this rank; got a process_group")


def _single_pass_into(
    logits: Tensor, out: Tensor, labels: Tensor, temperature: float, call: PolicyCall
) -> tuple[Tensor, Tensor]:
    backend = backends.resolve(call.backend, logits)
    if labels.device.type == "cpu":
        check_labels(labels, labels == rows.NO_LABEL, logits.shape[-1])
    tensors = policy_tensors(labels.shape, rows.acc_dtype(logits.dtype), call)
    numbers = ObjectiveNumbers(*call.numbers)
    logprobs, entropy = rows.single_pass(backend, logits, out, labels, temperature, tensors, numbers)
    loss, _, _, metrics = run_policy_terms(backend, logprobs, entropy, tensors, numbers)
    return loss, metrics


@torch.library.impl("aepo::single_pass", "CompositeExplicitAutograd")
def _single_pass(logits: Tensor, labels: Tensor, temperature: float, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return *_single_pass_into(logits, out, labels, temperature, PolicyCall(*args)), out


@torch.library.impl("aepo::single_pass_", "CompositeExplicitAutograd")
def _single_pass_inplace(logits: Tensor, labels: Tensor, temperature: float, *args: Any) -> tuple[Tensor, Tensor]:
    result = _single_pass_into(logits, logits, labels, temperature, PolicyCall(*args))
    # Native code writes behind autograd's back; whoever saved these logits for a backward must get an error.
    torch.autograd.graph.increment_version(logits)
    return result


def _fake_results(logits: Tensor) -> tuple[Tensor, Tensor]:
    acc = rows.acc_dtype(logits.dtype)
    return logits.new_empty((), dtype=acc), logits.new_empty(len(METRICS), dtype=acc)


@torch.library.register_fake("aepo::single_pass")
def _single_pass_fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_results(logits), torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.register_fake("aepo::single_pass_")
def _single_pass_inplace_fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _fake_results(logits)


@torch.library.impl("aepo::scale_", "CompositeExplicitAutograd")
def _scale(x: Tensor, factor: Tensor, backend: str | None) -> None:
    """x *= factor [], unless it is 1: then nothing is read or written. On a GPU the kernel finds out by itself."""
    if x.device.type == "cpu":
        if factor.item() != 1:
            x.mul_(factor)
    elif backends.resolve(backend, x) == "triton" and x.is_contiguous():
        backends.stage("triton", "scaled_cast")(x, factor, x)
    else:
        x.mul_(factor)
    torch.autograd.graph.increment_version(x)  # also for a factor of 1: the gradient is handed out, once


@torch.library.register_fake("aepo::scale_")
def _scale_fake(x: Tensor, factor: Tensor, backend: str | None) -> None:
    return None


class _SinglePass(torch.autograd.Function):
    """(logits, labels, temperature, in place, *PolicyCall) -> (loss, metrics), differentiable once in the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: float, inplace: bool, *args: Any
    ) -> tuple[Tensor, Tensor]:
        if inplace:
            grad = logits.clone() if is_traced(logits) else logits.detach()
            loss, metrics = torch.ops.aepo.single_pass_(grad, labels, temperature, *args)
        else:
            loss, metrics, grad = torch.ops.aepo.single_pass(logits, labels, temperature, *args)
        ctx.save_for_backward(grad)
        ctx.handed_out = False
        ctx.backend, ctx.others = PolicyCall(*args).backend, len(args)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        if not torch.compiler.is_compiling():
            if ctx.handed_out:  # saved-tensor hooks check no versions
                raise RuntimeError("the gradient of single_pass=True was scaled by an inplace operation and handed out")
            ctx.handed_out = True
        torch.ops.aepo.scale_(grad, grad_loss, ctx.backend)
        return grad, None, None, None, *[None] * ctx.others


class _Overwritten(torch.autograd.Function):
    """Marks logits as what they no longer are: who differentiates through a later use gets an error."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "the logits were used after logits_policy_loss(single_pass=True), which has written their gradient over "
            "them by an inplace operation: use them before, or leave single_pass off"
        )


def single_pass_loss(logits: Tensor, labels: Tensor, temperature: float, call: PolicyCall) -> tuple[Tensor, Tensor]:
    """(loss [], metrics [11]) from checked arguments, labels [..] rows.NO_LABEL where masked."""
    inplace = may_overwrite("single_pass=True")
    marked = inplace and not logits.is_leaf and not is_traced(logits)
    loss, metrics = _SinglePass.apply(logits, labels, temperature, inplace, *call)
    if marked:
        # The operation has counted its own write; this is not another one. Views that split() and unbind() made cannot
        # be marked: of them only those who saved the logits before learn what happened.
        with contextlib.suppress(RuntimeError), torch.autograd._unsafe_preserve_version_counter(logits):
            _Overwritten.apply(logits)
    return loss, metrics
