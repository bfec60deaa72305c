"""Claims: operations over a sharded vocabulary (the cases of two modules, with 2 and 3 processes); arguments that do
not fit raise an error that names them."""

import functools

import pytest
import torch
import torch.distributed as dist
from ranks import cases, run_in_processes

from aepo_kernels import entropy_from_logits, linear_logprobs_and_entropy, logprobs_and_entropy
from aepo_kernels.ops.vocab_parallel import shard_of

MODULES = ("vocab_parallel_cases", "linear_parallel_cases")


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """World size -> what failed, from one set of processes each."""
    return functools.cache(lambda world: run_in_processes(MODULES, world, tmp_path_factory.mktemp(f"{world}_ranks")))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", cases(MODULES))
def test_case(case, world, failures):
    assert case not in failures(world), failures(world)[case]


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (
            None,
            ValueError,
            "process_group needs vocab_start, the id of the first vocabulary entry that this rank holds",
        ),
        (-1, ValueError, "vocab_start must be >= 0; got -1"),
        (1.0, TypeError, "vocab_start must be an int; got float"),
        (True, TypeError, "vocab_start must be an int; got bool"),
    ],
)
def test_vocab_start_must_be_given_and_fit(start, error, message, group):
    with pytest.raises(error, match=message):
        shard_of(group, start)


def test_group_arguments_are_not_ignored():
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="vocab_start=0 has a meaning only together with process_group; got none"):
        logprobs_and_entropy(logits, labels, vocab_start=0)
    with pytest.raises(ValueError, match="sequence_parallel=True needs process_group"):
        linear_logprobs_and_entropy(logits, logits, labels, sequence_parallel=True)
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup; got str"):
        entropy_from_logits(logits, process_group="tensor")
