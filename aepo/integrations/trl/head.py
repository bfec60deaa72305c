"""Our linear operation in the place of TRL's chunked head, for a while (`linear_head`) or for good (`patch_trl`).

The models of all of TRL's trainers get a forward from `add_fused_lm_head`, which looks two names up at each call: the
function that makes log-probs from hidden states, and whether it is given only the positions that count. Both are
replaced, in trl.trainer.utils alone; TRL's own kernels keep theirs.

    TRL's    rounds the logits of a tile to the compute dtype, 16 bits under autocast or for 16-bit weights; off CUDA
             and XPU it also multiplies prompts and padding, and masks the result
    ours     sums and keeps logits in float32, and leaves masked positions out on every device that it serves
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from aepo.integrations.trl.versions import COMPACT, HEAD, check_trl, head_differences
from aepo_kernels import linear_logprobs_and_entropy

SERVED = ("cpu", "cuda")  # types of devices; on others our operation is plain PyTorch, and TRL has kernels for XPU
OURS = {"log_probs", "entropy"}


@dataclass(frozen=True)
class Head:
    """Has the `apply` of TRL's autograd function, to which calls go that our operation does not serve."""

    theirs: Any

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """hidden [T, D], weight [V, D], bias [V] and targets [T] of any dtypes; log-probs [T] and, where `outputs` asks
        for it, entropy [T] of softcap(logit_scale * logits) / temperature in float32 (float64 for float64)."""
        softcap = final_logit_softcapping
        if not serves(weight, softcap, logit_scale, outputs):
            return self.theirs.apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
            )
        # s z capped at c is s times z capped at c / s
        settings = (temperature / logit_scale, None if softcap is None else softcap / logit_scale)
        device = weight.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        dtype, operand_dtype = dtypes(device, autocast, *(x.dtype for x in (hidden, weight, bias) if x is not None))
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        logprobs, entropy = linear_logprobs_and_entropy(
            hidden, weight, targets, bias, *settings, operand_dtype=operand_dtype
        )
        return logprobs, entropy if "entropy" in outputs else None, None, None, None


def serves(weight: Tensor, softcap: float | None, logit_scale: float, outputs: tuple[str, ...]) -> bool:
    """Whether our operation can answer a call.

    A weight with a ds_id is one that DeepSpeed ZeRO-3 has cut: it has to be gathered again for the backward.
    """
    numbers = logit_scale > 0 and (softcap is None or softcap > 0)
    return numbers and OURS.issuperset(outputs) and weight.device.type in SERVED and not hasattr(weight, "ds_id")


def dtypes(
    device: str, autocast: torch.dtype | None, hidden: torch.dtype, *others: torch.dtype
) -> tuple[torch.dtype, torch.dtype | None]:
    """(what hidden, weight and bias are widened to, operand_dtype) from the dtypes that they have.

    operand_dtype is TRL's compute dtype: that of `autocast`, where it is on, or else that of hidden. The tensors become
    as wide as the widest, so a float32 weight is rounded tile by tile, and no gradient on its way to it. On the CPU,
    which multiplies in float32 in any case, and in float64, which autocast leaves alone, nothing is rounded.
    """
    widest = functools.reduce(torch.promote_types, (hidden, *others))
    if device == "cpu" or widest == torch.float64:
        return widest, None
    compute = hidden if autocast is None else autocast
    return torch.promote_types(widest, compute), compute


class _Swap:
    """Ours is in place while a block of `linear_head` is open or `patch_trl` holds; else what was there before is."""

    def __init__(self) -> None:
        self.patched = False
        self.blocks = 0
        self._before: dict[str, Any] | None = None

    def settle(self, utils: ModuleType) -> None:
        """Put in place what these say."""
        wanted = self.patched or self.blocks > 0
        if wanted and self._before is None:
            self._before = {name: getattr(utils, name) for name in (HEAD, COMPACT)}
            setattr(utils, HEAD, Head(self._before[HEAD]))
            setattr(utils, COMPACT, functools.partial(_compact, self._before[COMPACT]))
        elif not wanted and self._before is not None:
            for name, value in self._before.items():
                setattr(utils, name, value)
            self._before = None

    def allowed(self, utils: ModuleType) -> bool:
        """Whether ours fits; a warning says why not."""
        if self._before is not None:
            return True
        differences = head_differences(utils)
        if differences:
            warnings.warn(
                f"the head of TRL is not the one known here, so TRL is left as it is: {'; '.join(differences)}",
                stacklevel=4,
            )
        return not differences


_swap = _Swap()


def _compact(theirs: Any, device: torch.device) -> bool:
    """Whether only positions with a label are projected; elsewhere TRL avoids it for its own reasons."""
    return device.type in SERVED or theirs(device)


@functools.cache
def _utils() -> ModuleType:
    check_trl()
    from trl.trainer import utils  # 10 s

    return utils


@contextmanager
def linear_head() -> Iterator[bool]:
    """Within the block TRL's models compute log-probs and entropies with our operation.

    Yields whether they do: where TRL's head is not the one known here, a warning says what was expected and what was
    found, and TRL is left as it is. Blocks may be nested; the last one to end puts back what was there before the
    first, unless `patch_trl` holds. Raises ImportError where TRL is missing or older than 1.16.
    """
    utils = _utils()
    if not _swap.allowed(utils):
        yield False
        return
    _swap.blocks += 1
    _swap.settle(utils)
    try:
        yield True
    finally:
        _swap.blocks -= 1
        _swap.settle(utils)


def patch_trl() -> bool:
    """From now on TRL's models compute log-probs and entropies with our operation, in every trainer of this process.

    One call anywhere before training is enough. GRPO and RLOO take all of their log-probs from it; what SFT, DPO and
    KTO log besides (top-1 accuracy, mean logits) our operation does not make, so those calls stay with TRL's function,
    and are only spared masked positions. Returns False after a warning that says why, with TRL left as it is, where its
    head is not the one known here. Raises ImportError where TRL is missing or older than 1.16. Again: nothing.
    """
    utils = _utils()
    if not _swap.allowed(utils):
        return False
    _swap.patched = True
    _swap.settle(utils)
    return True


def unpatch_trl() -> None:
    """Undo `patch_trl`: TRL's own head is back. Without a patch: nothing."""
    if _swap.patched:
        _swap.patched = False
        _swap.settle(_utils())
