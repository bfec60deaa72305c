"""Log-prob and entropy of every token from logits, forward only, on the CPU: how close to one read of the logits?

python -m benchmarks.token_stats_cpu             # three models' vocabularies, a few minutes
python -m benchmarks.token_stats_cpu --quick     # under a minute
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from aepo_kernels import logprobs_and_entropy
from aepo_kernels.testing import eager_token_stats, make_labels, make_logits
from benchmarks import peers
from benchmarks.harness import Problem, Provider, arguments, report

EPILOG = """\
Columns: GB/s counts one read of the logits, whatever a provider really moves. "x one read" compares with PyTorch's
fastest reader over a buffer of that size. Eager and compiled code works on a float32 copy of the logits, TRL and verl
on the logits as stored: see the error column. The last shape is one decoding step, in cache.
"""
SHAPES = {  # tokens, vocabulary
    "Qwen3": (512, 151936),
    "Llama 3": (512, 128256),
    "SmolLM2": (2048, 49152),
    "Qwen3, one row": (1, 151936),
}


def problems(dtype: torch.dtype, quick: bool) -> Iterator[Problem]:
    for model, (tokens, vocab) in {"Qwen3, quick": (64, 151936)}.items() if quick else SHAPES.items():
        inputs = [(x := make_logits(n, vocab, dtype=dtype), make_labels(x)) for n in (tokens, 16)]
        truth = eager_token_stats(*inputs[1], dtype=torch.float64)
        logits = inputs[0][0]
        yield Problem(
            name=f"{model}: log-prob + entropy of {dtype} [{tokens}, {vocab}]",
            inputs=inputs[0],
            gate_inputs=inputs[1],
            truth=(truth.logprobs, truth.entropy),
            ideal_bytes=logits.numel() * logits.element_size(),
            logits=logits,
        )


def call(function: peers.TokenStats, inputs: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
    return function(*inputs)


def main() -> None:
    args = arguments(__doc__, EPILOG).parse_args()
    torch.set_num_threads(args.threads)
    functions: dict[str, peers.TokenStats] = {
        "aepo_kernels (cpu)": lambda logits, labels: logprobs_and_entropy(logits, labels, backend="cpu"),
        "eager": peers.eager,
        "torch.compile": torch.compile(peers.eager, dynamic=False),
        "torch.compile, logsumexp form": torch.compile(peers.logsumexp_form, dynamic=False),
        **peers.installed(),
    }
    providers = [Provider(name, functools.partial(call, function)) for name, function in functions.items()]
    with torch.no_grad():
        report(problems(getattr(torch, args.dtype), args.quick), providers, "eager", args)


if __name__ == "__main__":
    main()
