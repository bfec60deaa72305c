"""What one optimiser step of a trainer of TRL's must come to, in float64 and without our code.

The oracle takes from a run (trl_recorder.py) its tokens, masks and weights alone: log-probs and entropies are those of
a float64 copy of the model, rewards and advantages are made again of the completions, the loss is policy_oracle.py's.
"""

import collections
import copy
import dataclasses

import torch
from policy_oracle import Batch, policy_oracle
from torch import Tensor
from trl_recorder import TOKENIZER, Generation, Step
from trl_toys import length_reward, make_model


def float64_model(weights: dict[str, Tensor], model=None):
    """A copy in float64. Its norms are computed in float64, too, which transformers' are not."""
    model = copy.deepcopy(make_model(TOKENIZER) if model is None else model).double()
    model.load_state_dict(weights)
    for module in model.modules():
        if type(module).__name__ == "Qwen3RMSNorm":
            module.forward = lambda x, m=module: (
                m.weight * x * (x.square().mean(-1, keepdim=True) + m.variance_epsilon).rsqrt()
            )
    return model.eval()


def scored(model, inputs: dict[str, Tensor], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [B, T] of the completions, float64."""
    ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1)
    attended = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1)
    first = inputs["prompt_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, first - 1 : -1]
    all_logprobs = (logits / temperature).log_softmax(-1)
    logprobs = all_logprobs.gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
    return logprobs, -(all_logprobs.exp() * all_logprobs).sum(-1)


def loss_mask(inputs: dict[str, Tensor]) -> Tensor:
    return (inputs["completion_mask"] * inputs.get("tool_mask", 1)) != 0


def row_keys(inputs: dict[str, Tensor]) -> list[tuple]:
    """(prompt, completion) of every row: rows are shuffled between the generation batch and its micro-batches."""
    prompts = [tuple(x[m != 0].tolist()) for x, m in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)]
    return [(p, tuple(c.tolist())) for p, c in zip(prompts, inputs["completion_ids"], strict=True)]


def group_estimate(generation: Generation, reward=length_reward) -> dict[tuple, float]:
    """GRPO's advantage of every row, from its text."""
    keys = row_keys(generation.batch)
    rewards = reward(TOKENIZER.batch_decode([completion for _, completion in keys], skip_special_tokens=True))
    groups = collections.defaultdict(list)
    for (prompt, _), value in zip(keys, rewards, strict=True):
        groups[prompt].append(value)
    found = {}
    for key, value in zip(keys, rewards, strict=True):
        group = torch.tensor(groups[key[0]], dtype=torch.float64)
        found[key] = ((value - group.mean()) / (group.std() + 1e-4)).item()
    return found


@dataclasses.dataclass
class Truth:
    loss: float
    gradients: dict[str, Tensor]
    batch: Batch
    """All tokens of the step; `entropy` is the old policy's."""
    entropy_stats: tuple[Tensor, Tensor]


def truth_of(
    step: Step,
    objective,
    *,
    advantages=None,
    accumulated: int | None = None,
    per_generation: int | None = None,
    temperature: float = 1.0,
    max_tokens: int = 8,
    share=None,
    loss=None,
    reference: dict[str, Tensor] | None = None,
    model=None,
) -> Truth:
    """Loss and gradient of a step in float64.

    objective: a PolicyObjective. advantages: of every row key, group_estimate's by default. accumulated micro-batches
    make the step, per_generation one pass over the generation batch. share(batch, advantages) [T]: a factor of the
    policy term. loss(batch, divisors) in place of the objective's.
    """
    accumulated = accumulated or len(step.micro_batches)
    per_generation = per_generation or accumulated
    advantages = group_estimate(step.generation) if advantages is None else advantages
    with torch.no_grad():
        old_model = float64_model(step.generation.weights, model)
        entropy = scored(old_model, step.generation.batch, temperature)[1][loss_mask(step.generation.batch)]
        stats = entropy.mean(), entropy.std()
        old = [scored(old_model, x, temperature) for x in step.micro_batches]
        ref = old
        if reference is not None:
            ref_model = float64_model(reference, model)
            ref = [scored(ref_model, x, temperature) for x in step.micro_batches]
    live = float64_model(step.weights, model)
    current = [scored(live, x, temperature) for x in step.micro_batches]

    width = step.generation.batch["completion_ids"].shape[1]
    rows = sum(len(x["completion_ids"]) for x in step.micro_batches)
    of_rows = torch.tensor([advantages[key] for x in step.micro_batches for key in row_keys(x)], dtype=torch.float64)

    def flat(parts):
        return torch.cat([x.reshape(-1) for x in parts])

    batch = Batch(
        logprobs=flat([x[0] for x in current]),
        old_logprobs=flat([x[0] for x in old]),
        advantages=of_rows.repeat_interleave(width),
        mask=flat([loss_mask(x) for x in step.micro_batches]),
        entropy=flat([x[1] for x in old]),
        ref_logprobs=flat([x[0] for x in ref]),
        rollout_logprobs=flat([x.get("sampling_per_token_logps", old[0][0]) for x in step.micro_batches]).double(),
        cu_seqlens=torch.arange(0, rows * width + 1, width),
    )
    if objective.entropy_advantage:
        factor = 1 + objective.entropy_advantage * (batch.entropy - stats[0]) / stats[1]
        batch.advantages = batch.advantages * (factor.clamp(min=0) if objective.clamp_entropy_factor else factor)
    if share is not None:
        batch.advantages = batch.advantages * share(batch, step)
    tokens = int(loss_mask(step.generation.batch).sum())
    divisors = {"token-mean": tokens * accumulated / per_generation, "constant": rows * max_tokens}
    if loss is None:
        now = dataclasses.replace(batch, entropy=flat([x[1] for x in current]))
        plain = dataclasses.replace(objective, entropy_advantage=0.0, clamp_entropy_factor=False)
        value = policy_oracle(now, plain, denominator=divisors.get(objective.aggregation, rows))
    else:
        value = loss(batch, flat([x[1] for x in current]), divisors["token-mean"], rows, stats)
    named = dict(live.named_parameters())
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(named.items(), found, strict=True)
    }
    detached = {f.name: getattr(batch, f.name).detach() for f in dataclasses.fields(batch)}
    return Truth(value.item(), gradients, Batch(**detached), stats)


