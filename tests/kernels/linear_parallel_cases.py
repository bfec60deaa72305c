"""Claims about the linear operations over a sharded vocabulary, each checked by every rank (ranks.py): values and all
gradients are those of the call without a group, with hidden states on all ranks or sharded by tokens; one collective
forward and one backward (peers take two to four), plus the gathering of the hidden states where they are sharded."""

from functools import partial

import pytest
import torch
from ranks import BACKENDS, collectives
from vocab_parallel_cases import VOCAB, shard

from aepo_kernels import PolicyObjective, linear_logprobs_and_entropy, linear_loss, linear_policy_loss
from aepo_kernels.objective import PRESETS
from aepo_kernels.ops import linear, rows
from aepo_kernels.testing import assert_within_budget

TOKENS, SIZE = 12, 16  # a multiple of 2 and 3 ranks
STATS = {"entropy_stats": (2.0, 0.7)}


def make_head(dtype, tokens=TOKENS):
    """hidden [T, D], weight [V, D], bias [V], labels [T]: logits spread over several nats."""
    g = torch.Generator().manual_seed(0)
    draws = [torch.randn(*shape, generator=g).to(dtype) for shape in ((tokens, SIZE), (VOCAB, SIZE), (VOCAB,))]
    return *draws, torch.randint(VOCAB, (tokens,), generator=g)


def of_rank(ranks, hidden, weight, bias, sequence_parallel):
    """This rank's leaves and the keywords that say so."""
    part, tokens = ranks.part(VOCAB), len(hidden) // ranks.world
    own = hidden[ranks.rank * tokens :][:tokens] if sequence_parallel else hidden
    leaves = [x.detach().clone().requires_grad_() for x in (own, weight[part], bias[part])]
    return leaves, shard(ranks) | {"sequence_parallel": sequence_parallel}


def own_grads(ranks, grads, sequence_parallel):
    """What this rank's gradients must be, from those of the whole tensors."""
    hidden, weight, bias = grads
    tokens, part = len(hidden) // ranks.world, ranks.part(VOCAB)
    return hidden[ranks.rank * tokens :][:tokens] if sequence_parallel else hidden, weight[part], bias[part]


def statistics(leaves, labels, backend, **group):
    """Outputs and gradients of linear_logprobs_and_entropy with ignored labels."""
    hidden, weight, bias = leaves
    labels = labels.masked_fill(torch.arange(len(labels)) % 5 == 1, -100)
    outputs = linear_logprobs_and_entropy(hidden, weight, labels, bias, 0.8, 7.0, **group, backend=backend)
    coefficients = [torch.linspace(-1, 2, len(labels)).to(outputs[0].dtype) + i for i in range(2)]
    return outputs, torch.autograd.grad(outputs, leaves, coefficients)


def policy_batch(tokens=TOKENS):
    g = torch.Generator().manual_seed(1)
    old, advantages, ref = torch.randn(3, tokens, generator=g, dtype=torch.float64)
    mask = torch.arange(tokens) % 4 != 2
    return (old - 3, advantages, mask), {"cu_seqlens": torch.tensor([0, 1, 5, tokens]), "ref_logprobs": ref - 3}


def policy(leaves, labels, objective, tokens=TOKENS, **settings):
    hidden, weight, bias = leaves
    batch, others = policy_batch(tokens)
    labels = labels.where(batch[-1], -7)  # tokens that do not count may have any label
    if not objective.kl_coef:
        del others["ref_logprobs"]
    out = linear_policy_loss(
        hidden, weight, labels, *batch, objective=objective, bias=bias, temperature=0.8, **others, **settings
    )
    return out, torch.autograd.grad(0.3 * out.loss, leaves)


