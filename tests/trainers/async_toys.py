"""What the tests of AEPOAsyncTrainer stand on: TRL's asynchronous trainer on a CPU, with samples that are given.

TRL's tree attention is a kernel of GPUs; here each segment attends to its path by PyTorch's own. Worker and weight
transfer are the ones that TRL lets a caller put in.
"""

import queue
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import trl.experimental.async_grpo.async_grpo_trainer as theirs
from policy_oracle import Batch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3ForCausalLM, TrainerCallback
from trl.experimental.async_grpo import packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample
from trl_toys import make_model, make_tokenizer, prompts, settings


def path_attention(_module, query, key, value, _mask, *, scaling, **tree):
    """TRL's tree_attention: queries [1, heads, N, D] in segments, each against the keys of its path from the root."""
    bounds_q, bounds_k = tree["tree_cu_seqlens_q"].tolist(), tree["tree_cu_seqlens_k"].tolist()
    parts = []
    for segment in range(len(bounds_q) - 1):
        own = slice(bounds_q[segment], bounds_q[segment + 1])
        path = tree["tree_kv_index"][bounds_k[segment] : bounds_k[segment + 1]]
        queries, keys = own.stop - own.start, len(path)
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        k, v = key[:, :, path], value[:, :, path]
        parts.append(
            scaled_dot_product_attention(query[:, :, own], k, v, attn_mask=seen, scale=scaling, enable_gqa=True)
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


def run_on_a_cpu(set_attribute: Callable) -> None:
    """Put what TRL's asynchronous trainer has for GPUs alone aside."""
    set_attribute(packing, "tree_attention", path_attention)
    set_attribute(theirs, "get_peak_flops_per_device", lambda *_: None)  # asks CUDA


class Worker:
    """Hands out the samples, and again: accelerate fetches a batch ahead of the last step."""

    def __init__(self, samples: Sequence[RolloutSample]) -> None:
        self.rollout_buffer: queue.Queue = queue.Queue()
        self.metrics_queue: queue.Queue = queue.Queue()
        self.samples = samples

    def start(self) -> None:
        for sample in [*self.samples, *self.samples]:
            self.rollout_buffer.put(sample)
        self.metrics_queue.put({"rollout/generated_total": float(len(self.samples))})

    def stop(self) -> None: ...

    def update_model_version(self, model_version: int) -> None: ...

    def check_health(self, stale_after_s: float) -> None:
        raise RuntimeError("the trainer asks for more samples than the test has")


class NoTransfer:
    def init_weight_transfer(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def destroy(self) -> None: ...

    def send_weights(self, iterator) -> None:
        for _ in iterator:
            pass


def tree_samples() -> list[RolloutSample]:
    """8 samples of 2 questions. Those of a question share its tokens, and most of them the beginning of an answer, with
    advantages of both signs on the same position. Lengths differ much, so micro-batches do; a tool's answer is only
    read; the server's log-probs are a step or two away from the model's."""
    dialogues = [
        (0, 1.25, ("Q: 2 + 2? ", "so 4", "", "")),
        (0, -0.75, ("Q: 2 + 2? ", "so 5, I am quite sure", "", "")),
        (0, 0.5, ("Q: 2 + 2? ", "so 4", " [tool 4] ", "yes")),
        (0, -1.0, ("Q: 2 + 2? ", "x", "", "")),
        (1, 0.75, ("Why? ", "because of the long and winding road", " [read] ", "or so")),
        (1, -1.5, ("Why? ", "because of the long day", "", "")),
        (1, 0.0, ("Why? ", "no", "", "")),
        (1, 1.0, ("Why? ", "because of the", "", "")),
    ]
    tokenizer, draw = make_tokenizer(), np.random.default_rng(2)
    model = toy_model()
    found = []
    for group, advantage, parts in dialogues:
        ids = [(token, i % 2) for i, part in enumerate(parts) for token in tokenizer.encode(part)]
        made = RolloutSample(
            prompt=[],
            completion=[],
            input_ids=np.array([token for token, _ in ids]),
            completion_mask=np.array([by_model for _, by_model in ids]),
            old_log_probs=np.zeros(len(ids), dtype=np.float32),
            advantage=advantage,
            model_version=0,
            group_id=group,
            metrics={"reward": advantage},
        )
        with torch.no_grad():
            logprobs, _ = alone(model, made)
        made.old_log_probs[made.completion_mask == 1] = logprobs.numpy() + draw.normal(0, 0.6, len(logprobs))
        found.append(made)
    return found


TEMPERATURE = 0.7


def toy_model(**changed) -> Qwen3ForCausalLM:
    """That of the trainers below, in float64."""
    return make_model(make_tokenizer(), **changed).double()


def alone(model: torch.nn.Module, sample: RolloutSample) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [R] of what the model wrote of a sample, by a forward that shares nothing."""
    ids = torch.from_numpy(sample.input_ids)
    (wrote,) = np.nonzero(sample.completion_mask)
    logits = model(ids[None]).logits[0, wrote - 1] / TEMPERATURE
    everything = logits.log_softmax(dim=-1)
    entropy = -(everything.exp() * everything).sum(dim=-1)
    return everything.gather(1, ids[wrote][:, None])[:, 0], entropy


def oracle_batch(model: torch.nn.Module, samples: Sequence[RolloutSample]) -> Batch:
    """What the published losses are taken over, in float64 and differentiable in the weights."""
    logprobs, entropy = zip(*(alone(model, sample) for sample in samples), strict=True)
    lengths = [len(x) for x in logprobs]
    old = np.concatenate([sample.old_log_probs[sample.completion_mask == 1] for sample in samples])
    advantages = torch.tensor([sample.advantage for sample in samples], dtype=torch.float64)
    old_logprobs = torch.from_numpy(old).double()
    return Batch(
        logprobs=torch.cat(logprobs),
        old_logprobs=old_logprobs,
        advantages=advantages.repeat_interleave(torch.tensor(lengths)),
        mask=torch.ones(sum(lengths), dtype=torch.bool),
        entropy=torch.cat(entropy),
        ref_logprobs=old_logprobs,
        rollout_logprobs=old_logprobs,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
    )


class Gradients(TrainerCallback):
    """Of the first optimiser step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, _args, _state, _control, model, **_):
        if not self.found:
            named = model.named_parameters()
            self.found = {name.removeprefix("module."): p.grad.clone() for name, p in named if p.grad is not None}


def save_model(folder: Path) -> None:
    """TRL's asynchronous trainer takes models by their path alone."""
    make_model(make_tokenizer()).save_pretrained(folder / "model")


def make_async_trainer(trainer, config, folder: Path, samples, *, per_device=8, accumulation=1, own=None, **changed):
    """One optimiser step on `samples`, in micro-batches of `per_device` of them in order; float64 weights unless
    changed. `own`: what the trainer takes itself. The gradients are in trainer.gradients."""
    tokenizer = make_tokenizer()
    if not (folder / "model").exists():
        save_model(folder)
    arguments = settings(folder / "run") | {
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "token_budget": 0,
        "temperature": TEMPERATURE,
        "model_init_kwargs": {"dtype": torch.float64},
    }
    gradients = Gradients()
    made = trainer(
        model=str(folder / "model"),
        args=config(**arguments | changed),
        train_dataset=prompts(),
        processing_class=tokenizer,
        rollout_worker=Worker(samples),
        weight_transfer=NoTransfer(),
        callbacks=[gradients],
        **own or {},
    )
    made.gradients = gradients
    return made


class OwnLoss:
    """With entropies, statistics and sequences in it; keeps what it was given."""

    def __init__(self):
        self.batches = []

    def __call__(self, logprobs, entropy, batch):
        self.batches.append(batch)
        mean, std = batch.entropy_stats
        weight = batch.advantages * (1 + (batch.old_entropy - mean) / std)
        first = batch.cu_seqlens[:-1]
        loss = -(weight * (logprobs - batch.old_logprobs).exp()).sum() / batch.tokens
        loss = loss - 0.1 * entropy.square().sum() / batch.tokens + logprobs[first].sum() / batch.paths
        return loss, {"mine": weight.mean()}
