"""What other libraries offer for the same work. Each is imported if it is installed, else skipped with a line.

No code of theirs is here: a peer is the few lines that call it. A peer computes what it computes (see `computes`); it
is never completed to look like ours, except that a loss in plain PyTorch is put on top of log-probs.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aepo.bench.inputs import GRPO, LOGPROB, NLL, STATS, Policy

CPU, CUDA = "cpu", "cuda"


@dataclass(frozen=True)
class Peer:
    """One function of another library.

    operation      takes                     returns
    logits         logits [T, V], labels     (logprobs, entropy), or (logprobs,) if it computes the log-prob alone
    linear         hidden, weight, labels    the same
    logits loss    logits, Policy            a loss
    linear loss    hidden, weight, Policy    a loss
    """

    name: str
    package: str
    operation: str
    computes: str
    devices: tuple[str, ...]
    load: Callable[[], Callable[..., Any]]
    float32_loss: tuple[str, ...] = ()
    """Devices where it answers 16-bit logits in 16 bits, too coarse for a loss: there it gets a float32 copy."""


def missing(peer: Peer, device: str) -> str | None:
    """Why a peer cannot be measured here, or None."""
    try:
        importlib.metadata.version(peer.package)
    except importlib.metadata.PackageNotFoundError:
        return f"{peer.package} is not installed"
    if device not in peer.devices:
        return f"runs on {' and '.join(peer.devices)} only"
    try:
        function(peer)
    except (Exception, SystemExit) as error:  # a library may fail to import in any way; that is its line in the list
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]}"
    return None


def function(peer: Peer) -> Callable[..., Any]:
    """Its function, imported without the messages that libraries print on import."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            return peer.load()
        finally:
            logging.disable(before)


def available(operation: str, device: str) -> list[Peer]:
    return [peer for peer in PEERS if peer.operation == operation and missing(peer, device) is None]


def version(peer: Peer) -> str:
    return importlib.metadata.version(peer.package)


def _trl() -> Callable[..., Any]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


def _trl_triton() -> Callable[..., Any]:
    # What the function of its trainers comes to on a GPU, without the packages that those need (datasets, pandas).
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy


def _trl_chunked() -> Callable[..., Any]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        chunk = 32768  # vocabulary columns per tile, as its trainers set it
        out = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, chunk, None, 1.0, ("entropy",))
        return out[0], out[1]

    return run


def _verl() -> Callable[..., Any]:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    return lambda logits, labels: (
        logprobs_from_logits(logits, labels, inplace_backward=False),
        entropy_from_logits(logits),
    )


def _verl_fused() -> Callable[..., Any]:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO(impl_backend="torch")


def _verl_triton() -> Callable[..., Any]:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, 1.0, "none", None)


def _liger_scaled() -> Callable[..., Any]:
    """Its frontend takes plain PyTorch on a CPU, and on a Hopper GPU a kernel that needs nvidia-cutlass-dsl."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels, 1.0, -100, 1, True)
        return -nll, entropy

    return run


def _liger_scaled_sm90() -> Callable[..., Any]:
    from liger_kernel.ops.cutedsl.ops import fused_scaled_cross_entropy_sm90  # noqa: F401, asked whether it imports

    return _liger_scaled()


def _liger_scaled_pytorch() -> Callable[..., Any]:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import _FusedLinearPPOFallbackFunction

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = _FusedLinearPPOFallbackFunction.apply(hidden, weight, labels, 1.0, -100, True)
        return -nll, entropy

    return run


def _liger_chunked_grpo() -> Callable[..., Any]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def run(hidden: Tensor, weight: Tensor, policy: Policy) -> Tensor:
        rows = (policy.sequences, -1)
        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")
        return loss(
            hidden.view(*rows, hidden.shape[-1]),
            weight,
            policy.labels.view(rows),
            policy.mask.view(rows).float(),
            policy.advantages.view(rows)[:, 0],
            old_per_token_logps=policy.old_logprobs.view(rows),
        )[0]

    return run


def _liger_triton_grpo() -> Callable[..., Any]:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def run(logits: Tensor, policy: Policy) -> Tensor:
        rows = (policy.sequences, -1)
        # It takes one row of logits more than tokens per sequence: our tokens that do not count.
        return triton_grpo_loss(
            logits.view(*rows, logits.shape[-1]),
            policy.old_logprobs.view(rows)[:, :-1].contiguous(),
            None,
            policy.labels.view(rows)[:, :-1].contiguous(),
            policy.advantages.view(rows)[:, 0].contiguous(),
            completion_mask=policy.mask.view(rows)[:, :-1].int(),
            temperature=1.0,
            beta=0.0,
            eps_high=0.2,
            loss_type="bnpo",
            reduce=True,
        )[0]

    return run


def _cce(implementation: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        from cut_cross_entropy import linear_cross_entropy

        return lambda hidden, weight, labels: (
            -linear_cross_entropy(hidden, weight, labels, reduction="none", impl=implementation),
        )

    return load


def _flash_attention() -> Callable[..., Any]:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda logits, labels: (-cross_entropy_loss(logits, labels)[0],)


def _quack() -> Callable[..., Any]:
    from quack.cross_entropy import cross_entropy

    return lambda logits, labels: (-cross_entropy(logits, labels, reduction="none"),)


def _quack_linear() -> Callable[..., Any]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, policy: chunked_linear_cross_entropy(hidden, weight, policy.labels)


PEERS = (
    Peer("TRL", "trl", "logits", STATS, (CPU,), _trl, float32_loss=(CPU,)),
    Peer("TRL Triton", "trl", "logits", STATS, (CUDA,), _trl_triton),
    Peer("verl", "verl", "logits", STATS, (CPU, CUDA), _verl, float32_loss=(CPU, CUDA)),
    Peer("flash-attn CE", "flash-attn", "logits", LOGPROB, (CUDA,), _flash_attention),
    Peer("quack CE", "quack-kernels", "logits", LOGPROB, (CUDA,), _quack),
    Peer("Liger Triton GRPO", "liger-kernel", "logits loss", GRPO, (CUDA,), _liger_triton_grpo),
    Peer("TRL chunked", "trl", "linear", STATS, (CPU, CUDA), _trl_chunked),
    Peer("verl FusedLinearForPPO", "verl", "linear", STATS, (CPU, CUDA), _verl_fused),
    Peer("verl Triton", "verl", "linear", STATS, (CUDA,), _verl_triton),
    Peer("Liger fused scaled CE", "liger-kernel", "linear", STATS, (CPU,), _liger_scaled),
    Peer("Liger fused scaled CE, SM90 kernel", "liger-kernel", "linear", STATS, (CUDA,), _liger_scaled_sm90),
    Peer("Liger fused scaled CE, its PyTorch code", "liger-kernel", "linear", STATS, (CUDA,), _liger_scaled_pytorch),
    Peer("CCE", "cut-cross-entropy", "linear", LOGPROB, (CUDA,), _cce("cce")),
    Peer("CCE torch_compile", "cut-cross-entropy", "linear", LOGPROB, (CPU, CUDA), _cce("torch_compile")),
    Peer("Liger chunked GRPO", "liger-kernel", "linear loss", GRPO, (CPU, CUDA), _liger_chunked_grpo),
    Peer("quack chunked linear CE", "quack-kernels", "linear loss", NLL, (CUDA,), _quack_linear),
)
