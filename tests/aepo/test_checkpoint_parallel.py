"""Checkpoints speak to the weights through the verbs of aepo/parallel.py: one process writes, all of them take part."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from checkpoint_toys import checkpoints, trained
from torch import Tensor
from transformers import PreTrainedModel

from aepo.parallel import OneProcess, Weights


class Gathered(OneProcess):
    """As one whose weights are in pieces: a whole one is there until the next one comes."""

    def __init__(self, *, is_main: bool = True) -> None:
        self.is_main = is_main
        self.calls: Counter[str] = Counter()

    def full_weights(self, model: PreTrainedModel) -> Weights:
        for names, tensor in super().full_weights(model):
            self.calls["weight"] += 1
            whole = tensor.detach().clone()
            yield names, whole
            whole.fill_(float("nan") if whole.is_floating_point() else -1)

    def state(self, *arguments: Any, **named: Any) -> dict[str, Tensor]:
        self.calls["state"] += 1
        return super().state(*arguments, **named)

    def load(self, model: PreTrainedModel, *arguments: Any) -> None:
        self.calls["load"] += 1
        OneProcess().load(model, *arguments)


def test_a_weight_may_be_gone_when_the_next_one_comes(tmp_path: Path) -> None:
    """Two widths: every one is read for the header, and for each of the widths."""
    toy, optimizer = trained(2, torch.bfloat16)
    toy.model.register_buffer("counts", torch.arange(3))
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    for directory, parallel in ((whole, OneProcess()), (pieces, Gathered())):
        checkpoints(directory, toy, optimizer, parallel=parallel).save(1, None)
    assert (whole / "step_000001" / "SHA256SUMS").read_text() == (pieces / "step_000001" / "SHA256SUMS").read_text()
    other, theirs = trained(0, torch.bfloat16, seed=1)
    other.model.register_buffer("counts", torch.zeros(3, dtype=torch.int64))
    checkpoints(pieces, other, theirs, parallel=Gathered()).load(1)
    assert other.model.counts.tolist() == [0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(toy.model.parameters(), other.model.parameters(), strict=True))


def test_a_process_that_does_not_write_calls_what_the_main_one_calls(tmp_path: Path) -> None:
    toy, optimizer = trained(2, torch.bfloat16)
    toy.model.register_buffer("counts", torch.arange(3))
    main, second = Gathered(), Gathered(is_main=False)
    path = checkpoints(tmp_path, toy, optimizer, parallel=main).save(1, None)
    before = {one: one.stat().st_mtime_ns for one in (tmp_path, *tmp_path.rglob("*"))}
    assert checkpoints(tmp_path, toy, optimizer, keep=1, parallel=second).save(1, None) == path
    checkpoints(tmp_path, toy, optimizer, keep=1, parallel=second).save(2, 0.5)
    assert {one: one.stat().st_mtime_ns for one in (tmp_path, *tmp_path.rglob("*"))} == before
    assert second.calls == main.calls + main.calls
    assert main.calls["state"] == 1
    before = main.calls.copy()
    checkpoints(tmp_path, toy, optimizer, parallel=main).load(1)
    checkpoints(tmp_path, toy, optimizer, parallel=second).load(1)
    assert second.calls - before - before == main.calls - before
    assert main.calls["load"] == 1
