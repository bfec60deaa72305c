"""Bytes of a training run on one device: what each parameter costs, what a micro-batch adds, how many tokens fit."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedConfig

from aepo.config import Config
from aepo.doctor.account import MicroBatch, count_micro_batch
from aepo.learning.optimizer import ELEMENTS
from aepo.models.key_values import KeyValueShape
from aepo.models.outline import blamed_on, number_of_parameters, outline

PROCESS = 436_000_000
"""Python with torch, transformers and this library, before there is a model."""

HEAP = 1.85
"""Times what a micro-batch allocates, a process of the CPU takes: glibc keeps freed pieces of the many sizes of a
backward. Measured at 1.3 to 2.3 with models of 14 and 38 million parameters; with MALLOC_MMAP_THRESHOLD_=65536, which
gives every tensor back, at 1.04, and a step takes 8.9 seconds of the CPU instead of 7.1 (docs/memory.md)."""

PREFILL_TOKENS = 8192  # of one forward of the transformers engine


@dataclass(frozen=True)
class ParameterBytes:
    """What a dtype of `model.dtype` costs for each parameter that is trained."""

    weights: int
    gradients: int
    masters: int
    moments: int

    @property
    def host_copy(self) -> int:
        """All that an update changes, so that a failed one can be taken back."""
        return self.weights + self.masters + self.moments

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments


def parameter_bytes(dtype: torch.dtype) -> ParameterBytes:
    """Weights of 16 bits have gradients, masters and moments of 32."""
    size = dtype.itemsize
    wide = max(size, 4)
    return ParameterBytes(size, wide, wide if size < wide else 0, 2 * wide)


@dataclass(frozen=True)
class Workload:
    """What a run asks of a model. Every path is taken to be as long as it may be, all after the prompt as trained."""

    tokens: int  # of a micro-batch
    questions: int
    paths: int  # of a question
    prompt: int  # tokens
    written: int  # tokens
    passes: int  # over a rollout batch
    steps: int  # of the optimizer in a pass

    @classmethod
    def of(cls, config: Config, prompt: int) -> Workload:
        train, rollout = config.train, config.rollout
        return cls(
            tokens=train.tokens_per_microbatch,
            questions=train.questions,
            paths=rollout.paths,
            prompt=prompt,
            written=rollout.max_tokens,
            passes=train.epochs,
            steps=train.minibatches,
        )

    @property
    def path(self) -> int:
        return self.prompt + self.written

    @property
    def packed(self) -> int:
        """Tokens of a rollout batch."""
        return self.questions * self.paths * self.path

    def trained(self, tokens: int) -> int:
        return max(1, tokens * self.written // self.path)


@dataclass(frozen=True)
class Plan:
    """What is compared: each is a setting."""

    dtype: torch.dtype
    checkpointing: bool
    reference: bool


@dataclass(frozen=True)
class Place:
    """Memory that a model is trained in: of a GPU, or of a machine without one."""

    name: str
    kind: Literal["cpu", "cuda"]
    size: float  # bytes


class Model:
    """What its configuration alone tells. ValueError, in one line: it cannot be trained here."""

    def __init__(self, config: PreTrainedConfig) -> None:
        whole = outline(config, torch.float32)
        self.config = config
        with blamed_on(config, "expected a model with an embedding and a head"):
            self.parameters = number_of_parameters(whole)
            self.largest = max(parameter.numel() for parameter in whole.parameters())
            for part in (whole.get_output_embeddings(), whole.get_input_embeddings()):
                assert part.weight is not None
        self.micro_batch = functools.cache(self._micro_batch)

    def _micro_batch(self, dtype: torch.dtype, tokens: int, trained: int, checkpointing: bool) -> MicroBatch:
        return count_micro_batch(self.config, dtype, tokens=tokens, trained=trained, checkpointing=checkpointing)

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of one token."""
        return KeyValueShape.of(self.config).per_token * dtype.itemsize


