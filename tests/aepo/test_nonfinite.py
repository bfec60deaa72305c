"""Which token is named where a number is not finite: the first one of a trajectory is that trajectory's own."""

from __future__ import annotations

import torch
from trainer_toys import tiny_model, trajectory

from aepo.advantages import Sample
from aepo.learning.nonfinite import describe_tokens, single_trajectories
from aepo.learning.pack_paths import pack


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
