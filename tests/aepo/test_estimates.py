"""pass@k against every subset, intervals against resampling written out."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

from aepo.estimates import interval, pass_at_k


def by_all_subsets(samples: int, successes: int, k: int) -> float:
    outcomes = [index < successes for index in range(samples)]
    subsets = list(itertools.combinations(outcomes, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_success(samples: int) -> None:
    for successes, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        assert pass_at_k(samples, successes, k) == by_all_subsets(samples, successes, k)


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(5, 2, 2) == 0.7  # 10 pairs, 3 of them without a success
    assert pass_at_k(5, 4, 2) == 1.0  # there are not two failures
    assert pass_at_k(5, 0, 5) == 0.0


def test_pass_at_k_loses_no_digits_where_factorials_overflow() -> None:
    assert pass_at_k(10_000, 1, 1) == 1e-4
    assert pass_at_k(10_000, 1, 100) == 0.01
    assert pass_at_k(2000, 3, 1000) == pytest.approx(1 - 1000 * 999 * 998 / (2000 * 1999 * 1998), rel=1e-15)
    assert pass_at_k(10**6, 1, 1) == 1e-6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4, 1, 5), r"pass@5: expected 1 to 4 \(the number of samples\)"),
        ((4, 1, 0), r"pass@0: expected 1 to 4"),
        ((4, 5, 1), "successes = 5: expected 0 to 4"),
        ((4, -1, 1), "successes = -1: expected 0 to 4"),
    ],
)
def test_pass_at_k_refuses(arguments: tuple[int, int, int], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        pass_at_k(*arguments)


def test_an_interval_is_that_of_resampled_questions() -> None:
    draw = np.random.default_rng(3)
    values = draw.choice([0.0, 0.25, 1.0, 0.8], size=40)
    means = [draw.choice(values, size=len(values), replace=True).mean() for _ in range(20_000)]
    expected = np.quantile(means, [0.025, 0.975])
    np.testing.assert_allclose(interval(values, seed=0), expected, atol=0.012)  # 2.4 of its random errors
    low, high = interval(values, seed=0)
    assert low < values.mean() < high


def test_an_interval_of_many_questions_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).random(5_000)
    low, high = interval(values, seed=1)
    error = values.std() / math.sqrt(len(values))
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.1 * error)


def test_two_questions() -> None:
    assert interval([0.0, 1.0], seed=0) == (0.0, 1.0), "a quarter of the draws takes one of them twice"


def test_the_seed_decides() -> None:
    values = np.random.default_rng(0).random(30)
    assert interval(values, seed=5) == interval(values, seed=5)
    assert interval(values, seed=5) != interval(values, seed=6)


@pytest.mark.parametrize("values", [[], [0.7], [1.0, 1.0, 1.0]])
def test_where_resampling_cannot_tell(values: list[float]) -> None:
    assert interval(values, seed=0) is None


def test_an_interval_is_fast() -> None:
    start = time.process_time()
    interval([index % 9 / 8 for index in range(100_000)], seed=0)
    interval(np.random.default_rng(0).random(2000), seed=0)
    assert time.process_time() - start < 2
