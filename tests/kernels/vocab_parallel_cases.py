"""Claims about sharded vocabularies, each checked by every rank (ranks.py): within the error budget of the whole row
against float64 truth, and in float64 equal to the call without a group; the special values of the single-process form
keep their meaning where they lie on one rank; one all-gather forward, none backward; the same bits on all ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import BACKENDS, Ranks, collectives

from aepo_kernels import (
    PolicyObjective,
    entropy_from_logits,
    logits_loss,
    logits_policy_loss,
    logprobs_and_entropy,
    selective_log_softmax,
)
from aepo_kernels import backend as backends
from aepo_kernels.objective import PRESETS
from aepo_kernels.testing import DTYPES, REGIMES, assert_within_budget, eager_token_stats, make_labels, make_logits

VOCAB = 301


def shard(ranks, vocab=VOCAB):
    return {"process_group": ranks.group, "vocab_start": ranks.part(vocab).start}


def of_rank(ranks, logits):
    """This rank's logits as a leaf, contiguous as a model's head makes them."""
    return logits[..., ranks.part(logits.shape[-1])].contiguous().requires_grad_()


def check_against_truth(ranks, logits, labels, temperature, backend):
    """As in test_token_stats.py, with the same budgets."""
    g = torch.Generator().manual_seed(1)
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights = [torch.randn(logits.shape[:-1], generator=g, dtype=acc) for _ in range(2)]
    x = of_rank(ranks, logits)
    logprobs, entropy = logprobs_and_entropy(x, labels, temperature, **shard(ranks, logits.shape[-1]), backend=backend)
    torch.autograd.backward((logprobs, entropy), weights)

    truth = eager_token_stats(logits, labels, temperature, *weights, dtype=torch.float64)
    eager = eager_token_stats(logits, labels, temperature, *weights)
    part = ranks.part(logits.shape[-1])
    assert logprobs.dtype == entropy.dtype == acc
    assert x.grad.dtype == logits.dtype
    log_vocab = math.log(logits.shape[-1]) + 1
    assert_within_budget("logprobs", logprobs, truth.logprobs, eager.logprobs, scale=log_vocab)
    assert_within_budget("entropy", entropy, truth.entropy, eager.entropy, scale=log_vocab)
    scale = (weights[0].abs() + weights[1].abs() * log_vocab).double() / temperature
    assert_within_budget("grad", x.grad, truth.grad[:, part], eager.grad[:, part], scale=scale[:, None])


def case_every_regime_against_float64_truth(ranks):
    for backend in BACKENDS:
        for dtype in DTYPES:
            for regime in REGIMES:
                logits = make_logits(5, 2053, regime, dtype)
                check_against_truth(ranks, logits, make_labels(logits), 0.7, backend)


def case_triton(ranks):
    if backends.missing("triton") is None:
        logits = make_logits(2, 2053)
        check_against_truth(ranks, logits, make_labels(logits), 0.7, "triton")


def case_labels_at_the_borders(ranks):
    # 301 // 3 = 100: label 0 is -100 when counted from the second rank's first entry, and must not be ignored there.
    borders = sorted({0, VOCAB - 1, *(c + d for c in ranks.cuts(VOCAB)[1:-1] for d in (-1, 0, 1))})
    logits = make_logits(len(borders), VOCAB, dtype=torch.float64)
    for backend in BACKENDS:
        check_against_truth(ranks, logits, torch.tensor(borders), 1.0, backend)


def case_the_single_process_result_in_float64(ranks):
    """Ignored labels, entropy and log-prob alone, more than one leading dimension, rows without a common stride."""
    logits = make_logits(24, VOCAB, dtype=torch.float64).view(2, 12, VOCAB)
    labels = make_labels(logits.flatten(0, 1)).view(2, 12)[:, :-1]
    ignoring = labels.masked_fill(torch.arange(11) % 4 == 1, 7)

    def run(x, backend, **group):
        x = x.detach().requires_grad_()
        rows = x[:, :-1]
        logprobs, entropy = logprobs_and_entropy(rows, ignoring, 0.8, 7, **group, backend=backend)
        alone = selective_log_softmax(rows, labels, 1.3, **group, backend=backend)
        group.pop("vocab_start", None)
        entropies = entropy_from_logits(rows, **group, backend=backend)
        outputs = (logprobs, entropy, alone, entropies)
        torch.autograd.backward(outputs, [torch.full_like(y, i + 1.0) for i, y in enumerate(outputs)])
        return *outputs, x.grad

    part = ranks.part(VOCAB)
    for backend in BACKENDS:
        *expected, grad = run(logits, backend)
        for x in (of_rank(ranks, logits), logits[..., part]):
            for ours, whole in zip(run(x, backend, **shard(ranks)), (*expected, grad[..., part]), strict=True):
                torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-14)


def case_a_rank_without_any_finite_logit(ranks):
    logits = make_logits(4, VOCAB)
    for masked in range(ranks.world):
        cuts = ranks.cuts(VOCAB)
        x = logits.clone()
        x[:2, cuts[masked] : cuts[masked + 1]] = -torch.inf
        labels = make_labels(x)
        for backend in BACKENDS:
            check_against_truth(ranks, x, labels, 0.7, backend)
            on_it = torch.full_like(labels, cuts[masked])
            logprobs = selective_log_softmax(of_rank(ranks, x), on_it, **shard(ranks), backend=backend)
            assert logprobs[:2].isneginf().all()
            assert logprobs[2:].isfinite().all()


def case_an_undefined_row_is_nan_everywhere_and_alone(ranks):
    logits = make_logits(5, VOCAB)
    labels = make_labels(logits)
    labels[2] = -100  # even the log-prob of an ignored token reports it

    def run(x, backend):
        x = of_rank(ranks, x)
        logprobs, entropy = logprobs_and_entropy(x, labels, **shard(ranks), backend=backend)
        (logprobs.sum() + entropy.sum()).backward()
        return logprobs.detach(), entropy.detach(), x.grad

    others = torch.arange(5) != 2
    for backend in BACKENDS:
        clean = run(logits, backend)
        for at, value in ((0, torch.nan), (VOCAB - 1, torch.nan), (VOCAB - 1, torch.inf), (slice(None), -torch.inf)):
            dirty = logits.clone()
            dirty[2, at] = value
            for got, expected in zip(run(dirty, backend), clean, strict=True):
                assert got[2].isnan().all()
                assert torch.equal(got[others], expected[others])


def policy_problem(dtype):
    logits = make_logits(15, VOCAB, dtype=dtype)
    labels = make_labels(logits)
    g = torch.Generator().manual_seed(0)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    near = torch.log_softmax(logits.to(acc), -1).gather(-1, labels[:, None])[:, 0]
    old, ref, advantages = ((near + 0.4 * torch.randn(15, generator=g)).to(acc) for _ in range(3))
    mask = torch.rand(15, generator=g) < 0.7
    # Rows that do not count are not read, on no rank: NaN logits and impossible labels.
    logits[~mask], labels[~mask] = torch.nan, -7
    others = {"old_logprobs": old, "advantages": advantages - near, "mask": mask, "ref_logprobs": ref}
    return logits, labels, others | {"cu_seqlens": torch.tensor([0, 3, 4, 9, 15])}


def case_logits_policy_loss(ranks):
    logits, labels, others = policy_problem(torch.float64)
    ref = others.pop("ref_logprobs")
    objectives = [(PolicyObjective.preset(name), {}) for name in PRESETS if not PolicyObjective.preset(name).kl_coef]
    objectives += [(PolicyObjective.preset(name, kl_coef=0.1), {"ref_logprobs": ref}) for name in PRESETS]
    objectives += [(PolicyObjective.preset("aepo", entropy_bonus=0.05), {})]

    def run(x, objective, **settings):
        x = x.detach().clone().requires_grad_()
        out = logits_policy_loss(x, labels, **others, objective=objective, temperature=0.8, **settings)
        out.loss.backward()
        return out, x.grad

    for backend in BACKENDS:
        for objective, given in objectives:
            whole, grad = run(logits, objective, **given, backend=backend)
            ours, part = run(of_rank(ranks, logits), objective, **given, **shard(ranks), backend=backend)
            torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(part, grad[:, ranks.part(VOCAB)], rtol=1e-12, atol=1e-14)
            assert part[~others["mask"]].eq(0).all()


def case_logits_loss_of_a_function(ranks):
    logits, labels, others = policy_problem(torch.float64)
    old, advantages, mask = (others[name] for name in ("old_logprobs", "advantages", "mask"))

    def loss_fn(logprobs, entropy):
        gate = torch.sigmoid(3 * ((logprobs - old).exp() - 1))
        return -((gate * advantages)[mask].sum() + 0.1 * entropy[mask].square().sum()), {"gate": gate[mask].mean()}

    def run(x, **settings):
        x = x.detach().clone().requires_grad_()
        out = logits_loss(x, labels, mask, loss_fn, temperature=0.8, **settings)
        out.loss.backward()
        return out, x.grad

    for backend in BACKENDS:
        whole, grad = run(logits, backend=backend)
        for inplace in (False, True):
            ours, part = run(of_rank(ranks, logits), backend=backend, inplace_backward=inplace, **shard(ranks))
            torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(part, grad[:, ranks.part(VOCAB)], rtol=1e-12, atol=1e-14)


def case_a_single_pass_is_refused(ranks):
    logits, labels, others = policy_problem(torch.float64)
    del others["ref_logprobs"]
    with pytest.raises(ValueError, match="needs the whole vocabulary on this rank; got a process_group"):
        logits_policy_loss(
            of_rank(ranks, logits), labels, **others, objective=PolicyObjective(), single_pass=True, **shard(ranks)
        )


def case_in_place_gives_the_same_bits_over_the_same_memory(ranks):
    logits, labels, others = policy_problem(torch.bfloat16)
    del others["ref_logprobs"]
    for backend in BACKENDS:
        grads = []
        for inplace in (False, True):
            leaf = of_rank(ranks, logits)
            x = leaf * 1
            loss = logits_policy_loss(
                x,
                labels,
                **others,
                objective=PolicyObjective.preset("aepo", entropy_bonus=0.01),
                inplace_backward=inplace,
                **shard(ranks),
                backend=backend,
            ).loss
            loss.backward()
            grads.append(leaf.grad)
        assert torch.equal(grads[0], grads[1])
        assert torch.equal(x.detach(), grads[1])


def case_all_ranks_get_the_same_bits(ranks):
    logits = make_logits(50, VOCAB, dtype=torch.bfloat16)
    labels = make_labels(logits)
    backend = BACKENDS[ranks.rank % len(BACKENDS)]  # whatever serves each rank
    for x in logprobs_and_entropy(of_rank(ranks, logits), labels, **shard(ranks), backend=backend):
        assert all(torch.equal(x, other) for other in ranks.gather(x.detach()))


def case_one_collective_forward_and_none_backward(ranks):
    logits, labels, others = policy_problem(torch.float32)
    del others["ref_logprobs"]
    x = of_rank(ranks, logits)
    calls = {
        "logprobs_and_entropy": lambda: logprobs_and_entropy(x, labels, ignore_index=-7, **shard(ranks))[0].sum(),
        "entropy_from_logits": lambda: entropy_from_logits(x, process_group=ranks.group).sum(),
        "logits_policy_loss": lambda: (
            logits_policy_loss(x, labels, **others, objective=PolicyObjective.preset("aepo"), **shard(ranks)).loss
        ),
    }
    for name, call in calls.items():
        assert collectives(call) == ["c10d::allgather_"], name
        assert collectives(call().backward) == [], name


def case_no_tokens(ranks):
    x = of_rank(ranks, torch.zeros(0, VOCAB))
    none = torch.zeros(0)
    mask = none.bool()
    logprobs, entropy = logprobs_and_entropy(x, none.long(), **shard(ranks))
    objective = PolicyObjective.preset("aepo")
    loss = logits_policy_loss(x, none.long(), none, none, mask, objective=objective, **shard(ranks)).loss
    (logprobs.sum() + entropy.sum() + loss).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert loss.item() == 0
    assert x.grad.shape == x.shape


def case_a_misplaced_label_raises_on_all_ranks_and_nobody_waits(ranks):
    logits = make_logits(4, VOCAB)
    zeros, mask = torch.zeros(4), torch.ones(4, dtype=torch.bool)
    x, part = of_rank(ranks, logits), ranks.part(VOCAB)
    for label in (VOCAB, -1, -100, 2**40):
        labels = torch.tensor([0, 1, label, 3])
        place = rf"label {label} must be .* exactly one rank .*; got ranks \[\] "
        place += rf"\(this rank holds \[{part.start}, {part.stop}\)\)"
        with pytest.raises(ValueError, match=place):
            selective_log_softmax(x, labels, **shard(ranks))
        with pytest.raises(ValueError, match=place):
            logits_policy_loss(x, labels, zeros, zeros, mask, objective=PolicyObjective(), **shard(ranks))
    labels = torch.tensor([[-100, -100], [0, -100]])
    with pytest.raises(ValueError, match=r"label 0 must be .* got ranks \[0, 1"):
        # Every rank says that its part begins at 0.
        logprobs_and_entropy(x.view(2, 2, -1), labels, process_group=ranks.group, vocab_start=0)


def case_a_group_within_the_group(ranks):
    """Ranks count within their group; a group of one rank sends nothing and gives the plain result."""
    logits = make_logits(5, VOCAB, dtype=torch.float64)
    labels = make_labels(logits)
    expected = logprobs_and_entropy(logits, labels)
    alone = [dist.new_group([rank]) for rank in range(ranks.world)][ranks.rank]
    call = []
    assert (
        collectives(lambda: call.append(logprobs_and_entropy(logits, labels, process_group=alone, vocab_start=0))) == []
    )
    assert all(torch.equal(x, y) for x, y in zip(call[0], expected, strict=True))

    last_two = dist.new_group([ranks.world - 2, ranks.world - 1])
    inner = Ranks(ranks.rank - (ranks.world - 2), 2, last_two)
    if inner.rank >= 0:
        ours = logprobs_and_entropy(of_rank(inner, logits), labels, **shard(inner))
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def case_compiles_into_one_graph(ranks):
    if ranks.world > 2:
        return  # 2 s of compiler in every process, and nothing new
    logits = make_logits(6, VOCAB)
    labels = make_labels(logits)

    def loss(x):
        logprobs, entropy = logprobs_and_entropy(x, labels, **shard(ranks))
        return (logprobs + 0.1 * entropy).sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = of_rank(ranks, logits)
        function(x).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
