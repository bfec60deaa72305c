"""After a loss or gradient came out as NaN or infinity: which tokens did it, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aepo.learning.batch import LossRows
from aepo.learning.forward import token_statistics

SHOWN = 5  # tokens per report
SHOWN_BEFORE = 12  # tokens in front of each


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a weight is not finite. The update that it came in is taken back."""


@torch.no_grad()
def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a NaN or an infinity; None: all are finite. One wait for the device."""
    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not named:
        return None
    # Smallest and largest are finite where all is: NaN goes through both. One read: 135 M float32 weights take 25 ms on
    # a core of an EPYC (Zen 4), isfinite().all() 400 ms.
    extremes = [torch.stack(tensor.detach().aminmax()).double() for _, tensor in named]
    finite = torch.stack(extremes).isfinite().all(1).tolist()
    return None if all(finite) else named[finite.index(False)][0]


def describe_tokens(
    model: PreTrainedModel,
    batch: LossRows,
    temperature: float,
    question_ids: Sequence[str],
    decode: Callable[[Sequence[int]], str],
) -> str:
    """One line per guilty token of the batch, the first `SHOWN`.

    Guilty is a trained token with a number that is not finite; where every number is finite and only a sum or a
    product of them overflowed, the tokens with the largest ratio times advantage.
    """
    logprobs, entropies = token_statistics(model, batch, temperature)
    ratio = (logprobs - batch.old_logprobs).exp()
    numbers = {
        "log-prob": logprobs,
        "entropy": entropies,
        "old log-prob": batch.old_logprobs,
        "old entropy": batch.entropies,
        "engine log-prob": batch.rollout_logprobs,
        "ratio": ratio,
        "advantage": batch.advantages,
    }
    if batch.ref_logprobs is not None:
        numbers["reference log-prob"] = batch.ref_logprobs
    finite = torch.stack([x.isfinite() for x in numbers.values()]).all(0)
    guilty = (~finite).nonzero().squeeze(1).tolist()
    heading = "tokens with a number that is not finite"
    if not guilty:
        heading = "every number of every token is finite; the largest products of ratio and advantage"
        size = (ratio * batch.advantages).abs()
        guilty = size.topk(min(SHOWN, len(size))).indices.tolist()
    lines = [_line(batch, row, numbers, question_ids, decode) for row in guilty[:SHOWN]]
    more = f"\n  and {len(guilty) - SHOWN} more" if len(guilty) > SHOWN else ""
    return f"{heading}:\n" + "\n".join(lines) + more


def is_finite(batch: LossRows) -> bool:
    """Whether every number that a loss gets of the trained tokens is finite."""
    given = (batch.old_logprobs, batch.rollout_logprobs, batch.entropies, batch.advantages, batch.ref_logprobs)
    return all(x is None or bool(x.isfinite().all()) for x in given)


def single_trajectories(batch: LossRows) -> Iterator[LossRows]:
    """The paths of a micro-batch, one by one, with everything that was computed for them."""
    positions, bounds = [0, *accumulate(batch.lengths)], batch.bounds.tolist()
    for n, length in enumerate(batch.lengths):
        ours = slice(bounds[n], bounds[n + 1])
        parts = {
            name: value[ours]
            for name in batch.__slots__
            if isinstance(value := getattr(batch, name), Tensor) and name not in ("input_ids", "position_ids", "bounds")
        }
        parts["rows"] = parts["rows"] - positions[n]
        for name in ("input_ids", "position_ids"):
            parts[name] = getattr(batch, name)[positions[n] : positions[n + 1]]
        of_one = torch.tensor([0, ours.stop - ours.start], device=batch.bounds.device)
        yield replace(batch, **parts, bounds=of_one, lengths=(length,), origins=(batch.origins[n],))


def _line(
    batch: LossRows,
    row: int,
    numbers: dict[str, Tensor],
    question_ids: Sequence[str],
    decode: Callable[[Sequence[int]], str],
) -> str:
    question, path = batch.origins[int(torch.searchsorted(batch.bounds, row, right=True)) - 1]
    position, label = int(batch.rows[row]), int(batch.labels[row])
    index = int(batch.position_ids[position]) + 1  # of the predicted token in its path
    before = decode(tuple(batch.input_ids[position - min(index, SHOWN_BEFORE) + 1 : position + 1].tolist()))
    values = ", ".join(f"{name} {x[row].item():.4g}" for name, x in numbers.items())
    place = f"question {question_ids[question]}, path {path}, token {index}"
    return f"  {place}: {decode([label])!r} (id {label}) after {before!r}: {values}"
