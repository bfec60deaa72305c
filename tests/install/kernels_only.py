"""Run where torch and the wheel alone are installed: the compiled kernels agree with float64 PyTorch, backward too.

Plain asserts and no test library, because there is none. Prints where the packages lie, and with which CUDA code.
"""

import importlib.util

import torch

import aepo_kernels
from aepo_kernels import PolicyObjective, backend, logits_policy_loss, logprobs_and_entropy

for package in ("numpy", "typer", "rich", "transformers", "packaging"):
    assert importlib.util.find_spec(package) is None, f"{package} is here: this is not torch alone"
assert backend.missing("cpu") is None, backend.missing("cpu")

generator = torch.Generator().manual_seed(0)
logits = 3 * torch.randn(64, 1000, generator=generator)
labels = torch.randint(1000, (64,), generator=generator)
advantages = torch.randn(64, generator=generator)
mask = torch.arange(64) % 3 != 0

x = logits.clone().requires_grad_()
logprobs, entropy = logprobs_and_entropy(x, labels, backend="cpu")
(gradient,) = torch.autograd.grad((logprobs * advantages + entropy).sum(), x)

x64 = logits.double().requires_grad_()
log_p = x64.log_softmax(-1)
logprobs64, entropy64 = log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
(gradient64,) = torch.autograd.grad((logprobs64 * advantages + entropy64).sum(), x64, retain_graph=True)
for ours, truth in ((logprobs, logprobs64), (entropy, entropy64), (gradient, gradient64)):
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)

# GRPO's clipped surrogate, as its paper writes it: the mean over the tokens that count.
old_logprobs = (logprobs64 - 0.3 * torch.randn(64, generator=generator)).detach()
ratio = (logprobs64 - old_logprobs).exp()
surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
truth = -surrogate[mask].mean()
(gradient64,) = torch.autograd.grad(truth, x64)
objective = PolicyObjective(eps_low=0.2, eps_high=0.2)
x = logits.clone().requires_grad_()
given = {"objective": objective, "inplace_backward": True, "backend": "cpu"}
loss, _ = logits_policy_loss(x, labels, old_logprobs.float(), advantages, mask, **given)
(gradient,) = torch.autograd.grad(loss, x)
torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
torch.testing.assert_close(gradient.double(), gradient64, rtol=1e-4, atol=1e-7)
assert gradient.data_ptr() == x.data_ptr()

print(aepo_kernels.__file__)
print(backend.missing("cuda"))
