"""Entropy and log-prob of every token from its logits: one read forward, one read and one write backward.

    z = logits / temperature      logprob = z_label - logsumexp(z)      H = -sum p log p, p = softmax(z)

Registers aepo::token_stats, aepo::logits_grad and aepo::logits_grad_ (over the logits themselves), which choose the
backend when they run; Triton and the compiled extension are not needed to trace or compile them.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd.function import once_differentiable

from aepo_kernels import backend as backends
from aepo_kernels.ops import rows
from aepo_kernels.ops.call import GRADIENT_CALL, GradientCall
from aepo_kernels.ops.checks import check_integer, check_labels, check_like, check_logits, check_temperature
from aepo_kernels.ops.vocab_parallel import Shard, local_labels, merge_over_ranks, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

torch.library.define(
    "aepo::token_stats",
    "(Tensor logits, Tensor? labels, float temperature, int ignore_index, bool skip_ignored, str? group, "
    "int vocab_start, str? backend) "
    "-> (Tensor logprobs, Tensor entropy, Tensor maximum, Tensor log_sum)",
)
torch.library.define("aepo::logits_grad", f"(Tensor logits, {GRADIENT_CALL}) -> Tensor")
torch.library.define("aepo::logits_grad_", f"(Tensor(a!) logits, {GRADIENT_CALL}) -> ()")


@torch.library.impl("aepo::token_stats", "CompositeExplicitAutograd")
def _token_stats(
    logits: Tensor,
    labels: Tensor | None,
    temperature: float,
    ignore_index: int,
    skip_ignored: bool,
    group: str | None,
    vocab_start: int,
    backend: str | None,
) -> tuple[Tensor, ...]:
    backend = backends.resolve(backend, logits)
    if labels is not None and labels.device.type == "cpu" and group is None:
        check_labels(labels, labels == ignore_index, logits.shape[-1])
    stats = rows.token_stats(backend, logits, labels, temperature, ignore_index, skip_ignored)
    return merge_over_ranks(stats, labels, logits.shape[-1], temperature, Shard(group, vocab_start))


@torch.library.register_fake("aepo::token_stats")
def _token_stats_fake(logits: Tensor, labels: Tensor | None, *settings: Any) -> tuple[Tensor, ...]:
    def stat() -> Tensor:
        return logits.new_empty(logits.shape[:-1], dtype=rows.acc_dtype(logits.dtype))

    logprobs = logits.new_empty(0, dtype=rows.acc_dtype(logits.dtype)) if labels is None else stat()
    return logprobs, stat(), stat(), stat()


@torch.library.impl("aepo::logits_grad", "CompositeExplicitAutograd")
def _logits_grad(logits: Tensor, *args: Any) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _logits_grad_into(logits, out, GradientCall(*args))
    return out


def _logits_grad_into(logits: Tensor, out: Tensor, call: GradientCall) -> None:
    arguments = call._asdict()
    rows.logits_grad(backends.resolve(arguments.pop("backend"), logits), logits, out, **arguments)


@torch.library.register_fake("aepo::logits_grad")
def _logits_grad_fake(logits: Tensor, *args: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.impl("aepo::logits_grad_", "CompositeExplicitAutograd")
def _logits_grad_inplace(logits: Tensor, *args: Any) -> None:
    _logits_grad_into(logits, logits, GradientCall(*args))
    # Native code writes behind autograd's back; whoever saved these logits for a backward must get an error.
    torch.autograd.graph.increment_version(logits)


@torch.library.register_fake("aepo::logits_grad_")
def _logits_grad_inplace_fake(logits: Tensor, *args: Any) -> None:
    return None


class _TokenStats(torch.autograd.Function):
    """(logits, labels or None, ..) -> (logprobs, entropy), differentiable once in the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor | None,
        temperature: float,
        ignore_index: int,
        skip_ignored: bool,
        shard: Shard,
        inplace_backward: bool,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, maximum, log_sum = torch.ops.aepo.token_stats(
            logits, labels, temperature, ignore_index, skip_ignored, *shard, backend
        )
        ctx.save_for_backward(logits, labels, maximum, log_sum, entropy)
        ctx.temperature, ctx.ignore_index, ctx.backend = temperature, ignore_index, backend
        ctx.skip_ignored, ctx.inplace = skip_ignored, inplace_backward
        ctx.set_materialize_grads(False)  # an output that is not used costs nothing backward
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, maximum, log_sum, entropy = ctx.saved_tensors
        if ctx.skip_ignored and grad_entropy is not None:
            grad_entropy = grad_entropy.masked_fill(labels == ctx.ignore_index, 0)
        call = GradientCall(
            labels=labels,
            maximum=maximum,
            log_sum=log_sum,
            entropy=entropy,
            grad_logprobs=None if labels is None else grad_logprobs,
            grad_entropy=grad_entropy,
            temperature=ctx.temperature,
            ignore_index=ctx.ignore_index,
            backend=ctx.backend,
        )
        if ctx.inplace:
            # The graph of a compiler has no version counters, so nobody would notice who else needs the logits. A copy
            # is right whoever does, and where nobody does the compiler writes it over the logits (inductor of 2.13).
            grad = logits.clone() if is_traced(logits) else logits.detach()
            torch.ops.aepo.logits_grad_(grad, *call)
        else:
            grad = torch.ops.aepo.logits_grad(logits, *call)
        return grad, *[None] * 7


