"""The settings of warm_start where they act: in the supervised training of a tiny model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from trainer_toys import tiny_model

from aepo.config import WarmStartConfig
from aepo.models.small import imitate

EXAMPLE = ([1, 2, 3, 4], [-100, -100, 3, 4])


def counted(drawn: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    for count in itertools.count(1):
        drawn[:] = [count]
        yield EXAMPLE


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_decides_which_demonstrator_is_followed(share: float) -> None:
    careful: list[int] = []
    hasty: list[int] = []
    steps: list[tuple[int, int]] = []
    config = WarmStartConfig(steps=4, batch_tokens=128, careful_share=share)
    imitate(tiny_model(), config, counted(careful), counted(hasty), lambda step, of, loss: steps.append((step, of)))
    assert (bool(careful), bool(hasty)) == (share > 0, share < 1)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("rate", [1e-3, 8e-3])
def test_the_first_step_has_a_twentieth_of_the_peak_rate(rate: float) -> None:
    """AdamW's first step moves every weight that has a gradient by the rate itself."""
    model = tiny_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    imitate(model, WarmStartConfig(steps=1, batch_tokens=128, peak_rate=rate), counted([]), counted([]))
    moved = torch.cat([(p.detach() - b).abs().flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert moved.max().item() == pytest.approx(rate / 20, rel=1e-3)
