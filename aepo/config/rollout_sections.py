"""How trajectories come about, and what generates them: sections of the configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import ClassVar, Literal
from urllib.parse import urlsplit

from aepo.config.setting_types import Section, key, suggestion
from aepo.files.user_paths import expanded

ENGINES = ("huggingface", "vllm")


@dataclass(frozen=True)
class RolloutConfig(Section):
    """How the k trajectories of a question come about (docs/rollout.md).

    AEPO: these defaults. ARPO: a fixed `fresh_paths` and `branch_penalty=0`. GRPO: `fresh_paths` equal to `paths`.
    """

    section: ClassVar[str] = "rollout"
    engine: str = key(
        "huggingface",
        "what generates: huggingface, the trainer's own model; vllm, with a copy of its weights (section vllm); or "
        "package.module:function, an engine of your own (docs/rollout.md)",
    )
    paths: int = key(8, "k: trajectories per question", low=1)
    fresh_paths: int | None = key(
        None, "m: how many of them start from the question, the others branch; null: entropy pre-monitoring", low=1
    )
    budget_beta: float = key(1.0, "pre-monitoring: m = k sigmoid(beta (H_root - mean H_tool)), entropies in nats")
    entropy_window: int = key(20, "first tokens of a segment whose mean entropy is looked at", low=1)
    branch_alpha: float | Literal["uniform"] = key(
        "uniform", "base chance of a branch: a constant, or drawn from [0, 1) for every decision"
    )
    branch_gamma: float = key(0.2, "weight of the entropy change since the start of the path, in units of log V")
    branch_penalty: float = key(0.05, "every branch in a row on a path lowers the chance by this part", low=0)
    branch_threshold: float = key(0.5, "tau: a path branches where its chance is above this")
    branch_rule: str | None = key(
        None, "package.module:function, a chance of your own in place of that of the paper (docs/rollout.md)"
    )
    temperature: float = key(1.0, "softmax temperature of sampling and of the loss; 0: greedy (evaluation)", low=0)
    max_tokens: int = key(256, "generated and read tokens of one path after the prompt", low=1)
    max_segment_tokens: int = key(128, "generated tokens between two tool results", low=1)
    max_tool_calls: int = key(6, "tool results of one path; it ends where it calls once more", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine not in ENGINES and ":" not in self.engine:
            hint = suggestion(self.engine.lower(), ENGINES)
            raise ValueError(
                f"rollout.engine = {self.engine!r}: expected {', '.join(ENGINES)}, or package.module:function{hint}"
            )
        if self.fresh_paths is not None and self.fresh_paths > self.paths:
            raise ValueError(f"rollout.fresh_paths = {self.fresh_paths}: expected <= rollout.paths ({self.paths})")


@dataclass(frozen=True)
class VLLMConfig(Section):
    """vLLM as the rollout engine (docs/vllm.md)."""

    section: ClassVar[str] = "vllm"
    endpoints: tuple[str, ...] = key((), "base URLs of running `vllm serve`; none: engines are started on this machine")
    replicas: int = key(1, "engines on this machine; more than one only without GPUs", low=1)
    dtype: Literal["float32", "bfloat16", "float16"] | None = key(None, "of the engine's weights; null: model.dtype")
    max_model_len: int | None = key(None, "longest sequence, prompt included; null: what the model can do", low=2)
    max_num_seqs: int = key(256, "sequences that are decoded at the same time", low=1)
    enforce_eager: bool = key(False, "no CUDA graphs and no compilation: starts sooner, decodes slower")
    gpu_memory_utilization: float = key(
        0.45, "part of a GPU's memory for the engine; the trainer needs room", above=0, high=1
    )
    kv_cache_gib: float = key(1.0, "memory for keys and values where there is no GPU", above=0)
    weights_dir: str | None = key(
        None,
        "where new weights are handed over, seen by trainer and engines; null: shared memory or temporary files, for "
        "vllm.endpoints the directory that the server names",
    )
    request_timeout: float = key(
        3600.0, "seconds that a server may take for one segment, then it counts as gone", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights_dir is not None:
            object.__setattr__(self, "weights_dir", expanded("vllm.weights_dir", self.weights_dir))
        shown = [re.sub(r"//.*@", "//..@", url, flags=re.DOTALL) for url in self.endpoints]  # never a password
        servers = [server_of(url) for url in self.endpoints]
        if shown != list(self.endpoints):
            raise ValueError(f"vllm.endpoints = {shown}: expected no user or password; the key is VLLM_API_KEY")
        if None in servers or len(set(servers)) < len(servers):
            raise ValueError(f"vllm.endpoints = {shown}: expected different URLs such as http://host:8000")


def server_of(url: str) -> tuple[str, str, int, str] | None:
    """Scheme, host, port and path of a base URL; None: it is none."""
    if not url.isprintable() or set(url) & set(" \\?#"):
        return None
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if host is None or parts.scheme not in ("http", "https") or port == 0:
            return None
        if ":" in host:
            IPv6Address(host)
        elif not re.fullmatch(r"[\w.-]+", host):
            return None
    except ValueError:
        return None
    return parts.scheme, host, port or {"http": 80, "https": 443}[parts.scheme], parts.path.rstrip("/")