def assert_gradients(found: dict[str, Tensor], truth: dict[str, Tensor], rtol: float = 1e-5) -> None:
    """Of every parameter, within rtol of the whole gradient's norm (a step in float32 is within 2e-6 of it)."""
    whole = torch.stack([x.double().norm() for x in truth.values()]).norm()
    for name, expected in truth.items():
        error = (found[name].double() - expected.double()).norm()
        assert error <= rtol * whole, f"{name}: differs by {error / whole:.1e} of the gradient's norm {whole:.3g}"


def assert_step(step: Step, truth: Truth) -> None:
    # Terms of both signs cancel in a loss: it is right to rounding of the largest of them, which are around 1.
    assert abs(sum(step.losses) - truth.loss) <= 2e-6 * max(1, abs(truth.loss)), (sum(step.losses), truth.loss)
    assert_gradients(step.gradients, truth.gradients)


def sapo_oracle(b, entropy, tokens, rows, stats):
    """arXiv 2511.20347, over rows as they stand."""
    width = int(b.cu_seqlens[1])
    r = (b.logprobs - b.old_logprobs).exp().view(-1, width)
    a, mask = b.advantages.view(-1, width), b.mask.view(-1, width)
    tau = torch.where(a > 0, 1.0, 1.05)
    gain = 4 / tau / (1 + (-tau * (r - 1)).exp()) * a
    means = [row[m].mean() for row, m in zip(gain, mask, strict=True) if m.any()]
    return -torch.stack(means).sum() / rows