@dataclass(frozen=True)
class Need:
    """Bytes of a plan for `tokens` packed tokens in a micro-batch."""

    weights: int
    gradients: int
    state: int  # masters and moments
    reference: int
    host_copy: int
    activations: int
    logits: int
    backward: int  # beside both, where it takes most
    cache: int  # keys and values of the rollouts
    rollout: int  # with what a prefill takes beside them; the trainer's activations are not there then
    step: dict[str, int]  # what AdamW takes beside its state, by the kind of the place

    def device(self, kind: Literal["cpu", "cuda"]) -> int:
        """Of the trainer and the transformers engine, without the copy on the host."""
        micro_batch = (HEAP if kind == "cpu" else 1) * (self.activations + self.logits + self.backward)
        standing = self.weights + self.state + self.reference
        update = self.gradients + max(micro_batch, self.step[kind])  # gradients are gone when the next rollout begins
        return standing + round(max(update, self.rollout))

    @property
    def host(self) -> int:
        """Beside a GPU."""
        return self.host_copy + PROCESS

    @property
    def cpu(self) -> int:
        """Where the host is the device."""
        return self.device("cpu") + self.host


def need(model: Model, plan: Plan, work: Workload, config: Config, tokens: int | None = None) -> Need:
    """tokens: in place of those of the workload."""
    tokens = tokens or work.tokens
    each, count = parameter_bytes(plan.dtype), model.parameters
    batch = model.micro_batch(plan.dtype, tokens, work.trained(tokens), plan.checkpointing)
    cache = prefill = 0
    if config.rollout.engine == "huggingface":
        rows = work.questions * work.paths
        # A column for every token in the working set of all rows, and each computed token once in the tree.
        kept = rows * work.path + work.questions * work.prompt + rows * work.written
        cache = kept * model.cache_bytes(plan.dtype)
        prefill = batch.evaluated * min(PREFILL_TOKENS, work.questions * work.prompt) // tokens
    wide = max(plan.dtype.itemsize, 4)
    return Need(
        weights=each.weights * count,
        gradients=each.gradients * count,
        state=(each.masters + each.moments) * count,
        reference=each.weights * count if plan.reference else 0,
        host_copy=each.host_copy * count,
        activations=batch.activations,
        logits=batch.logits,
        backward=batch.peak - batch.activations - batch.logits,
        cache=cache,
        rollout=cache + prefill,
        # One parameter after the other; so many at once.
        step={"cpu": 2 * wide * model.largest, "cuda": wide * max(model.largest, min(count, ELEMENTS))},
    )


def taken(one: Need, model: Model, plan: Plan, config: Config, place: Place) -> float:
    """Bytes of the place, those of vLLM included where it runs there."""
    vllm = 0.0
    if config.rollout.engine == "vllm" and not config.vllm.endpoints:
        if place.kind == "cuda":
            vllm = config.vllm.gpu_memory_utilization * place.size
        else:
            size = getattr(torch, config.vllm.dtype).itemsize if config.vllm.dtype else plan.dtype.itemsize
            vllm = config.vllm.replicas * (size * model.parameters + config.vllm.kv_cache_gib * 2**30 + PROCESS)
    return vllm + (one.device("cuda") if place.kind == "cuda" else one.cpu)


STEP = 64  # tokens, of what is found to fit


def largest_micro_batch(model: Model, plan: Plan, work: Workload, config: Config, place: Place) -> int:
    """The most packed tokens of a micro-batch that fit there; 0: not even a sixteenth of those asked for.

    The need is convex in the tokens, a maximum of straight lines: what is found on a chord is never too much.
    """

    def at(tokens: int) -> float:
        return taken(need(model, plan, work, config, tokens), model, plan, config, place)

    low, high = work.tokens, 16 * work.tokens
    if at(low) > place.size:
        low, high = max(work.tokens // 16, 1), low
        if at(low) > place.size:
            return 0
    if at(high) <= place.size:
        return high
    found = low + int((high - low) * (place.size - at(low)) / (at(high) - at(low)))
    return max(found // STEP * STEP, low)
