"""Claims: the registered linear operations pass opcheck, and both public functions compile into one graph, with another
number of tokens without recompiling."""

import functools

import pytest
import torch
from linear_oracle import make_problem, policy_batch

from aepo_kernels import PolicyObjective, linear_logprobs_and_entropy, linear_loss, linear_policy_loss
from aepo_kernels.ops.call import PolicyCall

OPS = torch.ops.aepo
AEPO = PolicyObjective.preset("aepo", entropy_bonus=0.01)
PROBLEM = make_problem(12, 40, 4, bias=True)
OLD, ADVANTAGES, MASK = policy_batch(PROBLEM)
WEIGHT, BIAS = PROBLEM.weight, PROBLEM.bias
SCALARS = (0.7, 5.0, -100)  # temperature, softcap, ignore_index


def operations():
    here = (PROBLEM.hidden, WEIGHT, PROBLEM.labels, BIAS)
    _, entropy, maximum, log_sum = OPS.linear_token_stats(*here, None, 0, *SCALARS, False, None, None)
    coefficients = torch.randn(2, 12).unbind()
    wanted = [True, True, True]
    for dtype in (None, torch.bfloat16):
        yield f"linear_token_stats {dtype}", (*here, None, 0, *SCALARS, False, dtype, None)
        yield f"linear_token_stats {dtype} of a loss", (*here, None, 0, *SCALARS, True, dtype, None)
        of_logits = (maximum, log_sum, entropy, *coefficients)
        yield f"linear_grad {dtype}", (*here, *of_logits, None, False, wanted, *SCALARS, dtype, None)
    stats = torch.tensor([1.0, 0.5])
    call = PolicyCall(
        OLD,
        ADVANTAGES,
        MASK,
        None,
        None,
        None,
        None,
        None,
        stats,
        None,
        "token-mean",
        False,
        list(AEPO.numbers()),
        None,
    )
    for dtype in (None, torch.bfloat16):
        yield f"linear_policy_loss {dtype}", (*here, None, 0, False, wanted, 0.7, None, dtype, *call)
    yield "scaled_cast", (WEIGHT, torch.tensor(0.3), torch.bfloat16, None)


@pytest.mark.parametrize("case", [name for name, _ in operations()])
def test_opcheck(case):
    torch.library.opcheck(getattr(OPS, case.split()[0]).default, dict(operations())[case])


def stats(hidden, weight, bias, operand_dtype=None):
    labels = PROBLEM.labels[: len(hidden)]
    logprobs, entropy = linear_logprobs_and_entropy(hidden, weight, labels, bias, 0.7, 5.0, operand_dtype=operand_dtype)
    return (logprobs * entropy).sum()


def loss(schedule, operand_dtype=None):
    def run(hidden, weight, bias):
        n = len(hidden)
        inputs = (PROBLEM.labels[:n], OLD[:n], ADVANTAGES[:n], MASK[:n])
        return linear_policy_loss(
            hidden, weight, *inputs, objective=AEPO, bias=bias, entropy_stats=(1.0, 0.5), schedule=schedule,
            operand_dtype=operand_dtype,
        ).loss  # fmt: skip

    return run


def of_a_function(hidden, weight, bias):
    n = len(hidden)

    def loss_fn(logprobs, entropy):
        return -((logprobs - OLD[:n]).exp() * ADVANTAGES[:n] * MASK[:n]).sum() - entropy.sum()

    return linear_loss(hidden, weight, PROBLEM.labels[:n], MASK[:n], loss_fn, per_token=True, bias=bias).loss


FUNCTIONS = {"stats": stats, "keep": loss("keep"), "recompute": loss("recompute"), "a function": of_a_function}
FUNCTIONS |= {
    "stats of rounded operands": functools.partial(stats, operand_dtype=torch.float16),
    "keep of rounded operands": loss("keep", torch.bfloat16),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_compiles_into_one_graph_for_any_number_of_tokens(function):
    def run(f, tokens):
        leaves = [x.detach().clone().requires_grad_() for x in (PROBLEM.hidden[:tokens], WEIGHT, BIAS)]
        value = f(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for tokens in (12, 9):  # the second call makes the number dynamic
        run(compiled, tokens)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for got, expected in zip(run(compiled, 7), run(function, 7), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
