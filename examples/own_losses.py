"""Two published losses, each one function, that no preset has; `python examples/own_losses.py` trains a toy with both.

In the trainer, from a checkout: aepo train --config configs/demo.yaml policy.loss=examples.own_losses:sapo
In a loop of one's own they run between fused operations, as at the end of this file; docs/own_loss.md has the rest.
"""

import torch

from aepo.own_loss import LossBatch

POSITIVE_TEMPERATURE, NEGATIVE_TEMPERATURE = 1.0, 1.05  # as in the paper: what pushes tokens down is damped more
BOUND = 0.2


def sapo(logprobs: torch.Tensor, entropy: torch.Tensor, batch: LossBatch) -> tuple[torch.Tensor, dict]:
    """Soft Adaptive Policy Optimization, arXiv 2511.20347: no clip, a sigmoid gate that closes far from ratio 1.

    L = - mean over paths, then tokens, of A 4 / tau sigmoid(tau (ratio - 1)), tau by the sign of A. Its slope at ratio
    1 is 1, as that of the ratio.
    """
    ratio = (logprobs - batch.old_logprobs).exp()
    tau = torch.full_like(ratio, NEGATIVE_TEMPERATURE).masked_fill(batch.advantages > 0, POSITIVE_TEMPERATURE)
    gate = torch.sigmoid(tau * (ratio - 1))
    value = 4 / tau * gate
    path_means = torch.segment_reduce(-batch.advantages * value, "mean", offsets=batch.cu_seqlens)
    return path_means.sum() / batch.paths, {"slope": (4 * gate * (1 - gate)).mean()}


def dppo(logprobs: torch.Tensor, entropy: torch.Tensor, batch: LossBatch) -> tuple[torch.Tensor, dict]:
    """Divergence Proximal Policy Optimization, arXiv 2602.04879, with the binary total variation as divergence.

    L = - mean over tokens of M ratio A. M is 0 where the update would lead further away from the policy that sampled
    (up with A > 0 and ratio > 1, down with A < 0 and ratio < 1) and the probability of the token, not its ratio, has
    moved by more than BOUND already.
    """
    ratio = (logprobs - batch.rollout_logprobs).exp()
    moved = (logprobs.exp() - batch.rollout_logprobs.exp()).detach()
    stopped = moved * batch.advantages.sign() > BOUND
    loss = -(ratio * batch.advantages).masked_fill(stopped, 0).sum() / batch.tokens
    return loss, {"stopped": stopped.double().mean()}


def train(loss, steps: int = 20) -> list[float]:
    """A "language model" that reads a token and writes one is rewarded for a digit; success of every step."""
    from aepo_kernels import logits_loss, logprobs_and_entropy

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(16, 64), torch.nn.Linear(64, 1000))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mask, successes = torch.ones(512, dtype=torch.bool), []
    for step in range(1, steps + 1):
        prompt = torch.randint(16, (512,))
        with torch.no_grad():  # the rollout
            logits = model(prompt)
            token = logits.softmax(-1).multinomial(1).squeeze(-1)
            old_logprobs, old_entropy = logprobs_and_entropy(logits, token)
        reward = (token % 10 == prompt % 10).float()
        batch = LossBatch(
            old_logprobs=old_logprobs,
            old_entropy=old_entropy,
            advantages=(reward - reward.mean()) / (reward.std() + 1e-6),
            rollout_logprobs=old_logprobs,
            ref_logprobs=None,
            cu_seqlens=torch.arange(513),  # every token is a path of its own
            tokens=512,
            paths=512,
            max_tokens=1,
            entropy_stats=(old_entropy.mean().item(), old_entropy.std().item()),
            temperature=1.0,
        )
        for _ in range(2):  # two updates per rollout: the second one has ratios
            value, metrics = logits_loss(
                model(prompt),
                token,
                mask,
                lambda logprobs, entropy, batch=batch: loss(logprobs, entropy, batch),
                inplace_backward=True,
            )
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        successes.append(reward.mean().item())
        if step % 5 == 0:
            own = ", ".join(f"{name} {x.item():.3f}" for name, x in metrics.items() if name != "loss")
            print(f"{loss.__name__}, step {step}: success {successes[-1]:.2f}, {own}")
    return successes


if __name__ == "__main__":
    successes = {loss.__name__: train(loss) for loss in (sapo, dppo)}
