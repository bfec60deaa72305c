"""EntropyProcessor: the exact entropy of every tracked token, recorded inside vLLM where the token is drawn.

vLLM has two model runners with two interfaces for logits processors. "v1" tells which rows of the batch have changed;
"v2", the default on GPUs, gives every request a slot and the layout of the batch on the device. One class serves both.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING

import numpy as np
import torch
import vllm
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor

from aepo.vllm.records import EntropyRecords
from aepo_kernels import decode_entropy

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor
except ImportError as error:
    raise ImportError(f"aepo.vllm needs vllm >=0.32,<0.34; found {vllm.__version__}") from error

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "aepo_key"
KEY_CHARACTERS = 256
# Every request of 1024 at 32,768 tokens each: 128 MiB at most, of the 10% of a GPU that vLLM leaves free by default.
DEFAULT_CAPACITY = 1 << 25


class EntropyProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Records the entropy [nats] of softmax(logits / temperature) over the whole vocabulary, before top-k and top-p.

    A request is tracked by SamplingParams(extra_args={"aepo_key": "<unique>"}); its own temperature counts, 1 where it
    is greedy. The logits are returned as they came. `capacity` tokens are kept at most, `additional_config={"aepo":
    {"capacity": tokens}}` of the engine.
    """

    def __init__(
        self, vllm_config: VllmConfig, state: LogitsProcRequestState | torch.device, is_pin_memory: bool = False
    ) -> None:
        if not (0, 32) <= vllm.__version_tuple__[:2] < (0, 34):
            raise ImportError(f"aepo.vllm needs vllm >=0.32,<0.34; found {vllm.__version__}")
        if vllm_config.parallel_config.enable_batch_sharded_sampling:
            raise ValueError(
                "enable_batch_sharded_sampling=True: every rank would record other tokens of a request; leave it off"
            )
        device = state if isinstance(state, torch.device) else state.device
        self.records = EntropyRecords(device, _capacity(vllm_config))
        self.runner = "v1" if isinstance(state, torch.device) else "v2"
        self.is_first = False  # set where the worker has moved this processor before those that change logits
        self._max_model_len = vllm_config.model_config.max_model_len
        self._pin_memory = is_pin_memory
        if not isinstance(state, torch.device):
            self._init_slots(state)

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """ValueError for a key that is no text, and for more than one sample: they would share it."""
        key = (params.extra_args or {}).get(KEY)
        if key is None:
            return
        if not isinstance(key, str) or not 0 < len(key) <= KEY_CHARACTERS or not is_text(key):
            raise ValueError(
                f"extra_args[{KEY!r}] must be a str of 1 to {KEY_CHARACTERS} characters; got {reprlib.repr(key)!a}"
            )
        if params.n != 1:
            raise ValueError(
                f"n must be 1 with extra_args[{KEY!r}]; got {params.n}: submit so many requests, each with its own key "
                "(prefix caching computes their prompt once)"
            )

    # v1: rows of the batch

    def is_argmax_invariant(self) -> bool:
        """No: vLLM leaves those out where the whole batch is greedy, and applies them after temperature."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests to their rows. Rows are taken over without a word about the request that was there."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.records.vacate(row)
        for row, params, prompt, outputs in batch_update.added:
            self._admit(row, params, len(prompt or ()), len(outputs), outputs)
        for source, target, direction in batch_update.moved:
            self.records.move(source, target, swap=direction is MoveDirectionality.SWAP)
        self.records.seen_running(self.records.slots)

    def _apply_rows(self, logits: Tensor) -> Tensor:
        """The output position is the length of the list that vLLM keeps: a prompt that comes in parts, or again after
        preemption, writes the same element until its token is drawn."""
        slots = self.records.slots
        places = [self.records.place(row) for row in range(len(logits))]
        if max(places) >= 0:
            temperatures = [slots[row].temperature if row in slots else 1.0 for row in range(len(logits))]
            decode_entropy(
                logits,
                torch.tensor(temperatures, pin_memory=self._pin_memory).to(logits.device, non_blocking=True),
                self.records.pool,
                torch.tensor(places, pin_memory=self._pin_memory).to(logits.device, non_blocking=True),
            )
        return logits

    # v2: slots, and the layout of the batch on the device

    def _init_slots(self, state: LogitsProcRequestState) -> None:
        from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor  # a kernel of the v2 runner comes with it

        self._state = state
        self._kind = np.zeros(state.max_num_reqs, dtype=np.int8)  # 0: untracked, 1: tracked, 2: its key was taken over
        # Per slot: what to add to a position to get its place, the first position that draws a token, the region's end.
        # A device reads these by itself, and vLLM keeps a copy for every step that is under way.
        self._places = UvaBackedTensor((state.max_num_reqs, 3), dtype=torch.int64)
        self._temperature = UvaBackedTensor(state.max_num_reqs, dtype=torch.float32)

    def add_request(self, slot: int, params: SamplingParams) -> bool:
        """A new request, or one that comes back after preemption with the tokens that it had. True: tracked."""
        prompt = int(self._state.prompt_len.np[slot])
        return self._admit(slot, params, prompt, int(self._state.prefill_len.np[slot]) - prompt)

    def apply_staged_writes(self) -> None:
        """Once per step, before the forward pass: where the slots write."""
        if not self.records.changed:
            return
        for slot in self.records.changed:
            self._kind[slot] = self._places.np[slot] = 0
            if self.records.is_current(slot):
                record = self.records.slots[slot]
                prompt, prefix = int(self._state.prompt_len.np[slot]), int(self._state.prefill_len.np[slot])
                self._places.np[slot] = record.start + 1 - prompt, prefix - 1, record.start + record.capacity
                self._kind[slot], self._temperature.np[slot] = 1, record.temperature
            elif slot in self.records.slots:
                self._kind[slot] = 2
        self.records.changed.clear()
        self._places.copy_to_uva()
        self._temperature.copy_to_uva()

    def _apply_slots(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Every row has its position, so rejected tokens of speculative decoding are written over. All on the device:
        whether anything is tracked at all is known on the host."""
        self.records.running = set(ctx.idx_mapping_np.tolist())
        kinds = self._kind[ctx.idx_mapping_np]
        if not kinds.any():
            return logits
        if (kinds == 2).any():
            self.records.seen_running(ctx.idx_mapping_np[kinds == 2].tolist())
        slots = ctx.expanded_idx_mapping
        offset, first, end = self._places.gpu[slots].unbind(1)
        place = ctx.pos + offset
        writes = (ctx.pos >= first) & (place < end)
        decode_entropy(logits, self._temperature.gpu[slots], self.records.pool, torch.where(writes, place, -1))
        return logits

    def apply(self, logits: Tensor, ctx: LogitsContext | None = None) -> Tensor:
        """logits [rows, V] float32, returned as they are; nothing is computed where no row is tracked."""
        if not self.records.slots:
            return logits
        return self._apply_rows(logits) if ctx is None else self._apply_slots(logits, ctx)

    def _admit(
        self, slot: int, params: SamplingParams, prompt: int, position: int, outputs: list[int] | None = None
    ) -> bool:
        """Whether the request that enters this slot is tracked."""
        key = (params.extra_args or {}).get(KEY)
        if key is None:
            self.records.vacate(slot)
            return False
        assert params.max_tokens is not None  # vLLM has filled it in
        record = self.records.admit(
            slot,
            key,
            capacity=min(params.max_tokens, self._max_model_len - prompt),
            temperature=params.temperature or 1.0,
            position=position,
            owner=params,
            outputs=outputs,
        )
        if record is not None and not self.is_first and _changes_logits(params):
            record.problem = (
                "its penalties or biases came before the processor: call entropy_status once before the first request"
            )
        return record is not None


def is_text(key: str) -> bool:
    """False: half of a surrogate pair is in it, which JSON can write and no message between vLLM's processes can."""
    return not any("\ud800" <= character <= "\udfff" for character in key)


def _changes_logits(params: SamplingParams) -> bool:
    names = ("presence_penalty", "frequency_penalty", "logit_bias", "allowed_token_ids", "bad_words", "min_tokens")
    return params.repetition_penalty != 1.0 or any(getattr(params, name) for name in names)


def _capacity(vllm_config: VllmConfig) -> int:
    settings = vllm_config.additional_config.get("aepo", {}) if isinstance(vllm_config.additional_config, dict) else {}
    if unknown := settings.keys() - {"capacity"}:
        raise ValueError(f"additional_config['aepo'] has unknown keys {sorted(unknown)}; it takes 'capacity'")
    capacity = settings.get("capacity", DEFAULT_CAPACITY)
    if type(capacity) is not int or capacity < 1:
        raise ValueError(f"additional_config['aepo']['capacity'] must be an int >= 1 (tokens); got {capacity!r}")
    return capacity
