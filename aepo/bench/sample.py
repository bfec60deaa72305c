"""Sampling a token while decoding: token, its log-prob and the entropy, against the token alone elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from aepo.bench.decode import ours
from aepo.bench.harness import BASELINE, Problem, Provider, max_error
from aepo.bench.inputs import gate_rows, make_logits, read_ceilings
from aepo.bench.settings import QWEN3, Settings
from aepo.bench.token_stats import without_grad
from aepo_kernels import sample_with_entropy

NOTE = """\
GB/s counts one read of the logits. The first table draws from all tokens, the second from the 50 likeliest within a
mass of 0.95. Sorting is how samplers without a kernel of their own find those. Gate: no drawn token is outside the set,
and log-probs and entropies, where given, are float64's."""
CPU = [(b, QWEN3) for b in (1, 64)]
CUDA = [(b, QWEN3) for b in (1, 64, 256)]
QUICK = (8, 32000)
TOP_K, TOP_P = 50, 0.95
TOKEN, ALL = "token", "token, log-prob, entropy"


Functions = list[tuple[str, str, Callable[..., Any]]]


def sampled(backend: str, logits: Tensor, **filters: Any) -> tuple[Tensor, Tensor, Tensor]:
    drawn = sample_with_entropy(logits, seed=0, **filters, backend=backend)
    return drawn.tokens, drawn.logprobs, drawn.entropy


def eager(logits: Tensor) -> tuple[Tensor]:
    return (torch.multinomial(torch.softmax(logits, dim=-1), 1)[:, 0],)


def eager_with_stats(logits: Tensor, draw: Callable[[Tensor], tuple[Tensor]] = eager) -> tuple[Tensor, Tensor, Tensor]:
    """And log-prob and entropy of all tokens, as `ours`."""
    log_p = torch.log_softmax(logits, dim=-1)
    (tokens,) = draw(logits)
    return tokens, log_p.gather(-1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def kept_by_sorting(logits: Tensor) -> Tensor:
    """The logits with -inf outside the top-k and top-p set."""
    ordered, index = logits.sort(dim=-1, descending=True)
    p = torch.softmax(ordered, dim=-1)
    outside = p.cumsum(-1) - p >= TOP_P
    outside[:, TOP_K:] = True
    return torch.full_like(logits, -torch.inf).scatter(1, index, ordered.masked_fill(outside, -torch.inf))


def eager_sorted(logits: Tensor) -> tuple[Tensor]:
    return eager(kept_by_sorting(logits))


def error(logits: Tensor, filtered: bool, computes: str, outputs: Sequence[Tensor]) -> float:
    """Infinite where a token is outside the set, else that of log-probs and entropies; of some rows."""
    rows = gate_rows(len(logits), logits.device.type)
    exact = logits[rows].double()
    tokens, *rest = (output[rows] for output in outputs)
    if filtered:
        least = kept_by_sorting(exact).nan_to_num(neginf=torch.inf).amin(-1)  # ties with the least are inside as well
        if bool((exact.gather(1, tokens[:, None])[:, 0] < least).any()):
            return torch.inf
    return max_error(rest, eager_with_stats(exact, lambda _: (tokens,))[1:]) if rest else 0.0


def problems(settings: Settings) -> Iterator[Problem]:
    dtype, device = settings.dtype or torch.float32, settings.device
    plain: Functions = [
        *ours("sample_with_entropy", device, dtype, ALL, sampled),
        (BASELINE, TOKEN, eager),
        ("eager with log-prob and entropy", ALL, eager_with_stats),
    ]
    filtered: Functions = [
        *ours("sample_with_entropy", device, dtype, ALL, functools.partial(sampled, top_k=TOP_K, top_p=TOP_P)),
        (BASELINE, TOKEN, eager_sorted),
        ("eager with log-prob and entropy", ALL, functools.partial(eager_with_stats, draw=eager_sorted)),
    ]
    for batch, vocab in settings.shapes(CPU, CUDA, QUICK):
        logits = make_logits(batch, vocab, dtype, device)
        for which, functions in (("all tokens", plain), (f"top {TOP_K}, mass {TOP_P}", filtered)):
            yield Problem(
                question="sample",
                title=f"a token drawn from {which}",
                tokens=batch,
                vocab=vocab,
                hidden=None,
                dtype=dtype,
                inputs=(logits,),
                gate_inputs=(logits,),
                error=functools.partial(error, logits, functions is filtered),
                providers=[Provider(name, without_grad(function), computes) for name, computes, function in functions],
                ceilings=read_ceilings(logits),
                work=logits.numel() * logits.element_size(),
                unit="GB/s",
            )
