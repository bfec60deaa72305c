"""Packing: nothing is lost, shifted wrongly or trained that the model did not write; entropy statistics are exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer_toys import random_samples, trajectory

from aepo.advantages import Sample
from aepo.learning.batch import entropy_statistics
from aepo.learning.pack_paths import microbatches, pack


def test_by_hand() -> None:
    # prompt 1 2 3, the model writes 10 11, reads 7, writes 12; and a second path 4 | 13
    first = trajectory((1, 2, 3), ((10, 11), (7,)), ((12,), ()))
    first = replace(first, logprobs=(0, 0, 0, -1.0, -2.0, 0, -3.0), entropies=(0, 0, 0, 0.1, 0.2, 0, 0.3))
    second = replace(trajectory((4,), ((13,), ())), logprobs=(0, -4.0), entropies=(0, 0.4))
    batch = pack(
        [Sample(0, 0, first, (0, 0, 0, 0.5, 0.5, 0, 0.5)), Sample(0, 1, second, (0, -0.5))], dtype=torch.float64
    )
    assert batch.input_ids.tolist() == [1, 2, 3, 10, 11, 7, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert batch.lengths == (6, 1)
    assert batch.rows.tolist() == [2, 3, 5, 6]
    assert batch.labels.tolist() == [10, 11, 12, 13]
    assert batch.bounds.tolist() == [0, 3, 4]
    assert batch.old_logprobs.tolist() == [-1, -2, -3, -4]
    assert batch.entropies.tolist() == [0.1, 0.2, 0.3, 0.4]
    assert batch.advantages.tolist() == [0.5, 0.5, 0.5, -0.5]
    assert batch.origins == ((0, 0), (0, 1))


def test_every_generated_token_is_a_label_once_and_nothing_else_is() -> None:
    samples = random_samples(12)
    batch = pack(samples)
    written = [t for s in samples for t, g in zip(s.trajectory.token_ids, s.trajectory.generated, strict=True) if g]
    assert batch.labels.tolist() == written
    ends = {sum(batch.lengths[: n + 1]) - 1 for n in range(len(samples))}  # of paths: what comes next is of another one
    pairs = zip(batch.rows.tolist(), batch.labels.tolist(), strict=True)
    assert all(int(batch.input_ids[row + 1]) == label for row, label in pairs if row not in ends)
    assert ends < {*batch.rows.tolist()}, "every path ends with what the model wrote"
    assert len(batch.input_ids) == sum(len(s.trajectory.token_ids) - 1 for s in samples), "no padding"


@given(count=st.integers(0, 20), tokens=st.integers(1, 80), seed=st.integers(0, 50))
def test_microbatches_partition_the_samples_within_the_budget(count: int, tokens: int, seed: int) -> None:
    samples = random_samples(count, seed)
    batches = microbatches(samples, tokens)
    assert sorted((s.question, s.path) for batch in batches for s in batch) == [(s.question, s.path) for s in samples]
    for batch in batches:
        positions = sum(len(s.trajectory.token_ids) - 1 for s in batch)
        assert positions <= tokens or len(batch) == 1
    assert batches == microbatches(samples, tokens), "no randomness"


def test_entropy_statistics_are_those_of_all_trained_tokens() -> None:
    samples = random_samples(9)
    whole = pack(samples, dtype=torch.float64)
    values = whole.entropies
    parts = [pack(batch, dtype=torch.float64) for batch in microbatches(samples, 20)]
    assert len(parts) > 2
    assert entropy_statistics(parts) == pytest.approx((values.mean().item(), values.std().item()), rel=1e-14)


@pytest.mark.parametrize("value", [0.1, 5.567, 1e-8])
def test_equal_entropies_have_a_std_of_exactly_zero(value: float) -> None:
    path = trajectory((1,), ((2, 3, 4), ()))
    path = replace(path, entropies=(0.0, value, value, value))
    assert entropy_statistics([pack([Sample(0, 0, path, (0.0,) * 4)], dtype=torch.float64)]) == (value, 0.0)


def test_entropy_statistics_do_not_cancel() -> None:
    # E[H^2] - E[H]^2 in float32 gives 0 for entropies of 10.8 +- 1e-4.
    path = trajectory((1,), (range(2, 42), ()))
    path = replace(path, entropies=(0.0, *(10.8 + 1e-4 * (-1) ** i for i in range(40))))
    _, std = entropy_statistics([pack([Sample(0, 0, path, (0.0,) * 41)])])
    assert std == pytest.approx(1e-4 * (40 / 39) ** 0.5, rel=0.01)  # float32 keeps 10.8 to 1e-6
