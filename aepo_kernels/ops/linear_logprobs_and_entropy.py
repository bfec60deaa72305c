"""Entropy and log-prob of every token from hidden states and the lm_head's weight; the [T, V] logits never exist.

Registers aepo::linear_token_stats and aepo::linear_grad; ops/linear.py has the schedule (one product forward, three
backward).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aepo_kernels import backend as backends
from aepo_kernels.ops import linear, rows
from aepo_kernels.ops.call import LINEAR_GRADIENT_CALL, LinearGradientCall
from aepo_kernels.ops.checks import (
    check_device,
    check_divisor,
    check_float_tensor,
    check_integer,
    check_labels,
    check_like,
    check_temperature,
)
from aepo_kernels.ops.merge import TokenStats
from aepo_kernels.ops.vocab_parallel import Shard, group_size, local_labels, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

torch.library.define(
    "aepo::linear_token_stats",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, str? group, int vocab_start, float temperature, "
    "float? softcap, int ignore_index, bool skip_ignored, ScalarType? operand_dtype, str? backend) "
    "-> (Tensor logprobs, Tensor entropy, Tensor maximum, Tensor log_sum)",
)
torch.library.define(
    "aepo::linear_grad",
    f"(Tensor hidden, Tensor weight, {LINEAR_GRADIENT_CALL}) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)


def flat_rows(hidden: Tensor, labels: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """hidden [.., D] as [T, D] and labels [..] as [T], ignored ones as rows.NO_LABEL."""
    return hidden.reshape(-1, hidden.shape[-1]), labels.masked_fill(ignored, rows.NO_LABEL).reshape(-1)


@torch.library.impl("aepo::linear_token_stats", "CompositeExplicitAutograd")
def _linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    group: str | None,
    vocab_start: int,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    skip_ignored: bool,
    operand_dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, ...]:
    ignored = labels == ignore_index
    if labels.device.type == "cpu" and group is None:
        check_labels(labels, ignored, len(weight))
    shard = Shard(group, vocab_start)
    served = backends.resolve(backend, hidden)
    head = linear.Head(weight, bias, temperature, softcap, served, shard, operand_dtype=operand_dtype)
    flat_hidden, flat_labels = flat_rows(hidden, labels, ignored)
    if not skip_ignored:
        return tuple(x.view(labels.shape) for x in linear.statistics(head, flat_hidden, flat_labels))
    used = (flat_labels != rows.NO_LABEL).nonzero()[:, 0]
    return of_all_tokens(linear.statistics(head, flat_hidden[used], flat_labels[used]), used, labels.shape)


def of_all_tokens(stats: TokenStats, used: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Statistics of the tokens `used` [R] as those of all [..], 0 for the others."""
    return tuple(x.new_zeros(shape.numel()).index_copy_(0, used, x).view(shape) for x in stats)


