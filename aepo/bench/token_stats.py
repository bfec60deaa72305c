"""Log-prob and entropy of every token from logits, forward only: how close to one read of the logits?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from aepo.bench import peers
from aepo.bench.harness import BASELINE, OURS, Problem, Provider, max_error
from aepo.bench.inputs import (
    STATS,
    eager_stats,
    gate_rows,
    logsumexp_stats,
    make_labels,
    make_logits,
    piece_of,
    read_ceilings,
)
from aepo.bench.settings import LLAMA3, QWEN3, SMOLLM2, Settings
from aepo_kernels import logprobs_and_entropy

NOTE = """\
GB/s counts one read of the logits, whatever a provider really moves. Eager and compiled code works on a float32 copy of
the logits; TRL and verl work on the logits as stored, on the CPU: see their errors."""
CPU = [(512, QWEN3), (2048, SMOLLM2), (1, QWEN3)]
CUDA = [(8192, QWEN3), (8192, LLAMA3), (64, QWEN3)]
QUICK = (64, 32000)


def problems(settings: Settings) -> Iterator[Problem]:
    dtype, device = settings.dtype or torch.bfloat16, settings.device
    functions: list[tuple[str, str, Callable[..., Any]]] = [
        (OURS, STATS, logprobs_and_entropy),
        (BASELINE, STATS, eager_stats),
        ("torch.compile", STATS, torch.compile(eager_stats, dynamic=False)),
        ("torch.compile, logsumexp form", STATS, torch.compile(logsumexp_stats, dynamic=False)),
        *((peer.name, peer.computes, peers.function(peer)) for peer in peers.available("logits", device)),
    ]
    for tokens, vocab in settings.shapes(CPU, CUDA, QUICK):
        logits, labels = make_logits(tokens, vocab, dtype, device), make_labels(tokens, vocab, device)
        rows, part = gate_rows(tokens, device), piece_of(tokens, device)
        truth = eager_stats(logits[rows].double(), labels[rows])
        yield Problem(
            question="token-stats",
            title="log-prob + entropy of each token from logits",
            tokens=tokens,
            vocab=vocab,
            hidden=None,
            dtype=dtype,
            inputs=(logits, labels),
            gate_inputs=(logits, labels),
            error=functools.partial(stats_error, rows, truth),
            providers=[Provider(name, without_grad(function), computes) for name, computes, function in functions],
            ceilings=read_ceilings(logits),
            work=logits.numel() * logits.element_size(),
            unit="GB/s",
            piece=part and (logits[:part], labels[:part]),
            piece_share=(part or tokens) / tokens,
        )


def stats_error(rows: Tensor, truth: Sequence[Tensor], computes: str, outputs: Sequence[Tensor]) -> float:
    """Of some rows' log-prob, and entropy where it was computed."""
    return max_error([output[rows] for output in outputs], truth[: len(outputs)])


def without_grad(function: Callable[..., Any]) -> Callable[[Any], Sequence[Tensor]]:
    """A function of several arguments as a provider's: of one tuple, forward only."""

    def run(inputs: Any) -> Sequence[Tensor]:
        with torch.no_grad():
            return function(*inputs)

    return run
