"""Any loss of per-token log-probs and entropies, straight from logits: a function between fused operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from aepo_kernels.ops import rows
from aepo_kernels.ops.checks import check_integer, check_like, check_logits, check_temperature
from aepo_kernels.ops.logprobs_and_entropy import loss_statistics
from aepo_kernels.ops.loss_function import LossFunction, check_loss_function, loss_of_function, masked_labels
from aepo_kernels.ops.policy_loss import PolicyLoss
from aepo_kernels.ops.vocab_parallel import local_labels, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def logits_loss(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    loss_fn: LossFunction,
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """The loss that `loss_fn` makes of the log-probs and entropies (nats) of logits [.., V] and labels [..].

        def loss_fn(logprobs, entropy):               # both [..], float32 (float64 for float64 logits), like labels
            ratio = (logprobs - old_logprobs).exp()   # what else it needs it captures: old log-probs, advantages, mask
            return -(ratio * advantages * mask).sum() / mask.sum(), {"ratio": ratio[mask].mean()}

    It returns the loss [], or the loss and a dict of numbers for `PolicyLoss.metrics`. Autograd differentiates it on
    leaves of its own, once and in the forward; its two gradients are the coefficients of the fused backward, so that
    all that is of size [T, V] is as in `logits_policy_loss`: one read forward, one read and write backward, over the
    logits themselves if asked, sharded over a process group, on every backend. `logits`, `labels`, `temperature`,
    `inplace_backward`, `process_group`, `vocab_start` and `backend` are those of that function.

    mask [..] bool, integer, or floating point with zeros and ones: where a token does not count its row is not read,
    both arguments of `loss_fn` are 0, and whatever gradient it has there is dropped. What `loss_fn` does with these
    tokens in its sums is its own matter: multiply by the mask.

    There is no single pass here: the gradient is known when all tokens are.

    Raises, naming `loss_fn`: TypeError or ValueError for what is no loss [], for a loss without a gradient in its
    arguments, and for captured tensors that require a gradient (they would get none here: add such terms to the loss
    that comes back); RuntimeError where it writes over its arguments; on the CPU ValueError where loss or gradients are
    not finite although the log-probs and entropies are (elsewhere the loss is NaN). Under torch.compile the function is
    traced into the caller's graph and its values are not checked.
    """
    check_logits(logits, inplace="inplace_backward" if inplace_backward else None)
    check_temperature(temperature)
    check_like("labels", labels, "logits without the last dimension", logits.shape[:-1], logits.device)
    check_integer("labels", labels)
    check_loss_function(loss_fn, mask, labels.shape, logits.device)
    shard = shard_of(process_group, vocab_start)
    labels, _ = local_labels(masked_labels(labels, mask), rows.NO_LABEL, shard)
    stats = loss_statistics(logits, labels, float(temperature), shard, inplace_backward, backend)
    return loss_of_function(loss_fn, *stats, mask != 0)
