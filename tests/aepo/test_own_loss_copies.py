"""A loss of the user's own may write into what it gets: neither the next optimiser step nor a metric sees it."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from test_own_loss import HERE, IDS, gspo_and_kl, learner_for
from torch import Tensor
from trainer_toys import random_samples

from aepo.learning.batch import Update
from aepo.own_loss import LossBatch

TENSORS = ("old_logprobs", "old_entropy", "advantages", "rollout_logprobs", "ref_logprobs", "cu_seqlens")


def updated(written: str | None) -> tuple[Update, list[dict[str, Tensor]]]:
    """Two epochs of several micro-batches with a loss that overwrites this field, and what it got each time."""
    given: list[dict[str, Tensor]] = []

    def loss(logprobs: Tensor, entropy: Tensor, batch: LossBatch) -> Tensor:
        given.append({name: getattr(batch, name).clone() for name in TENSORS})
        if written is not None:
            getattr(batch, written).zero_()
        return gspo_and_kl(logprobs, entropy, replace(batch, **given[-1]))

    learner = learner_for(HERE + "gspo_and_kl", "policy.reference=true", "train.epochs=2", tokens=40)
    learner.own_loss = loss
    batch = learner.add_log_probs(learner.pack_samples(random_samples(10), IDS))
    return learner.update(1, batch), given


def test_all_tensors_of_a_batch_are_tried() -> None:
    assert {field.name for field in fields(LossBatch) if "Tensor" in str(field.type)} == set(TENSORS)


@pytest.mark.parametrize("name", TENSORS)
def test_what_a_loss_writes_into_its_batch_is_gone_at_the_next_step(name: str) -> None:
    update, given = updated(name)
    (truth, _) = updated(None)
    assert len(given) == 2 * len(truth.metrics[0]) > 4
    for first, second in zip(given[: len(given) // 2], given[len(given) // 2 :], strict=True):
        assert first[name].any()
        assert all(first[field].equal(second[field]) for field in TENSORS)
    assert update == truth, "metrics and norms of both optimiser steps"
