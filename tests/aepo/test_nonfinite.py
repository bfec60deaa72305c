"""Which token is named where a number is not finite: the first one of a trajectory is that trajectory's own."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from trainer_toys import tiny_model, trajectory

from aepo.advantages import Sample
from aepo.config import load_config
from aepo.learning.learner import Learner
from aepo.learning.nonfinite import NonFiniteError, describe_tokens, single_trajectories
from aepo.learning.pack_paths import pack
from aepo.parallel import OneProcess


def test_the_first_token_of_the_second_trajectory() -> None:
    model = tiny_model()
    paths = [trajectory([3], ([4, 5], [])), trajectory([6], ([7, 8], []))]
    samples = [Sample(q, q, path, (0.0, 1.0, 1.0)) for q, path in enumerate(paths)]
    batch = pack(samples, model.device, torch.float64)
    first = int(batch.bounds[1])
    batch.old_logprobs[first] = torch.nan
    said = describe_tokens(model, batch, 1.0, ["q0", "q1"], str)
    assert "question q1, path 1, token 1: '[7]' (id 7) after '(6,)'" in said
    assert "q0" not in said
    alone = [describe_tokens(model, single, 1.0, ["q0", "q1"], str) for single in single_trajectories(batch)]
    assert alone[0].startswith("every number of every token is finite")
    assert "question q1, path 1, token 1: '[7]'" in alone[1]


RARE = 49  # a token that one path alone reads


def own_loss(logprobs: Tensor, entropy: Tensor, batch: object) -> Tensor:
    return -(logprobs * batch.advantages).sum() / batch.tokens


def with_an_infinite_gradient(learner: Learner) -> None:
    """Of the row of RARE in the embedding, out of finite losses; of no other token's."""

    def embedded(module: torch.nn.Module, ids: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.masked_fill((ids[0] == RARE)[..., None], torch.inf))

    learner.model.get_input_embeddings().register_forward_hook(embedded)


@pytest.mark.parametrize("setting", ["policy.preset=aepo", f"policy.loss={__name__}:own_loss"])
@pytest.mark.parametrize("guilty", [0, 3, 5])
@pytest.mark.parametrize("tokens", [1000, 10], ids=["one micro-batch", "several"])
def test_the_path_with_a_gradient_that_is_not_finite_is_named_and_no_other(
    setting: str, guilty: int, tokens: int
) -> None:
    """Every path is tried with gradients of its own: those of the batch, and of the paths before, are not its fault."""
    config = load_config(overrides=[f"train.tokens_per_microbatch={tokens}", setting])
    learner = Learner(tiny_model(), config, str, OneProcess())
    paths = [trajectory([RARE if n == guilty else 1, 2, 3 + n], ([10 + n, 20], [])) for n in range(6)]
    samples = [Sample(n // 2, n % 2, path, (0.0, 0.0, 0.0, 1.0, -1.0)) for n, path in enumerate(paths)]
    batch = learner.pack_samples(samples, ["q0", "q1", "q2"])
    assert (len(batch.minibatches[0]) > 1) == (tokens == 10)
    with_an_infinite_gradient(learner)
    with pytest.raises(NonFiniteError, match=r"^the gradient norm is (inf|nan); every number of every token") as error:
        learner.update(1, batch)
    named = set(re.findall(r"question (\w+), path (\d+), ", str(error.value)))
    assert named == {(f"q{guilty // 2}", f"{guilty % 2}")}