def is_traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or isinstance(x, FunctionalTensor)


def may_overwrite(argument: str) -> bool:
    """Whether an operation that is allowed to write over the logits may do so here.

    Not while tensors are saved through hooks: then PyTorch checks no versions when they are used again, and who saved
    the logits before would silently get what was written over them.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return True
    warnings.warn(
        f"{argument}: saved-tensor hooks are active (activation checkpointing or offloading), under which PyTorch "
        "cannot tell who else needs the logits; their gradient gets a tensor of its own",
        stacklevel=3,
    )
    return False


def loss_statistics(
    logits: Tensor, labels: Tensor, temperature: float, shard: Shard, inplace_backward: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [..] for a loss, from checked arguments: rows labelled rows.NO_LABEL are not read, have 0
    in both, and get gradient 0. With `inplace_backward` the gradient is written over the logits."""
    inplace = inplace_backward and may_overwrite("inplace_backward=True")
    return _TokenStats.apply(logits, labels, temperature, rows.NO_LABEL, True, shard, inplace, backend)


def logprobs_and_entropy(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    ignore_index: int = -100,
    *,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each label and entropy of each distribution, in nats, from one read of the logits.

    logits [.., V] bfloat16, float16, float32 or float64 with a contiguous last dimension and any other strides (a slice
    such as logits[:, :-1] is not copied); labels [..] integer. Returns (logprobs [..], entropy [..]) in float32
    (float64 for float64 logits), both differentiable once in the logits; the gradient has the logits' dtype.

    A label equal to `ignore_index` gives log-prob 0 without gradient; its entropy is computed all the same. A logit of
    -inf has probability 0 and gradient 0. A row with NaN, +inf or no finite logit is NaN in both outputs. Entropy is
    >= 0 with a relative error below 1e-5 from 1e-8 nats to ln V. Equal inputs give equal bits.

    Raises TypeError or ValueError for dtypes, shapes, devices or a temperature that do not fit, and, on the CPU, for a
    label outside [0, V); on other devices such a label gives log-prob NaN, which costs no synchronisation.
    `backend`: None takes the fastest that serves the tensors; a name never falls back (see `aepo_kernels.backend`).

    `process_group`: the vocabulary is sharded over its ranks, in parts of any sizes >= 1. logits [.., V_r] are then
    those of the ids from `vocab_start` on (required; nothing is guessed from the rank), labels the global ids, the same
    on every rank. Costs one all-gather of 16 bytes per token and rank (32 for float64), none in the backward. Every
    rank gets the same result, and the gradient of its own logits; the upstream gradient must be the same on all ranks,
    as it is when all compute the same loss from this result. A label that no rank holds, or several, counts as one
    outside [0, V), on all ranks.
    """
    check_logits(logits)
    check_temperature(temperature)
    check_like("labels", labels, "logits without the last dimension", logits.shape[:-1], logits.device)
    check_integer("labels", labels)
    shard = shard_of(process_group, vocab_start)
    labels, ignore_index = local_labels(labels.to(torch.int64), ignore_index, shard)
    return _TokenStats.apply(logits, labels, float(temperature), ignore_index, False, shard, False, backend)


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    *,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-prob [..] of the token `index` [..] under logits [.., V]; otherwise as `logprobs_and_entropy`.

    Drop-in for the function of that name in TRL, except that the result is float32 for 16-bit logits too (rounding a
    log-prob to bfloat16 costs up to 3e-2). No index is ignored.
    """
    check_logits(logits)
    check_temperature(temperature)
    check_like("index", index, "logits without the last dimension", logits.shape[:-1], logits.device)
    check_integer("index", index)
    shard = shard_of(process_group, vocab_start)
    index, no_label = local_labels(index.to(torch.int64), rows.NO_LABEL, shard)
    logprobs, _ = _TokenStats.apply(logits, index, float(temperature), no_label, False, shard, False, backend)
    return logprobs


def entropy_from_logits(
    logits: Tensor,
    temperature: float = 1.0,
    *,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Entropy [..] in nats of the distributions logits [.., V] / temperature; otherwise as `logprobs_and_entropy`.

    Drop-in for the functions of that name in TRL and verl, except that the result is float32 for 16-bit logits too.
    TRL's second argument is a chunk size, which this function has no use for: do not pass it on. A process group needs
    no vocab_start here, because without labels no id matters.
    """
    check_logits(logits)
    check_temperature(temperature)
    shard = shard_of(process_group, None if process_group is None else 0)  # without labels the ids do not matter
    _, entropy = _TokenStats.apply(logits, None, float(temperature), rows.NO_LABEL, False, shard, False, backend)
    return entropy
