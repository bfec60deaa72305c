"""Checkpoint tensors into the model of a running vLLM engine: first on trial, then for good.

vLLM reloads by layers: it puts a layer's tensors on the meta device, keeps what the loaders bring, and processes the
layer when it has seen as many elements as the layer has.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import CopyCounter
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.config import ModelConfig

FAR_BELOW = -(1 << 62)  # more elements than any layer has


def check_fit(model: Any, model_config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], ranks: int) -> None:
    """ValueError unless tensors of these names and shapes are all that vLLM's `model` loads. It is as before.

    The model's own loaders are run on meta tensors. Counting starts far below zero, so that no layer is processed, and
    finalizing puts the old tensors back. Loaders take their part of a tensor, and of one that is too large they take
    the first part without a word: one of `ranks` ranks of tensor parallelism has to take at least 1 / ranks.
    """
    name, shape = "", tuple[int, ...]()  # of the tensor that is being loaded

    def weights(counter: CopyCounter) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal name, shape
        for name, shape in shapes.items():
            before = counter.copied_numel
            yield name, torch.empty(shape, device="meta")
            taken = counter.copied_numel - before  # none by the ranks of other layers, or of other experts
            if 0 < taken * ranks < torch.Size(shape).numel():
                raise ValueError("it has more elements than the model takes")

    initialize_layerwise_reload(model)
    layers = [(path, layer, get_layerwise_info(layer)) for path, layer in model.named_modules()]
    for _, _, info in layers:
        info.load_numel = FAR_BELOW
    try:
        with CopyCounter() as counter:
            model.load_weights(weights(counter))
        tied = _is_tied(model_config)
        lacking = [path for path, layer, info in layers if _lacks(layer, info.load_numel - FAR_BELOW, tied)]
    except Exception as error:  # assertions, RuntimeError of narrow(), ValueError of names
        problem = f"{type(error).__name__}: {error}".rstrip(": ")
        raise ValueError(f"{name!r} of shape {[*shape]} does not fit the engine's model: {problem}") from error
    finally:
        for _, _, info in layers:
            info.loaded_weights.clear()
            info.load_numel = info.load_numel_total = 0
        finalize_layerwise_reload(model, model_config)
    if lacking:
        raise ValueError(f"the engine's model has tensors that are not there, in {', '.join(lacking)}")


def load(model: Any, model_config: ModelConfig, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Into the memory that the model has, so that captured CUDA graphs see the new weights."""
    initialize_layerwise_reload(model)
    try:
        with _converting_quietly():
            model.load_weights(weights)
        for layer in model.modules():
            info = get_layerwise_info(layer)
            if info.can_load() and info.load_numel == 0:  # rotary tables, a tied head: vLLM would warn every time
                info.load_numel_total = 0
    finally:
        finalize_layerwise_reload(model, model_config)
    if current_platform.is_cpu() and _is_tied(model_config):
        # vLLM 0.32 multiplies by a packed copy of the head there, and packs it again only if the head comes under its
        # own name. Without this the old head went on: log-probs of a two-layer model were off by 0.18.
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead):
                dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


@torch.inference_mode()
def clean_caches(model: torch.nn.Module) -> None:
    """Zero for every key and value that is not finite, left by weights that made some.

    A block that is given to a new request holds what the last one wrote, and attention multiplies what it masks by
    zero: NaN times zero is NaN, so one bad update would spoil answers under all later weights. Finite ones stay as they
    are, those of running requests, too.
    """
    for layer in model.modules():
        cache = getattr(layer, "kv_cache", None)
        if not isinstance(cache, torch.Tensor) or not cache.numel():
            continue
        if not cache.is_floating_point() or cache.itemsize == 1:  # 8 bits have no such reduction
            continue
        # Writing without looking would touch every page of a CPU's cache, also those that were never used.
        if not torch.stack([cache.amin(), cache.amax()]).isfinite().all():
            cache.nan_to_num_(0.0, 0.0, 0.0)


def _lacks(layer: torch.nn.Module, loaded: int, tied: bool) -> bool:
    """Whether a layer got less than a checkpoint holds. Vocabularies are padded and quantised layers have tensors of
    their own, so anything is enough there; scales of attention and a tied head need not come."""
    expected = sum(get_tensor_load_numel(parameter) for parameter in layer.parameters(recurse=False))
    if is_deferred_attention_layer(layer) or (tied and isinstance(layer, ParallelLMHead)):
        return False
    if isinstance(getattr(layer, "quant_method", None), (type(None), UnquantizedLinearMethod)):
        return loaded < expected
    return loaded == 0 < expected


def _is_tied(model_config: ModelConfig) -> bool:
    return bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))


@contextlib.contextmanager
def _converting_quietly() -> Iterator[None]:
    """vLLM warns of each tensor that it converts; training in float32 for an engine in bfloat16 is meant so."""

    def wanted(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Attempted to load weight %s with dtype")

    logger = logging.getLogger("vllm.model_executor.models.utils")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
