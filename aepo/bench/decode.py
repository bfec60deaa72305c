"""Entropy while decoding, from [B, V] logits at every written token: what does it cost beside top-10 log-probs?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aepo.bench.harness import BASELINE, OURS, Problem, Provider, max_error
from aepo.bench.inputs import gate_rows, make_labels, make_logits, read_ceilings
from aepo.bench.settings import QWEN3, Settings
from aepo.bench.token_stats import without_grad
from aepo_kernels import backend as backends
from aepo_kernels import decode_entropy

NOTE = """\
GB/s counts one read of the logits. Top-10 log-probs are computed the way vLLM does for `logprobs=10`: log_softmax in
float32, topk, and the rank of the sampled token; code without exact entropies estimates them from such a list. On the
CPU small batches stay in its cache between calls, as they do after a model's last layer."""
CPU = [(b, QWEN3) for b in (1, 8, 64, 512)]
CUDA = [(b, QWEN3) for b in (1, 8, 64, 256, 512)]
QUICK = (8, 32000)
ENTROPY, BOTH, TOP10 = "entropy", "entropy + log-prob", "top-10 log-probs"


def eager_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor]:
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    return (-(log_p.exp() * log_p).sum(-1),)


def top10_logprobs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [B, 10] of the likeliest tokens, log-prob [B] and rank [B] of the sampled one."""
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    token = log_p.gather(-1, tokens[:, None])
    return log_p.topk(10, dim=-1).values, token[:, 0], (log_p >= token).sum(-1)


def stats_error(rows: Tensor, truth: Mapping[str, Sequence[Tensor]], computes: str, outputs: Sequence[Tensor]) -> float:
    return max_error([output[rows] for output in outputs], truth[computes])


def ours(
    stage: str, device: str, dtype: torch.dtype, computes: str, function: Callable[..., Any]
) -> list[tuple[str, str, Callable[..., Any]]]:
    """(name, what it computes, function) of the backend that is taken by itself and of every other kernel that serves:
    on a GPU Triton's beside that in CUDA C++. `function` takes the backend first."""
    probe = torch.zeros(1, dtype=dtype, device=device)
    usual = backends.resolve(None, probe, stage)
    others = [
        name
        for name in backends.BACKENDS
        if name not in ("reference", usual) and backends.unserved(name, probe, stage) is None
    ]
    named = [(OURS, usual), *((f"{OURS}, {name}", name) for name in others)]
    return [(name, computes, functools.partial(function, backend)) for name, backend in named]


def problems(settings: Settings) -> Iterator[Problem]:
    dtype, device = settings.dtype or torch.float32, settings.device
    functions = [
        *ours("decode_entropy", device, dtype, ENTROPY, lambda backend, x, t: (decode_entropy(x, backend=backend),)),
        (f"{OURS}, with log-prob of the token", BOTH, lambda x, t: decode_entropy(x, tokens=t)),
        (BASELINE, ENTROPY, eager_entropy),
        ("torch.compile", ENTROPY, torch.compile(eager_entropy, dynamic=False)),
        ("top-10 log-probs, eager", TOP10, top10_logprobs),
    ]
    for batch, vocab in settings.shapes(CPU, CUDA, QUICK):
        logits, tokens = make_logits(batch, vocab, dtype, device), make_labels(batch, vocab, device)
        rows = gate_rows(batch, device)
        (entropy,) = eager_entropy(logits[rows].double(), tokens[rows])
        top10 = top10_logprobs(logits[rows].double(), tokens[rows])
        truth = {ENTROPY: (entropy,), BOTH: (entropy, top10[1]), TOP10: top10}
        yield Problem(
            question="decode",
            title="entropy while decoding",
            tokens=batch,
            vocab=vocab,
            hidden=None,
            dtype=dtype,
            inputs=(logits, tokens),
            gate_inputs=(logits, tokens),
            error=functools.partial(stats_error, rows, truth),
            providers=[Provider(name, without_grad(function), computes) for name, computes, function in functions],
            ceilings=read_ceilings(logits),
            work=logits.numel() * logits.element_size(),
            unit="GB/s",
        )
