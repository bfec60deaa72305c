"""`logits_policy_loss` in a plain PyTorch loop; a few seconds on a CPU: `python examples/drop_in_loss.py`.

The "language model" reads one token and writes one, and is rewarded for a digit that it has to discover. Everything
between the rollout and `optimizer.step()` is what any trainer does.
"""

import torch

from aepo_kernels import PolicyObjective, logits_policy_loss, selective_log_softmax
from aepo_kernels.advantages import batch_advantages

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(16, 64), torch.nn.Linear(64, 1000))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
objective = PolicyObjective.preset("aepo")
successes = []

for step in range(20):
    prompt = torch.randint(16, (512,))
    with torch.no_grad():  # the rollout
        logits = model(prompt)
        token = logits.softmax(-1).multinomial(1).squeeze(-1)
        old_logprobs = selective_log_softmax(logits, token)
    reward = (token % 10 == prompt % 10).float()
    advantage = batch_advantages(reward)
    mask = torch.ones_like(token)  # 1: the model wrote it, train on it
    for _ in range(2):  # two updates per rollout: the second one has ratios to clip
        logits = model(prompt)
        loss, metrics = logits_policy_loss(
            logits, token, old_logprobs, advantage, mask, objective=objective, inplace_backward=True
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    successes.append(reward.mean().item())
    if step % 5 == 4:
        print(f"step {step + 1}: success {successes[-1]:.2f}, clipped {metrics['clip_fraction_high']:.3f}")
