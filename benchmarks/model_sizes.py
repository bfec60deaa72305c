"""The tables of docs/memory.md: what a dtype costs, and well-known sizes of models, as their configurations are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from aepo.config import load_config
from aepo.doctor.memory import Model, Place, Plan, Workload, largest_micro_batch, need, parameter_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
GPUS = (24, 40, 80, 141)  # GiB
PROMPT, WRITTEN = 512, 1536  # tokens
SETTINGS = ("train.tokens_per_microbatch=8192", f"rollout.max_tokens={WRITTEN}")


def _shape(vocabulary: int, hidden: int, layers: int, heads: int, kv_heads: int, inner: int) -> dict[str, int]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
    }


SIZES: dict[str, PreTrainedConfig] = {
    "135M (SmolLM2)": LlamaConfig(**_shape(49152, 576, 30, 9, 3, 1536), tie_word_embeddings=True),
    "0.5B (Qwen2.5)": Qwen2Config(**_shape(151936, 896, 24, 14, 2, 4864), tie_word_embeddings=True),
    "1.5B (Qwen2.5)": Qwen2Config(**_shape(151936, 1536, 28, 12, 2, 8960), tie_word_embeddings=True),
    "3B (Qwen2.5)": Qwen2Config(**_shape(151936, 2048, 36, 16, 2, 11008), tie_word_embeddings=True),
    "7B (Qwen2.5)": Qwen2Config(**_shape(152064, 3584, 28, 28, 4, 18944), tie_word_embeddings=False),
    "8B (Llama 3.1)": LlamaConfig(**_shape(128256, 4096, 32, 32, 8, 14336), tie_word_embeddings=False),
    "14B (Qwen2.5)": Qwen2Config(**_shape(152064, 5120, 48, 40, 8, 13824), tie_word_embeddings=False),
}


def page() -> str:
    return f"{dtype_table()}\n\n{size_table()}"


def dtype_table() -> str:
    header = ("bytes per parameter", "weights", "gradients", "masters", "moments", "on the device", "copy on the host")
    rows = []
    for dtype in DTYPES:
        each = parameter_bytes(dtype)
        numbers = (each.weights, each.gradients, each.masters, each.moments, each.device, each.host_copy)
        rows.append((f"`model.dtype={_name(dtype)}`", *map(str, numbers)))
    return _markdown(header, rows)


def size_table() -> str:
    header = (
        "model",
        "parameters",
        "dtype",
        "layers",
        "standing",
        "micro-batch",
        "reference",
        "cache",
        "device",
        "host",
        *(f"{size} GiB" for size in GPUS),
    )
    return _markdown(header, [row for name in SIZES for row in size_rows(name)])


def size_rows(name: str) -> Iterator[tuple[str, ...]]:
    """The plans of one model; GiB."""
    model, config = Model(SIZES[name]), load_config(overrides=SETTINGS)
    work = Workload.of(config, PROMPT)
    for dtype in (torch.float32, torch.bfloat16):
        for checkpointing in (False, True):
            plan = Plan(dtype, checkpointing, reference=False)
            one = need(model, plan, work, config)
            reference = need(model, Plan(dtype, checkpointing, reference=True), work, config).reference
            sizes = (
                one.weights + one.gradients + one.state,
                one.activations + one.logits + one.backward,
                reference,
                one.cache,
                one.device("cuda"),
                one.host,
            )
            fits = (largest_micro_batch(model, plan, work, config, Place("", "cuda", size * 2**30)) for size in GPUS)
            yield (
                name,
                f"{model.parameters / 1e9:.3f} B",
                _name(dtype),
                "recomputed" if checkpointing else "kept",
                *(f"{size / 2**30:.1f}" for size in sizes),
                *(f"{tokens:,}" if tokens else "-" for tokens in fits),
            )


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
