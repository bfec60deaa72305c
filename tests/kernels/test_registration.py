"""Claims about PyTorch integration: the registered operations pass opcheck, every public function compiles into one
graph with the same result, also as the first thing a fresh process does, and importing the package is cheap."""

import subprocess
import sys

import pytest
import torch
from policy_oracle import make_batch

from aepo_kernels import (
    PolicyObjective,
    entropy_from_logits,
    logits_loss,
    logits_policy_loss,
    logprobs_and_entropy,
    policy_loss,
    selective_log_softmax,
)
from aepo_kernels import backend as backends
from aepo_kernels.objective import METRICS
from aepo_kernels.ops.call import PolicyCall
from aepo_kernels.testing import make_labels, make_logits

TOKENS = 51
LOGITS = make_logits(TOKENS, 23)
LABELS = make_labels(LOGITS)
BATCH = make_batch().to(torch.float32)
PPO = PolicyObjective()
AEPO = PolicyObjective.preset("aepo", entropy_bonus=0.01)
OPS = torch.ops.aepo


def policy_call(objective):
    return PolicyCall(
        old_logprobs=BATCH.old_logprobs,
        advantages=BATCH.advantages,
        mask=BATCH.mask,
        weights=None,
        counts=torch.arange(TOKENS) % 3,
        ref_logprobs=BATCH.ref_logprobs,
        rollout_logprobs=None,
        cu_seqlens=BATCH.cu_seqlens,
        entropy_stats=torch.tensor([1.0, 0.5]),
        denominator=torch.tensor(40.0),
        aggregation=objective.aggregation,
        sequence_ratio=objective.ratio_level == "sequence",
        numbers=list(objective.numbers()),
        backend=None,
    )


def operations():
    stats = OPS.token_stats(LOGITS, LABELS, 0.7, -100, False, None, 0, None)
    coefficients = (*stats[2:], stats[1], torch.randn(TOKENS), torch.randn(TOKENS))
    yield "token_stats", (LOGITS, LABELS, 0.7, -100, False, None, 0, None)
    yield "token_stats of a loss", (LOGITS, LABELS, 0.7, -100, True, None, 0, None)
    yield "token_stats without labels", (LOGITS, None, 0.7, -100, False, None, 0, None)
    yield "logits_grad", (LOGITS, LABELS, *coefficients, 0.7, -100, None)
    yield "logits_grad_", (LOGITS.clone(), LABELS, *coefficients, 0.7, -100, None)
    for name in ("aepo", "gspo"):
        objective = PolicyObjective.preset(name, entropy_bonus=0.01 if name == "aepo" else 0.0)
        yield f"policy_loss {name}", (BATCH.logprobs, BATCH.entropy, *policy_call(objective))
    yield "single_pass", (LOGITS, LABELS, 0.7, *policy_call(AEPO))
    yield "single_pass_", (LOGITS.clone(), LABELS, 0.7, *policy_call(AEPO))
    yield "scale_", (LOGITS.clone(), torch.tensor(0.3), None)


@pytest.mark.parametrize("case", [name for name, _ in operations()])
def test_opcheck(case, device):
    args = [x.to(device) if isinstance(x, torch.Tensor) else x for x in dict(operations())[case]]
    torch.library.opcheck(getattr(OPS, case.split()[0]).default, args)


def through_logits(logits, labels, batch):
    logprobs, entropy = logprobs_and_entropy(logits, labels, 0.7)
    return (logprobs * entropy).sum() + entropy_from_logits(logits).sum() + selective_log_softmax(logits, labels).sum()


def through_policy_loss(logits, labels, batch):
    inputs = (batch.old_logprobs, batch.advantages, batch.mask)
    return policy_loss(logits[:, 0], *inputs, objective=AEPO, entropy=logits[:, 1].abs(), denominator=40).loss


def fused(logits, labels, batch, **options):
    inputs = (batch.old_logprobs, batch.advantages, batch.mask)
    out = logits_policy_loss(logits * 1, labels, *inputs, objective=AEPO, entropy_stats=(1.0, 0.5), **options)
    return out.loss + 0 * out.metrics["ratio_mean"]


def fused_in_place(logits, labels, batch):
    return fused(logits, labels, batch, inplace_backward=True)


def in_a_single_pass(logits, labels, batch):
    return 3 * fused(logits, labels, batch, single_pass=True)


def of_a_function(logits, labels, batch):
    def loss_fn(logprobs, entropy):
        ratio = (logprobs - batch.old_logprobs).exp()
        return -(ratio * batch.advantages * batch.mask).sum() - entropy.sum(), {"ratio": ratio.mean()}

    out = logits_loss(logits * 1, labels, batch.mask, loss_fn, inplace_backward=True)
    return out.loss + 0 * out.metrics["ratio"]


