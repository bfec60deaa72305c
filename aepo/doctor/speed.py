"""Seconds of an update on this device: the operations of a micro-batch at the rates that are measured here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from aepo.bench.clock import clock_for
from aepo.bench.rates import memory_rates
from aepo.doctor.memory import Model, Plan, Workload, parameter_bytes
from aepo.models.key_values import KeyValueShape

ROWS = {"cpu": 256, "cuda": 4096}  # of the products that are timed
MOST = 8192  # rows and columns of their weights; on one core 8192 x 2048: 69 GFLOP/s, x 8192: 74, 20000 x 8192: 74
CALLS = 10
COPIED = 2**25  # numbers, more than any cache holds
ADAMW_VISITS = 18  # of a number of the size of the state, read or written, for each parameter


@dataclass(frozen=True)
class Rates:
    """Of this device, per second, with the threads that torch has now."""

    products: dict[torch.dtype, float]  # operations
    copy: float  # bytes read and written


def measured_rates(model: Model, dtypes: tuple[torch.dtype, ...], device: str) -> Rates:
    """Products of the size of this model's largest layer, up to MOST: forward, and both of the backward."""
    return Rates({dtype: _product_rate(model, dtype, device) for dtype in dtypes}, _copy_rate(device))


def _product_rate(model: Model, dtype: torch.dtype, device: str) -> float:
    text, rows = model.config.get_text_config(), ROWS[device]
    hidden = min(text.hidden_size, MOST)
    inner = min(getattr(text, "intermediate_size", None) or 4 * text.hidden_size, MOST)
    x = torch.randn(rows, hidden, device=device).to(dtype)
    weight = torch.randn(inner, hidden, device=device).to(dtype)
    gradient = torch.randn(rows, inner, device=device).to(dtype)

    def all_three() -> None:
        x @ weight.T
        gradient @ weight
        gradient.T @ x

    return 3 * 2.0 * rows * hidden * inner / _seconds(all_three, device)


def _copy_rate(device: str) -> float:
    if device == "cuda":
        return memory_rates(device).copy
    source = torch.ones(COPIED)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _seconds(run: Callable[[], object], device: str) -> float:
    """Of a call. On the CPU those that its threads computed: with 15 programs waiting for 2 cores, the wall clock gave
    rates of 18 to 89 GFLOP/s for the same products."""
    run()
    if device == "cuda":
        clock = clock_for(device)
        return min(clock.seconds(run, lambda: None, 1) for _ in range(CALLS))
    start = time.process_time()
    for _ in range(CALLS):
        run()
    return (time.process_time() - start) / CALLS / torch.get_num_threads()


def update_seconds(model: Model, plan: Plan, work: Workload, rates: Rates, *, recomputed: bool) -> float:
    """Of a rollout batch, without the rollouts. recomputed: the trainer computes the old log-probs itself."""
    batch = model.micro_batch(plan.dtype, work.tokens, work.trained(work.tokens), plan.checkpointing)
    operations, count = rates.products[plan.dtype], work.packed / work.tokens
    text = model.config.get_text_config()
    head_dim = KeyValueShape.of(text).head_dim
    # Causal: of the two products, half. The backward has five, and makes the scores again.
    attention = 2 * work.tokens * work.path * text.num_attention_heads * head_dim * text.num_hidden_layers
    forward = (batch.forward_flops + attention) / operations + batch.forward_moved / rates.copy
    backward = 2.5 + (1 if plan.checkpointing else 0)
    both = (batch.flops + (1 + backward) * attention) / operations + batch.moved / rates.copy
    each = parameter_bytes(plan.dtype)
    wide = each.gradients
    step = model.parameters * (ADAMW_VISITS * wide + 3 * wide + 2 * each.masters + 2 * each.weights) / rates.copy
    kept = model.parameters * 2 * each.host_copy / rates.copy
    evaluations = int(recomputed) + int(plan.reference)
    return count * (work.passes * both + evaluations * forward) + work.passes * work.steps * step + kept
