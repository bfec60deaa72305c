"""Entropy of every row of logits [B, V] at decode time, by slot: the Triton twin of csrc/cuda/decode_entropy.cu.

The read is that of token_stats.py. It takes a second launch to merge rows that several programs share, where the CUDA
kernel needs one.
"""

# mypy: allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aepo_kernels.kernels.common import ACCESS_BYTES, LOG2E, MAX_PROGRAMS_PER_ROW, row_programs
from aepo_kernels.kernels.token_stats import (
    LANES,
    MAX_REGISTERS,
    NUM_WARPS,
    WORDS,
    merge_parts,
    part_state,
    row_result,
    store_part,
)


@triton.jit
def _slot_of(slots_ptr, row, num_slots):
    """(slot, whether anybody wants the row)."""
    slot = row.to(tl.int64)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row).to(tl.int64)
    return slot, (slot >= 0) & (slot < num_slots)


@triton.jit
def _inverse_temperature(temperatures_ptr, row, inv_temperature):
    """1 / temperature; NaN where that of the row is not > 0 and finite."""
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + row)
        valid = (temperature > 0) & (temperature < float("inf"))
        # At the ends of float32 the inverse would be 0 or inf, and beside a logit of -inf or the maximum NaN.
        temperature = tl.minimum(tl.maximum(temperature, 1e-37), 1e37)
        inv_temperature = tl.where(valid, 1 / temperature, float("nan"))
    return inv_temperature


@triton.jit
def _store_slot(
    row, slot, wanted, maximum, rest, weighted, logits_ptr, tokens_ptr, entropy_ptr, logprobs_ptr, stride, vocab,
    entropy_stride, logprobs_stride, inv_temperature,
):  # fmt: skip
    """Write the row's results, if they are wanted."""
    _, log_sum, entropy = row_result(rest, weighted)
    tl.store(entropy_ptr + slot * entropy_stride, entropy, mask=wanted)
    if tokens_ptr is not None:
        token = tl.load(tokens_ptr + row).to(tl.int64)
        inside = wanted & (token >= 0) & (token < vocab)
        x = tl.load(logits_ptr + row.to(tl.int64) * stride + token, mask=inside, other=float("nan")).to(tl.float32)
        tl.store(logprobs_ptr + slot * logprobs_stride, (x - maximum) * inv_temperature - log_sum, mask=wanted)


_SIZES = ["stride", "vocab", "num_slots", "entropy_stride", "logprobs_stride"]


@triton.jit(do_not_specialize=[*_SIZES, "tiles_per_program"])
def decode_entropy_kernel(
    logits_ptr,  # (B, V), 16-bit or float32
    temperatures_ptr,  # (B,) float32, or None
    slots_ptr,  # (B,) integers, or None
    tokens_ptr,  # (B,) integers, or None
    entropy_ptr,  # (N,)
    logprobs_ptr,  # (N,), or None
    partials_ptr,  # (B, programs, 3): the states of a split row, or None
    stride,
    vocab,
    num_slots,
    entropy_stride,
    logprobs_stride,
    inv_temperature,
    tiles_per_program,
    VEC: tl.constexpr,
    WORDS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program (row, part): the state of one part of one row; its results, if the row is not split."""
    row, part = tl.program_id(0), tl.program_id(1)
    slot, wanted = _slot_of(slots_ptr, row, num_slots)
    inverse = _inverse_temperature(temperatures_ptr, row, inv_temperature)
    length = tl.where(wanted, vocab, 0)  # nothing is read of a row that nobody wants
    maximum, rest, weighted = part_state(
        logits_ptr, row, part, stride, length, tiles_per_program, inverse * LOG2E, VEC, WORDS, LANES
    )
    if partials_ptr is None:
        _store_slot(
            row, slot, wanted, maximum, rest, weighted, logits_ptr, tokens_ptr, entropy_ptr, logprobs_ptr, stride,
            vocab, entropy_stride, logprobs_stride, inverse,
        )  # fmt: skip
    else:
        store_part(partials_ptr, row, part, maximum, rest, weighted)


@triton.jit(do_not_specialize=[*_SIZES, "programs"])
def merge_decode_kernel(
    logits_ptr,
    temperatures_ptr,
    slots_ptr,
    tokens_ptr,
    entropy_ptr,
    logprobs_ptr,
    partials_ptr,
    stride,
    vocab,
    num_slots,
    entropy_stride,
    logprobs_stride,
    inv_temperature,
    programs,
    MAX_PROGRAMS: tl.constexpr,
):
    """Program (row): the results of a split row from the states of its parts; arguments as in decode_entropy_kernel."""
    row = tl.program_id(0)
    slot, wanted = _slot_of(slots_ptr, row, num_slots)
    inverse = _inverse_temperature(temperatures_ptr, row, inv_temperature)
    maximum, rest, weighted = merge_parts(partials_ptr, row, programs, inverse * LOG2E, MAX_PROGRAMS)
    _store_slot(
        row, slot, wanted, maximum, rest, weighted, logits_ptr, tokens_ptr, entropy_ptr, logprobs_ptr, stride, vocab,
        entropy_stride, logprobs_stride, inverse,
    )  # fmt: skip


def decode_entropy(
    logits: Tensor,  # [B, V] float16, bfloat16 or float32, contiguous rows at any stride
    temperatures: Tensor | None,  # [B] float32
    temperature: float,
    slots: Tensor | None,  # [B] int32 or int64
    tokens: Tensor | None,  # [B] int32 or int64
    entropy: Tensor,  # [N] float32
    logprobs: Tensor | None,  # [N] float32
) -> None:
    """Fill entropy (and logprobs) by slot; the meaning is that of reference.decode_entropy.

    Deterministic. The number of programs that share a row depends on B, V and the GPU, and with it the last bits.
    """
    rows, vocab = logits.shape
    if rows == 0:
        return
    vec = ACCESS_BYTES // logits.element_size()
    programs, tiles_per_program = row_programs(logits, WORDS * LANES * vec)
    partials = logits.new_empty(rows, programs, 3, dtype=torch.float32) if programs > 1 else None
    arguments = (
        logits, temperatures, slots, tokens, entropy, logprobs, partials, logits.stride(0), vocab, len(entropy),
        entropy.stride(0), 0 if logprobs is None else logprobs.stride(0), 1 / temperature,
    )  # fmt: skip
    with torch.cuda.device_of(logits):
        decode_entropy_kernel[(rows, programs)](
            *arguments, tiles_per_program,
            VEC=vec, WORDS=WORDS, LANES=LANES, num_warps=NUM_WARPS, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        if partials is not None:
            merge_decode_kernel[(rows,)](*arguments, programs, MAX_PROGRAMS=MAX_PROGRAMS_PER_ROW, num_warps=1)