FUNCTIONS = [through_logits, through_policy_loss, fused, fused_in_place, in_a_single_pass, of_a_function]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiles_into_one_graph(function, device):
    labels, batch = LABELS.to(device), BATCH.to(torch.float32, device)

    def run(f):
        x = LOGITS.to(device, copy=True).requires_grad_()
        loss = f(x, labels, batch)
        loss.backward()
        return loss.detach(), x.grad

    # aot_eager runs everything of torch.compile but the code generator, which takes most of the time.
    compiled = run(torch.compile(function, fullgraph=True, backend="aot_eager"))
    for got, expected in zip(compiled, run(function), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def loss_of(logits, labels, batch, tokens, denominator, **options):
    inputs = (batch.old_logprobs[:tokens], batch.advantages[:tokens], batch.mask[:tokens])
    inputs = (labels[:tokens], *inputs)
    return logits_policy_loss(logits * 1, *inputs, objective=PPO, denominator=denominator, **options).loss


@pytest.mark.parametrize("options", [{}, {"inplace_backward": True}, {"single_pass": True}], ids=str)
def test_another_length_or_denominator_does_not_recompile(options, device):
    # Both change with every batch. (A new temperature does recompile: it is a constant of the graph.)
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    logits, labels, batch = LOGITS.to(device), LABELS.to(device), BATCH.to(torch.float32, device)

    def run(function, tokens, denominator):
        x = logits[:tokens].clone().requires_grad_()
        loss = function(x, labels, batch, tokens, denominator, **options)
        return loss.detach(), *torch.autograd.grad(loss, x)

    for tokens in (51, 40):  # the second call makes lengths and numbers dynamic
        run(compiled, tokens, float(tokens))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens, denominator in ((30, 33.3), (20, 21.0)):
            for got, expected in zip(
                run(compiled, tokens, denominator), run(loss_of, tokens, denominator), strict=True
            ):
                torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


FRESH = {
    "the import loads neither triton nor the extension": """
import sys, aepo_kernels
loaded = [name for name in sys.modules if name.split(".")[0] in ("triton", "transformers", "aepo")
          or name in ("aepo_kernels._C", "aepo_kernels.kernels")]
assert not loaded, loaded
""",
    "the first use is a compiled one": """
import sys, torch
torch.set_default_device(sys.argv[1])
from aepo_kernels import PolicyObjective, logits_policy_loss
objective = PolicyObjective.preset("aepo")
def head(h, w):
    t = torch.zeros(4)
    return logits_policy_loss(h @ w, torch.tensor([0, 1, 2, 3]), t - 1, t + 1, t == 0,
                              objective=objective, inplace_backward=True).loss
torch.manual_seed(0)
h, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 11, requires_grad=True)
got = torch.autograd.grad(torch.compile(head, fullgraph=True)(h, w), (h, w))
expected = torch.autograd.grad(head(h, w), (h, w))
for a, b in zip(got, expected):
    torch.testing.assert_close(a, b)
    assert a.abs().max() > 1e-3
""",
}


@pytest.mark.parametrize("claim", [next(iter(FRESH)), pytest.param(list(FRESH)[1], marks=pytest.mark.slow)])
def test_in_a_fresh_process(claim, device):
    result = subprocess.run([sys.executable, "-c", FRESH[claim], device], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_an_extension_of_another_copy_is_not_taken(monkeypatch):
    """What an editable installation of another checkout would lend to one whose own is not built."""
    import aepo_kernels._C as extension

    monkeypatch.setattr(extension, "__file__", "/elsewhere/aepo_kernels/_C.so")
    reason = backends._extension_missing.__wrapped__()
    assert reason == (
        "the compiled extension aepo_kernels._C is not built; that of /elsewhere/aepo_kernels belongs to another copy"
    )
    monkeypatch.undo()
    assert backends._extension_missing.__wrapped__() is None


@pytest.mark.parametrize("other", [{"numbers": ["low"]}, {"metrics": list(METRICS)[::-1]}, {"single_pass": []}, None])
def test_an_extension_built_for_other_numbers_is_not_taken(other, monkeypatch):
    """It would give the right loss of a wrong objective."""
    assert backends._built_for() == backends._asked_of_it()
    monkeypatch.setattr(backends, "_built_for", lambda: None if other is None else backends._asked_of_it() | other)
    with pytest.warns(UserWarning, match="another version than aepo_kernels: build it again. CPU tensors are served"):
        assert "build it again" in backends._extension_missing.__wrapped__()
