"""AEPO loss from logits, forward and backward, on the CPU: time and memory of the part after the model's last layer.

python -m benchmarks.policy_loss_cpu             # three models' vocabularies, several minutes
python -m benchmarks.policy_loss_cpu --quick     # under a minute
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from aepo_kernels import PolicyObjective, logits_policy_loss, logprobs_and_entropy
from aepo_kernels.testing import make_labels, make_logits
from benchmarks import peers
from benchmarks.harness import Problem, Provider, arguments, report

EPILOG = """\
Every token counts here, although in an agent's batch most do not, and aepo_kernels skips those. GB/s counts two reads
and one write of the logits. "in place" writes the gradient over the logits. TRL and verl supply log-prob and entropy,
the loss on top of them is the same few lines of PyTorch as in the eager row. They get a float32 copy of the logits:
their log-probs of bfloat16 logits are bfloat16 too, and the loss made from those does not pass the gate.
"""
SHAPES = {"Qwen3": (512, 151936), "Llama 3": (512, 128256), "SmolLM2": (2048, 49152)}  # tokens, vocabulary
AEPO = PolicyObjective.preset("aepo")


@dataclasses.dataclass
class Inputs:
    logits: Tensor  # [T, V], overwritten by the in-place provider
    pristine: Tensor  # [T, V]
    labels: Tensor  # [T]
    old_logprobs: Tensor  # [T]
    advantages: Tensor  # [T]

    def restore(self) -> None:
        with torch.no_grad():
            self.logits.copy_(self.pristine)


def make_inputs(tokens: int, vocab: int, dtype: torch.dtype) -> Inputs:
    logits = make_logits(tokens, vocab, dtype=dtype)
    labels = make_labels(logits)
    g = torch.Generator().manual_seed(0)
    old_logprobs = logprobs_and_entropy(logits, labels)[0] + 0.3 * torch.randn(tokens, generator=g)
    return Inputs(logits.clone().requires_grad_(), logits, labels, old_logprobs, torch.randn(tokens, generator=g))


def plain(token_stats: peers.TokenStats) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    return lambda logits, labels, *rest: peers.aepo_loss(*token_stats(logits, labels), *rest)


def fused(inplace: bool) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, labels: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        mask = torch.ones_like(labels, dtype=torch.bool)
        return logits_policy_loss(
            logits, labels, old_logprobs, advantages, mask, objective=AEPO, inplace_backward=inplace, backend="cpu"
        ).loss

    return loss


def loss_and_grad(loss: Callable[..., Tensor], inputs: Inputs) -> Sequence[Tensor]:
    value = loss(inputs.logits, inputs.labels, inputs.old_logprobs, inputs.advantages)
    return value.detach(), torch.autograd.grad(value, inputs.logits)[0]


def problems(dtype: torch.dtype, quick: bool) -> Iterator[Problem]:
    for model, (tokens, vocab) in {"Qwen3, quick": (64, 151936)}.items() if quick else SHAPES.items():
        inputs, gate = make_inputs(tokens, vocab, dtype), make_inputs(16, vocab, dtype)
        exact = dataclasses.replace(gate, logits=gate.pristine.double().requires_grad_())
        size = inputs.logits.numel() * inputs.logits.element_size()
        yield Problem(
            name=f"{model}: AEPO loss, forward + backward, {dtype} [{tokens}, {vocab}]",
            inputs=inputs,
            gate_inputs=gate,
            truth=loss_and_grad(plain(peers.eager), exact),
            ideal_bytes=3 * size,
            logits=inputs.logits,
            restore=Inputs.restore,
        )


def main() -> None:
    args = arguments(__doc__, EPILOG).parse_args()
    torch.set_num_threads(args.threads)
    losses = {
        "aepo_kernels (cpu), in place": fused(inplace=True),
        "aepo_kernels (cpu)": fused(inplace=False),
        "eager": plain(peers.eager),
        "torch.compile": torch.compile(plain(peers.eager), dynamic=False),
        **{f"{name}, float32": plain(peers.in_float32(peer)) for name, peer in peers.installed().items()},
    }
    providers = [Provider(name, functools.partial(loss_and_grad, loss)) for name, loss in losses.items()]
    report(problems(getattr(torch, args.dtype), args.quick), providers, "eager", args)


if __name__ == "__main__":
    main()
