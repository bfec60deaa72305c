"""The memory through which the blocks of a CUDA kernel merge the parts of a row (Workspace in cuda_kernels.h)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Workspace::kBytesPerBlock and kBlocksPerProcessor of csrc: 16 bytes of state and a ticket, for every resident block.
WORDS_PER_BLOCK = 5
BLOCKS_PER_PROCESSOR = 8


def workspace(device: torch.device, stream: int) -> Tensor:
    """Zeroed memory that no launch uses at the same time as one on `stream`, a handle of `device`'s current stream.

    Every launch leaves its tickets at zero, and launches on one stream follow each other, so one workspace per stream
    serves them all and is zeroed once. A launch that is being captured may be replayed on any stream, at any time: it
    gets memory of its own from the graph's pool, which the graph zeroes before it (a memset node of 21 KiB).
    """
    if torch.cuda.is_current_stream_capturing():
        return _allocate(device)
    return _of_stream(device, stream)


@functools.cache
def _of_stream(device: torch.device, stream: int) -> Tensor:
    return _allocate(device)


def _allocate(device: torch.device) -> Tensor:
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    with torch.inference_mode(False):  # it outlives the mode it is first needed in
        return torch.zeros(processors * BLOCKS_PER_PROCESSOR * WORDS_PER_BLOCK, dtype=torch.int32, device=device)
