"""Cases for two ranks (tests/kernels/ranks.py): what a vocabulary sharded over a mesh gives is what one process gives.

11 entries over 2 ranks are parts of 6 and 5, as torchtitan's head has them.
"""

import contextlib
import dataclasses

import pytest
import torch
from ranks import Ranks
from titan_toys import VOCAB, build, entropy_stats, make_step, rl_package, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.distributed.spmd_types import set_current_spmd_mesh
from torchtitan.distributed.utils import get_spmd_backend, set_spmd_backend

rl_package()
from torchtitan.experiments.rl.losses import DAPOLoss  # noqa: E402

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums in another order
KINDS = {
    "aepo": {},
    "dapo": {"preset": "dapo"},
    "own": {"loss": "own:dapo"},
}


@contextlib.contextmanager
def backend(name):
    before = get_spmd_backend()
    set_spmd_backend(name)
    try:
        yield
    finally:
        set_spmd_backend(before)


def same(got, want, rank_part):
    """got: (loss, gradient in the rank's logits, metrics); want: those of one process."""
    torch.testing.assert_close(got[0], want[0], **CLOSE)
    torch.testing.assert_close(got[1], want[1][..., rank_part], **CLOSE)
    assert got[2].keys() == want[2].keys()
    for name, value in want[2].items():
        torch.testing.assert_close(got[2][name], value, **CLOSE)


def of_logits(loss, logits, step):
    """(loss, gradient in the logits, metrics), the logits not being a leaf."""
    leaf = logits.detach().requires_grad_()
    value, metrics = loss(leaf * 1, step.labels, step.tokens(), **step.inputs())
    value.backward()
    return value.detach(), leaf.grad, metrics


def losses(step):
    for name, config in KINDS.items():
        yield build(stats=entropy_stats(step) if name == "aepo" else None, **config)


def case_dtensor_with_a_sharded_vocabulary(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.world,), mesh_dim_names=("tp",))
    step = make_step()
    logits = step.head(step.hidden).detach()
    part = slice(0, 6) if ranks.rank == 0 else slice(6, VOCAB)
    with backend("partial_dtensor"):
        for loss in losses(step):
            want = of_logits(loss, logits, step)
            value, grad, metrics = of_logits(loss, distribute_tensor(logits, mesh, [Shard(2)]), step)
            assert grad.placements == (Shard(2),)
            same((value, grad.to_local(), metrics), want, part)
            value, grad, metrics = of_logits(loss, distribute_tensor(logits, mesh, [Replicate()]), step)
            same((value, grad.to_local(), metrics), want, slice(None))


def case_a_mesh_with_a_second_dimension(ranks: Ranks) -> None:
    """Data parallel beside the vocabulary, as one rank of each: the second dimension is the one that is cut."""
    mesh = init_device_mesh("cpu", (1, ranks.world), mesh_dim_names=("dp", "tp"))
    step = make_step()
    logits = step.head(step.hidden).detach()
    part = slice(0, 6) if ranks.rank == 0 else slice(6, VOCAB)
    with backend("partial_dtensor"):
        loss = build(preset="dapo")
        value, grad, metrics = of_logits(loss, distribute_tensor(logits, mesh, [Replicate(), Shard(2)]), step)
        same((value, grad.to_local(), metrics), of_logits(loss, logits, step), part)


def case_plain_shards_of_spmd_types(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.world,), mesh_dim_names=("tp",))
    step = make_step()
    logits = step.head(step.hidden).detach()
    part = slice(0, 6) if ranks.rank == 0 else slice(6, VOCAB)
    with backend("spmd_types"):
        for loss in losses(step):
            want = of_logits(loss, logits, step)
            with set_current_spmd_mesh(mesh):
                for _ in range(2):  # the second call knows where the parts begin
                    same(of_logits(loss, logits[..., part].contiguous(), step), want, part)


def case_a_second_vocabulary_has_parts_of_its_own(ranks: Ranks) -> None:
    """One loss, of two models: 11 entries as 6 and 5, then 9 as 5 and 4."""
    mesh = init_device_mesh("cpu", (ranks.world,), mesh_dim_names=("tp",))
    step = make_step()
    logits, loss = step.head(step.hidden).detach(), build(preset="dapo")
    with backend("spmd_types"):
        for entries, first in ((VOCAB, 6), (9, 5), (VOCAB, 6)):
            cut = dataclasses.replace(step, labels=step.labels.clamp(max=entries - 1))
            part = slice(0, first) if ranks.rank == 0 else slice(first, entries)
            want = of_logits(loss, logits[..., :entries].contiguous(), cut)
            with set_current_spmd_mesh(mesh):
                same(of_logits(loss, logits[..., part].contiguous(), cut), want, part)


def case_chunks_under_tensor_parallelism(ranks: Ranks) -> None:
    """torchtitan's chunks with a head whose rows are spread over the ranks, beside torchtitan's own loss."""
    mesh = init_device_mesh("cpu", (ranks.world,), mesh_dim_names=("tp",))
    step = make_step()
    step.labels[2, 1] = 0  # torchtitan's loss counts an ignored label
    stats, tokens = entropy_stats(step), step.tokens()
    want = {"aepo": run(build(stats=stats), step, tokens), "dapo": run(build(preset="dapo"), step, tokens)}
    ours = {"aepo": build(4, stats), "dapo": build(4, preset="dapo")}
    theirs = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=DAPOLoss.Config(ratio_clip_high=0.28)).build()
    with backend("partial_dtensor"):
        for name, loss in [*ours.items(), ("dapo", theirs)]:
            head = nn.Linear(step.hidden.shape[-1], VOCAB, bias=False)
            head.weight = nn.Parameter(distribute_tensor(step.head.weight.detach(), mesh, [Shard(0)]))
            loss.set_lm_head(head)
            hidden = distribute_tensor(step.hidden, mesh, [Replicate()]).requires_grad_()
            value, _ = loss(hidden, step.labels, tokens, **step.inputs())
            value.backward()
            torch.testing.assert_close(value.detach().full_tensor(), want[name][0], **CLOSE)  # replicated
            torch.testing.assert_close(hidden.grad.full_tensor(), want[name][1], **CLOSE)
            torch.testing.assert_close(head.weight.grad.full_tensor(), want[name][2], **CLOSE)


def case_other_placements_are_refused(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.world,), mesh_dim_names=("tp",))
    step = make_step()
    logits = step.head(step.hidden).detach()
    cut = distribute_tensor(logits, mesh, [Shard(1)])
    partial = DTensor.from_local(logits, mesh, [Partial()])
    for bad in (cut, partial):
        with pytest.raises(ValueError, match="logits must be replicated or have their vocabulary sharded"):
            of_logits(build(preset="dapo"), bad, step)
