"""What the tests of logits_loss and linear_loss share: a small problem, and three losses that are functions."""

import itertools

import torch
from policy_oracle import Batch, policy_oracle

from aepo_kernels import PolicyObjective, policy_loss
from aepo_kernels.testing import make_labels

TOKENS, VOCAB, HIDDEN = 24, 61, 7
BOUNDS = torch.tensor([0, 5, 6, 15, 24])
PRESETS = {
    "aepo": PolicyObjective.preset("aepo"),
    "gspo": PolicyObjective.preset("gspo"),
    "bonus and kl": PolicyObjective.preset("aepo", entropy_bonus=0.1, kl_coef=0.2),
}


class Problem:
    def __init__(self, dtype=torch.float64, seed=0, device="cpu"):
        g = torch.Generator().manual_seed(seed)

        def noise(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(device)

        self.hidden, self.weight = noise(TOKENS, HIDDEN).to(dtype), noise(VOCAB, HIDDEN).to(dtype)
        self.logits = self.hidden @ self.weight.T
        self.labels = make_labels(self.logits, seed)
        exact = torch.log_softmax(self.logits.double(), -1).gather(-1, self.labels[:, None])[:, 0]
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.old, self.ref = ((exact + 0.4 * noise(TOKENS)).to(acc) for _ in range(2))
        self.advantages = noise(TOKENS).to(acc)
        self.mask = (torch.rand(TOKENS, generator=g) < 0.7).to(device)
        self.bounds = BOUNDS.to(device)

    def native(self, name, **more):
        """Keyword arguments of the native losses."""
        ref = self.ref if PRESETS[name].kl_coef else None
        return {"objective": PRESETS[name], "cu_seqlens": self.bounds, "ref_logprobs": ref, **more}

    def as_printed(self, name):
        """The formulas of the papers in plain PyTorch, as a function of log-probs and entropy."""

        def loss_fn(logprobs, entropy):
            rollout = self.old  # no objective here asks for it
            return policy_oracle(
                Batch(logprobs, self.old, self.advantages, self.mask, entropy, self.ref, rollout, self.bounds),
                PRESETS[name],
            )

        return loss_fn

    def written(self, name, **more):
        """The same objective as a function of log-probs and entropy."""

        def loss_fn(logprobs, entropy):
            inputs = (self.old, self.advantages, self.mask)
            return policy_loss(logprobs, *inputs, entropy=entropy, **self.native(name, **more))

        return loss_fn


def sapo(p):
    """Sigmoid gates of two temperatures in place of a clip."""

    def loss_fn(logprobs, entropy):
        ratio = (logprobs - p.old).exp()
        tau = torch.where(p.advantages > 0, 1.0, 1.05)
        gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
        return -(gate * p.advantages)[p.mask].sum() / p.mask.sum(), {"gate": gate[p.mask].mean()}

    return loss_fn


def trust_region(p):
    """A token whose ratio has left the divergence bound in the direction of its advantage has no gradient."""

    def loss_fn(logprobs, entropy):
        ratio = (logprobs - p.old).exp()
        divergence = (logprobs.detach().exp() - p.old.exp()).abs()
        away = (ratio - 1) * p.advantages > 0
        keep = p.mask & ~((divergence > 0.02) & away)
        return -(ratio * p.advantages * keep).sum() / p.mask.sum() - 0.05 * (entropy * p.mask).sum() / p.mask.sum()

    return loss_fn


def ranking(p):
    """Bradley-Terry over the mean log-probs of the sequences, whose bounds the function captures."""

    def loss_fn(logprobs, entropy):
        weight = p.mask.to(logprobs.dtype)
        scores = torch.stack(
            [
                (logprobs * weight)[a:b].sum() / weight[a:b].sum().clamp(min=1)
                for a, b in itertools.pairwise(p.bounds.tolist())
            ]
        )
        return -torch.nn.functional.logsigmoid(scores[:-1] - scores[1:]).mean()

    return loss_fn


OTHERS = {"sapo": sapo, "trust region": trust_region, "ranking": ranking}


def through_autograd(p, loss_fn, *leaves, temperature=1.0, softcap=None):
    """Loss and gradients with materialised log_softmax; leaves are (logits,) or (hidden, weight)."""
    leaves = [x.detach().double().requires_grad_() for x in leaves]
    z = leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, -1)
    logprobs = log_p.gather(-1, p.labels[:, None])[:, 0]
    result = loss_fn(logprobs, -(log_p.exp() * log_p).sum(-1))
    loss = result[0] if isinstance(result, tuple) else result
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_equal(got, expected, rtol=1e-12):
    for x, truth in zip(got, expected, strict=True):
        scale = truth.abs().max().clamp(min=1e-30)
        assert (x.double() - truth).abs().max() <= rtol * scale


def run_logits(p, call, dtype=torch.float64):
    x = p.logits.to(dtype).clone().requires_grad_()
    out = call(x * 1)
    out.loss.backward()
    return out.loss.detach(), x.grad


def run_linear(p, call):
    leaves = [x.detach().clone().requires_grad_() for x in (p.hidden, p.weight)]
    out = call(*leaves)
    out.loss.backward()
    return out.loss.detach(), *(x.grad for x in leaves)
