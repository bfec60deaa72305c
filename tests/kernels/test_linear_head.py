"""Claims: LinearHead is a Linear that keeps its parameters, and a fused operation inside it trains a sharded (FSDP2)
model as one process would (the cases of linear_head_cases.py, with 2 processes)."""

import functools

import pytest
import torch
from ranks import cases, run_in_processes

from aepo_kernels import LinearHead


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return functools.cache(lambda: run_in_processes(["linear_head_cases"], 2, tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("case", cases(["linear_head_cases"]))
def test_two_processes(case, failures):
    assert case not in failures(), failures()[case]


def test_it_is_the_linear_it_was_made_of():
    linear = torch.nn.Linear(4, 7)
    head = LinearHead.of(linear)
    hidden = torch.randn(3, 4)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert torch.equal(head(hidden), linear(hidden))
    assert head.state_dict().keys() == linear.state_dict().keys()
    assert head(hidden, lambda *args: [id(x) for x in args]) == [id(hidden), id(linear.weight), id(linear.bias)]
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear; got Embedding"):
        LinearHead.of(torch.nn.Embedding(7, 4))