def case_linear_logprobs_and_entropy(ranks):
    *whole, labels = make_head(torch.float64)
    for backend in BACKENDS:
        leaves = [x.clone().requires_grad_() for x in whole]
        outputs, grads = statistics(leaves, labels, backend)
        for sequence_parallel in (False, True):
            leaves, group = of_rank(ranks, *whole, sequence_parallel)
            ours, own = statistics(leaves, labels, backend, **group)
            expected = (*outputs, *own_grads(ranks, grads, sequence_parallel))
            for x, y in zip((*ours, *own), expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)
            same = ours if sequence_parallel else (*ours, own[0])
            assert all(torch.equal(x, other) for x in same for other in ranks.gather(x.detach()))


def case_linear_in_16_bits_is_as_exact_as_in_one_process(ranks):
    """Truth is float64; the budget is twice the error of the single process, which sums in float32 and rounds once."""
    *whole, labels = make_head(torch.bfloat16)
    true, true_grads = statistics([x.double().requires_grad_() for x in whole], labels, "reference")
    single, single_grads = statistics([x.clone().requires_grad_() for x in whole], labels, None)
    for sequence_parallel in (False, True):
        leaves, group = of_rank(ranks, *whole, sequence_parallel)
        ours, own = statistics(leaves, labels, None, **group)
        for name, x, y, z in zip(("logprobs", "entropy"), ours, true, single, strict=True):
            assert_within_budget(name, x, y.detach(), z.detach(), scale=10)
        cut = (own_grads(ranks, grads, sequence_parallel) for grads in (true_grads, single_grads))
        for name, x, y, z in zip(("hidden", "weight", "bias"), own, *cut, strict=True):
            assert_within_budget(name, x, y, z, scale=y.abs().max())


def case_linear_with_rounded_operands_is_what_16_bit_tensors_give(ranks):
    """Bit for bit, but for the last rounding of the gradients; the sum over ranks is one of float32 in both."""
    hidden, weight, bias, labels = make_head(torch.float32)
    bias = bias.bfloat16().float()
    settings = {"objective": PolicyObjective.preset("aepo"), **STATS}
    for sequence_parallel in (False, True):
        leaves, group = of_rank(ranks, hidden, weight, bias, sequence_parallel)
        rounded = [x.detach().bfloat16().requires_grad_() for x in leaves]
        given = group | {"operand_dtype": torch.bfloat16}
        runs = [partial(statistics, labels=labels, backend=None)]
        runs += [partial(policy, labels=labels, schedule=s, **settings) for s in ("keep", "recompute")]
        for run in runs:
            (ours, grads), (expected, narrow) = run(leaves, **given), run(rounded, **group)
            assert torch.equal(ours[0], expected[0])
            assert all(x.dtype == torch.float32 for x in grads)
            assert all(torch.equal(x.bfloat16(), y) for x, y in zip(grads, narrow, strict=True))
            assert any((x.bfloat16() != x).any() for x in grads)


def case_linear_policy_loss(ranks):
    *whole, labels = make_head(torch.float64)
    objectives = [PolicyObjective.preset(name) for name in PRESETS]
    objectives += [PolicyObjective.preset("aepo", entropy_bonus=0.05, kl_coef=0.1)]
    for backend in BACKENDS:
        for objective in objectives:
            can_keep = objective.ratio_level == "token"
            stats = STATS if objective.entropy_advantage else {}
            for settings in ({"schedule": "recompute"}, *([{"schedule": "keep", **stats}] if can_keep else [])):
                settings = settings | {"backend": backend}
                out, grads = policy([x.clone().requires_grad_() for x in whole], labels, objective, **settings)
                for sequence_parallel in (False, True):
                    leaves, group = of_rank(ranks, *whole, sequence_parallel)
                    ours, own = policy(leaves, labels, objective, **settings, **group)
                    torch.testing.assert_close(ours, out, rtol=1e-11, atol=1e-13)
                    for x, y in zip(own, own_grads(ranks, grads, sequence_parallel), strict=True):
                        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