@torch.library.register_fake("aepo::linear_token_stats")
def _linear_token_stats_fake(hidden: Tensor, weight: Tensor, labels: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(hidden.new_empty(labels.shape, dtype=rows.acc_dtype(hidden.dtype)) for _ in range(4))


def own_shape(hidden: Tensor, group: str | None, sequence_parallel: bool) -> tuple[int, ...]:
    """The shape of this rank's hidden states, from that of all tokens' ones."""
    if group is None or not sequence_parallel:
        return hidden.shape
    return (hidden.shape[0] // group_size(group), *hidden.shape[1:])


def in_shape_of(
    hidden: Tensor, grads: linear.Gradients, group: str | None, sequence_parallel: bool
) -> linear.Gradients:
    """The gradients with that of the hidden states in the shape of this rank's ones; an empty one is not wanted."""
    shape = own_shape(hidden, group, sequence_parallel)
    return grads._replace(hidden=grads.hidden.view(shape)) if grads.hidden.dim() > 1 else grads


@torch.library.impl("aepo::linear_grad", "CompositeExplicitAutograd")
def _linear_grad(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = LinearGradientCall(*args)
    shard = Shard(call.group, 0)  # labels are local: where the part begins does not matter any more
    backend = backends.resolve(call.backend, hidden)
    head = linear.Head(
        weight,
        call.bias,
        call.temperature,
        call.softcap,
        backend,
        shard,
        call.sequence_parallel,
        operand_dtype=call.operand_dtype,
    )
    flat_hidden, flat_labels = flat_rows(hidden, call.labels, call.labels == call.ignore_index)

    def flat(x: Tensor | None) -> Any:
        return None if x is None else x.reshape(-1)

    unused = call.maximum  # a gradient needs no log-probs
    stats = TokenStats(*map(flat, (unused, call.entropy, call.maximum, call.log_sum)))
    coefficients = linear.Coefficients(flat(call.grad_logprobs), flat(call.grad_entropy))
    grads = linear.gradients(head, flat_hidden, flat_labels, stats, coefficients, linear.Wanted(*call.wanted))
    return in_shape_of(hidden, grads, call.group, call.sequence_parallel)


@torch.library.register_fake("aepo::linear_grad")
def _linear_grad_fake(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = LinearGradientCall(*args)
    return fake_gradients(hidden, weight, call.group, call.sequence_parallel, call.wanted)


def fake_gradients(
    hidden: Tensor, weight: Tensor, group: str | None, sequence_parallel: bool, wanted_: list[bool]
) -> tuple[Tensor, ...]:
    """Empty gradients of hidden [T, .., D], or of this rank's share of its tokens, and of weight and bias."""
    wanted = linear.Wanted(*wanted_)
    return (
        hidden.new_empty(own_shape(hidden, group, sequence_parallel) if wanted.hidden else 0),
        weight.new_empty(weight.shape if wanted.weight else 0),
        weight.new_empty(weight.shape[:1] if wanted.bias else 0),
    )


class _LinearTokenStats(torch.autograd.Function):
    """(hidden, weight, bias, labels, ..) -> (logprobs, entropy), differentiable once in the first three."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        shard: Shard,
        sequence_parallel: bool,
        temperature: float,
        softcap: float | None,
        ignore_index: int,
        skip_ignored: bool,
        operand_dtype: torch.dtype | None,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        if sequence_parallel and shard.group is not None:
            hidden = torch.ops.aepo.gather_tokens(hidden, shard.group)
        logprobs, entropy, maximum, log_sum = torch.ops.aepo.linear_token_stats(
            hidden,
            weight,
            labels,
            bias,
            *shard,
            temperature,
            softcap,
            ignore_index,
            skip_ignored,
            operand_dtype,
            backend,
        )
        ctx.save_for_backward(hidden, weight, labels, bias, maximum, log_sum, entropy)
        ctx.group, ctx.sequence_parallel, ctx.backend = shard.group, sequence_parallel, backend
        ctx.temperature, ctx.softcap = temperature, softcap
        ctx.ignore_index, ctx.skip_ignored, ctx.operand_dtype = ignore_index, skip_ignored, operand_dtype
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 12
        hidden, weight, labels, bias, maximum, log_sum, entropy = ctx.saved_tensors
        if ctx.skip_ignored:  # such a token has no part in anything, and its label may be anything
            grad_logprobs, grad_entropy = (
                None if x is None else x.masked_fill(labels == ctx.ignore_index, 0)
                for x in (grad_logprobs, grad_entropy)
            )
        call = LinearGradientCall(
            labels=labels,
            bias=bias,
            maximum=maximum,
            log_sum=log_sum,
            entropy=entropy,
            grad_logprobs=grad_logprobs,
            grad_entropy=grad_entropy,
            group=ctx.group,
            sequence_parallel=ctx.sequence_parallel,
            wanted=list(ctx.needs_input_grad[:3]),
            temperature=ctx.temperature,
            softcap=ctx.softcap,
            ignore_index=ctx.ignore_index,
            operand_dtype=ctx.operand_dtype,
            backend=ctx.backend,
        )
        grads = torch.ops.aepo.linear_grad(hidden, weight, *call)
        return *only(call.wanted, grads), *[None] * 9


def only(wanted: list[bool], gradients: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """Those that somebody needs."""
    return (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    process_group: ProcessGroup | None,
    sequence_parallel: bool,
    operand_dtype: torch.dtype | None,
) -> None:
    check_float_tensor("hidden", hidden)
    check_float_tensor("weight", weight)
    for name, x in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        if type(x).__name__ == "DTensor":  # by name: importing the class takes a second
            raise TypeError(
                f"{name} is a DTensor, which holds only a part on this rank: under FSDP2 call the operation through "
                "LinearHead; for a sharded vocabulary pass to_local() with process_group and vocab_start"
            )
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or weight.numel() == 0:
        raise ValueError(
            "hidden must be [.., D] and weight [V, D] with V, D >= 1; "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    for name, x in {"weight": weight, "bias": bias}.items():
        if x is not None:
            check_device(name, x, "hidden", hidden.device)
            if x.dtype != hidden.dtype:
                raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}; got {x.dtype}")
    check_operand_dtype(operand_dtype, hidden.dtype)
    if bias is not None:
        check_like("bias", bias, "the vocabulary", weight.shape[:1], hidden.device)
    if softcap is not None and (
        isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not 0 < softcap < math.inf
    ):
        raise ValueError(f"softcap must be a number > 0 and finite, or None; got {softcap!r}")
    if softcap is not None:
        check_divisor("softcap", softcap)
    tokens, like = hidden.shape[:-1], "hidden without the last dimension"
    if sequence_parallel:
        if process_group is None:
            raise ValueError("sequence_parallel=True needs process_group, whose ranks share the tokens; got none")
        if not tokens:
            raise ValueError(f"sequence_parallel=True needs hidden [T, .., D]; got shape {tuple(hidden.shape)}")
        tokens = torch.Size((tokens[0] * process_group.size(), *tokens[1:]))
        like = f"the tokens of all {process_group.size()} ranks"
    check_like("labels", labels, like, tokens, hidden.device)
    check_integer("labels", labels)


def check_operand_dtype(operand_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    """`dtype` is that of hidden, weight and bias."""
    if operand_dtype is not None and not isinstance(operand_dtype, torch.dtype):
        raise TypeError(f"operand_dtype must be a torch.dtype or None; got {operand_dtype!r}")
    narrower = operand_dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
    if operand_dtype not in (None, dtype) and not narrower:
        raise TypeError(
            "operand_dtype must be None, the dtype of hidden, or bfloat16 or float16 where hidden is float32; "
            f"got {operand_dtype} for {dtype}"
        )


def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    *,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    sequence_parallel: bool = False,
    operand_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each label and entropy of each distribution, in nats, straight from hidden states.

        z = hidden @ weight.T + bias      z <- softcap tanh(z / softcap), if given      then as `logprobs_and_entropy`

    hidden [.., D], weight [V, D] and bias [V] of one dtype (bfloat16, float16, float32, float64); labels [..] integer.
    Returns (logprobs [..], entropy [..]) in float32 (float64 for float64), differentiable once in hidden, weight and
    bias, whose gradients have their dtypes. Logits exist as tiles only, in float32 from float32 sums: they are never
    rounded to 16 bits, and memory beyond the gradients is O(T D) plus one tile. The backward makes the tiles again, for
    the rows that have a gradient; the weight's gradient is summed in float32 and rounded once.

    `operand_dtype`, bfloat16 or float16 beside float32 tensors: hidden and weight are rounded to it on their way into
    the products, as autocast does, the weight tile by tile; sums, bias, log-probs and gradients stay float32. None, or
    the tensors' own dtype: nothing is rounded. On CUDA the products read 16 bits (tensor cores); the CPU multiplies the
    rounded numbers in float32. Everything is that of a call with tensors of this dtype, but for the last rounding of
    the gradients.

    Ignored labels, -inf (from a bias), NaN and the meaning of `backend` are as in `logprobs_and_entropy`. Raises
    TypeError or ValueError naming the argument that does not fit. Under FSDP2 call it through `LinearHead`.

    `process_group` and `vocab_start`: weight [V_r, D] and bias [V_r] are this rank's part of the vocabulary; labels and
    the rest as in `logprobs_and_entropy`. hidden is the same on all ranks, and so is its gradient, which costs one
    all-reduce in float32 backward. With `sequence_parallel` hidden [T / ranks, .., D] is this rank's share of the
    tokens (equal shares, in the order of the ranks) while labels are those of all, [T, ..]: one all-gather of hidden
    forward, and a reduce-scatter for the all-reduce. The gradients of weight and bias are those of this rank's part.
    """
    shard = shard_of(process_group, vocab_start)
    check_linear(hidden, weight, labels, bias, softcap, process_group, sequence_parallel, operand_dtype)
    check_temperature(temperature)
    labels, ignore_index = local_labels(labels.to(torch.int64), ignore_index, shard)
    softcap = None if softcap is None else float(softcap)
    settings = (float(temperature), softcap, ignore_index, False, operand_dtype, backend)
    return _LinearTokenStats.apply(hidden, weight, bias, labels, shard, sequence_parallel, *settings)


def linear_loss_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    softcap: float | None,
    shard: Shard,
    sequence_parallel: bool,
    operand_dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [..] for a loss, from checked arguments: rows labelled rows.NO_LABEL take part in no
    product, have 0 in both, and get gradient 0."""
    settings = (temperature, softcap, rows.NO_LABEL, True, operand_dtype, backend)
    return _LinearTokenStats.apply(hidden, weight, bias, labels, shard, sequence_parallel, *settings)
