"""What one micro-batch allocates, computes and moves, counted operation by operation on the meta device.

The model's own code runs, forward and backward, on tensors that have shapes and no memory. So whatever an architecture
keeps for its backward is counted, and no formula of ours has to know it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig, PreTrainedModel

from aepo.learning.attention import packed
from aepo.learning.forward import recomputed_layers
from aepo.models.outline import blamed_on, outline, source
from aepo.parallel import state_dtype

FEW = (2, 3)
"""Layers that are run: all layers of a model are alike, so the third one says what each further one adds. Not the
second: a forward alone has its peak where one layer hands over to another."""


@dataclass(frozen=True)
class MicroBatch:
    """Bytes, beside weights and gradients, and work of a forward and backward on packed tokens."""

    activations: int  # kept for the backward
    logits: int  # of the tokens that are trained; the gradient is written over them
    inside: int  # at the peak before the backward comes to the embedding
    ending: int  # at the peak after that: no layer keeps anything now, but a gradient is as large as the embedding
    evaluated: int  # at the peak of a forward alone
    forward_flops: int  # of matrix products, without those of attention
    flops: int  # with the backward
    forward_moved: int  # bytes read and written by everything else
    moved: int

    @property
    def peak(self) -> int:
        return max(self.inside, self.ending)


def count_micro_batch(
    config: PreTrainedConfig, dtype: torch.dtype, *, tokens: int, trained: int, checkpointing: bool
) -> MicroBatch:
    """Of `tokens` packed tokens, of which `trained` have a row of logits. ValueError, in one line: this model cannot be
    trained on packed trajectories, or its code asks for numbers, which there are none of without weights."""
    few, more = (
        dataclasses.astuple(_run(outline(config, dtype, layers), tokens, trained, checkpointing)) for layers in FEW
    )
    further = config.get_text_config().num_hidden_layers - FEW[1]
    return MicroBatch(*(two + further * (two - one) for one, two in zip(few, more, strict=True)))


def _run(model: PreTrainedModel, tokens: int, trained: int, checkpointing: bool) -> MicroBatch:
    """The second micro-batch of a minibatch: there are gradients of the first one."""
    attend = _Attention()
    given: dict[str, Any] = {
        "input_ids": torch.zeros(1, tokens, dtype=torch.int64, device="meta"),
        "position_ids": torch.zeros(1, tokens, dtype=torch.int64, device="meta"),
        "logits_to_keep": torch.zeros(trained, dtype=torch.int64, device="meta"),
        "lengths": (tokens,),
        "attend": attend,
        "use_cache": False,
    }
    for parameter in model.parameters():
        parameter.grad_dtype = state_dtype(parameter)
        parameter.grad = torch.empty_like(parameter, dtype=state_dtype(parameter))
    with blamed_on(
        model.config,
        f"{type(model).__name__} cannot be counted without weights, which does not say that it cannot be trained",
    ):
        with packed(model), torch.no_grad(), _account_of(model, given.values()) as evaluation:
            model(**given)
        calls = attend.calls
        with _account_of(model, given.values()) as account:
            at_the_embedding = _peak_at_the_embedding(model, account)
            with packed(model), recomputed_layers(model) if checkpointing else contextlib.nullcontext():
                logits = model(**given).logits.squeeze(0)
            kept, flops, moved = account.live, account.flops, account.moved
            loss = _Loss.apply(logits)
            del logits  # nobody has them in training, either
            loss.backward()
    if calls != model.config.get_text_config().num_hidden_layers:
        raise ValueError(
            f"{source(model.config)}: {type(model).__name__} cannot be trained on packed trajectories: expected "
            "attention in each of its layers"
        )
    size = trained * model.config.get_text_config().vocab_size * model.dtype.itemsize
    return MicroBatch(
        activations=kept - size,
        logits=size,
        inside=at_the_embedding[0],
        ending=account.peak,
        evaluated=evaluation.peak,
        forward_flops=flops,
        flops=account.flops,
        forward_moved=moved,
        moved=account.moved,
    )


def _account_of(model: PreTrainedModel, given: Iterable[object]) -> Account:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    inputs = [value for value in given if isinstance(value, Tensor)]
    return Account([*model.parameters(), *gradients, *model.buffers(), *inputs])


def _peak_at_the_embedding(model: PreTrainedModel, account: Account) -> list[int]:
    """Filled when the backward comes there; the peak of what follows begins anew."""
    peaks: list[int] = []

    def note(_: Tensor) -> None:
        peaks.append(account.peak)
        account.peak = account.live

    def watch(module: torch.nn.Module, given: object, output: Tensor) -> None:
        output.register_hook(note)

    model.get_input_embeddings().register_forward_hook(watch)
    return peaks


class Account(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still there, apart from the known ones."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.moved = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # kept, so that no other gets their addresses
        self._seen = {storage._cdata for storage in self._known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [one for one in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(one, Tensor)]
        for tensor in made:
            self._note(tensor.untyped_storage())
        if (count := flop_registry.get(function.overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        elif not function.is_view:
            self.moved += sum(tensor.nbytes for tensor in (*args, *made) if isinstance(tensor, Tensor))
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._seen:
            return
        self._seen.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size


class _Loss(torch.autograd.Function):
    """Like the policy loss: what it keeps is the gradient, which it has written over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits.detach())
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return ctx.saved_tensors[0]


class _Attention:
    """As the devices compute it, without a matrix of scores: the meta device would make one."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, **_: bool) -> Tensor:
        self.calls += 1
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, dropout_p=0.0, is_causal=True, scale=scale)[0]