def case_linear_loss_of_a_function(ranks):
    *whole, labels = make_head(torch.float64)
    (old, advantages, mask), _ = policy_batch()
    labels = labels.where(mask, -7)

    def loss_fn(logprobs, entropy):
        gate = torch.sigmoid(3 * ((logprobs - old).exp() - 1))
        return -((gate * advantages)[mask].sum() + 0.1 * entropy[mask].square().sum()), {"gate": gate[mask].mean()}

    def run(leaves, **settings):
        hidden, weight, bias = leaves
        out = linear_loss(hidden, weight, labels, mask, loss_fn, per_token=True, bias=bias, softcap=7.0, **settings)
        return out, torch.autograd.grad(0.3 * out.loss, leaves)

    expected, grads = run([x.clone().requires_grad_() for x in whole], schedule="recompute")
    for settings in [{"schedule": s, "backend": b} for s in ("keep", "recompute") for b in BACKENDS]:
        for sequence_parallel in (False, True):
            leaves, group = of_rank(ranks, *whole, sequence_parallel)
            ours, own = run(leaves, **settings, **group)
            torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)
            for x, y in zip(own, own_grads(ranks, grads, sequence_parallel), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


def case_linear_in_float16_is_scaled_before_it_is_rounded(ranks):
    """A loss over 200,000 tokens and its loss scale: rounded before it, nearly half of the gradients would be 0."""
    *whole, labels = make_head(torch.float16)
    batch, _ = policy_batch()

    def grads(leaves, **settings):
        hidden, weight, bias = leaves
        aepo = PolicyObjective.preset("aepo", entropy_bonus=0.05)
        loss = linear_policy_loss(
            hidden, weight, labels, *batch, objective=aepo, bias=bias, denominator=200_000, **STATS, **settings
        ).loss
        return torch.autograd.grad(65536 * loss, leaves)

    truth = grads([x.double().requires_grad_() for x in whole], backend="reference")
    for sequence_parallel in (False, True):
        leaves, group = of_rank(ranks, *whole, sequence_parallel)
        for schedule in ("keep", "recompute"):
            ours = grads(leaves, schedule=schedule, **group)
            for x, y in zip(ours, own_grads(ranks, truth, sequence_parallel), strict=True):
                assert (x.double() - y).norm() <= 5e-4 * y.norm(), schedule


def case_linear_collectives(ranks):
    """The keep schedule merges statistics once per chunk and has nothing left to do backward."""
    tokens = 2 * TOKENS
    *whole, labels = make_head(torch.float32, tokens)
    aepo = PolicyObjective.preset("aepo")
    gather, reduce, scatter = "c10d::allgather_", "c10d::allreduce_", "c10d::reduce_scatter_"
    counted, tiling = int(policy_batch(tokens)[0][-1].sum()), linear.TILING["cpu"]
    linear.TILING["cpu"] = tiling._replace(keep=(8, 4096))
    chunks = -(-counted // 8)
    assert chunks > 1

    def logprobs(leaves, group):
        return linear_logprobs_and_entropy(*leaves[:2], labels, **group)[0].sum()

    def loss(leaves, group, **settings):
        batch, _ = policy_batch(tokens)
        hidden, weight, _ = leaves
        return linear_policy_loss(hidden, weight, labels, *batch, objective=aepo, **group, **settings).loss

    for sequence_parallel in (False, True):
        leaves, group = of_rank(ranks, *whole, sequence_parallel)
        hidden, total = ([gather], scatter) if sequence_parallel else ([], reduce)
        calls = {
            "statistics": partial(logprobs, leaves, group),
            "recompute": partial(loss, leaves, group, schedule="recompute"),
            "keep": partial(loss, leaves, group, schedule="keep", **STATS),
        }
        for name, call in calls.items():
            keep = name == "keep"
            assert collectives(call) == hidden + ([gather] * chunks + [total] if keep else [gather]), name
            assert collectives(call().backward) == ([] if keep else [total]), name
    linear.TILING["cpu"] = tiling


def case_linear_frozen_weight_and_nothing_to_do(ranks):
    *whole, labels = make_head(torch.float32)
    for sequence_parallel in (False, True):
        (hidden, weight, _), group = of_rank(ranks, *whole, sequence_parallel)
        logprobs, _ = linear_logprobs_and_entropy(hidden, weight.detach(), labels, **group)
        logprobs.sum().backward()
        assert hidden.grad.shape == hidden.shape
        logprobs, _ = linear_logprobs_and_entropy(hidden.detach(), weight, labels, **group)
        assert collectives(logprobs.sum().backward) == []

        empty = hidden.detach()[:0].requires_grad_()
        logprobs, entropy = linear_logprobs_and_entropy(empty, weight, labels[:0], **group)
        (logprobs.sum() + entropy.sum()).backward()
        assert empty.grad.shape == (0, SIZE)
        (old, advantages, mask), _ = policy_batch()
        for settings in ({"schedule": "keep", **STATS}, {"schedule": "recompute"}):
            batch, aepo = (old, advantages, torch.zeros_like(mask)), PolicyObjective.preset("aepo")
            loss = linear_policy_loss(hidden, weight, labels, *batch, objective=aepo, **settings, **group).loss
            assert loss.item() == 0
            assert torch.autograd.grad(loss, hidden)[0].eq(0).all()


def case_linear_misplaced_label_and_tokens_that_do_not_add_up(ranks):
    *whole, labels = make_head(torch.float32)
    (hidden, weight, _), group = of_rank(ranks, *whole, True)
    wrong = labels.index_fill(0, torch.tensor([5]), VOCAB)
    with pytest.raises(ValueError, match=rf"label {VOCAB} must be in the vocabulary part of exactly one rank"):
        linear_logprobs_and_entropy(hidden, weight, wrong, **group)
    shape = rf"labels must have shape \({TOKENS},\) like the tokens of all {ranks.world} ranks; got \({TOKENS - 1},\)"
    with pytest.raises(ValueError, match=shape):
        linear_logprobs_and_entropy(hidden, weight, labels[1:], **group)


def case_linear_operations_pass_opcheck_with_a_group(ranks):
    hidden, weight, _, labels = make_head(torch.float32)
    part, group = ranks.part(VOCAB), ranks.group.group_name
    local = labels - part.start
    settings = (0.8, None, rows.NO_LABEL)
    here = (hidden, weight[part], local, None)
    stats = torch.ops.aepo.linear_token_stats(*here, group, part.start, *settings, False, None, None)
    coefficients = (*stats[2:], stats[1], stats[0], None)
    for name, *args in (
        ("gather_tokens", hidden, group),
        ("linear_token_stats", *here, group, part.start, *settings, True, torch.bfloat16, None),
        ("linear_grad", *here, *coefficients, group, True, [True, True, False], *settings, torch.bfloat16, None),
    ):
        torch.library.opcheck(getattr(torch.ops.aepo, name).default, tuple(args))


def case_linear_compiles_into_one_graph(ranks):
    if ranks.world > 2:
        return  # seconds of compiler in every process, and nothing new
    *whole, labels = make_head(torch.float32)
    batch, settings = policy_batch()[0], {"objective": PolicyObjective.preset("aepo"), "schedule": "keep", **STATS}

    def loss(hidden, weight, group):
        logprobs, entropy = linear_logprobs_and_entropy(hidden, weight, labels, **group)
        total = linear_policy_loss(hidden, weight, labels, *batch, **settings, **group)
        return (logprobs + 0.1 * entropy).sum() + total.loss

    for sequence_parallel in (False, True):
        leaves, group = of_rank(ranks, *whole, sequence_parallel)
        expected = torch.autograd.grad(loss(*leaves[:2], group), leaves[:2])
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for x, y in zip(torch.autograd.grad(compiled(*leaves[:2], group), leaves[:2]), expected, strict=True):
            assert torch.equal(x, y)
