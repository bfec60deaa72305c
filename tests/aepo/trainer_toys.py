"""Hand-made trajectories and a tiny random model, for the tests of the trainer's stages."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from aepo.advantages import Sample
from aepo.types import Trajectory

VOCAB = 50


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """Two Qwen3 layers with grouped-query attention: every kind of layer that the real models have."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.3,  # sharp enough that entropies differ between positions
    )
    return Qwen3ForCausalLM(config).to(dtype).eval()


def trajectory(prompt: Sequence[int], *segments: tuple[Sequence[int], Sequence[int]]) -> Trajectory:
    """Prompt, then (written, read) token pairs; log-probs and entropies are 0 until the test sets them."""
    tokens, generated, steps, anchors = [*prompt], [False] * len(prompt), [-1] * len(prompt), []
    just_read = tuple(prompt)
    for step, (written, read) in enumerate(segments):
        tokens += [*written, *read]
        generated += [True] * len(written) + [False] * len(read)
        steps += [step] * len(written) + [-1] * len(read)
        anchors.append(just_read)
        just_read = tuple(read)
    zeros = (0.0,) * len(tokens)
    return Trajectory(tuple(tokens), tuple(generated), zeros, zeros, tuple(steps), tuple(anchors))


def random_samples(count: int, seed: int = 0) -> list[Sample]:
    """Trajectories of 1 to 3 segments with tool results, off-policy log-probs and advantages of both signs."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(draw.randint(low, high))]

    samples = []
    for j in range(count):
        segments = [(tokens(1, 6), tokens(1, 5)) for _ in range(draw.randint(0, 2))] + [(tokens(1, 6), [])]
        path = trajectory(tokens(2, 6), *segments)

        def where_generated(low: float, high: float, path: Trajectory = path) -> tuple[float, ...]:
            return tuple(draw.uniform(low, high) if g else 0.0 for g in path.generated)

        path = Trajectory(
            path.token_ids,
            path.generated,
            where_generated(-6, -1),
            where_generated(0, 3),
            path.steps,
            path.anchors,
        )
        samples.append(Sample(j // 4, j % 4, path, where_generated(-2, 2)))
    return samples
