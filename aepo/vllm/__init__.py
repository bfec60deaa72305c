"""Exact entropies and branching decisions from inside vLLM, for any rollout code (docs/vllm.md). Imports vllm."""

from aepo.vllm.client import (
    EntropyError,
    entropy_status,
    entropy_status_async,
    fetch_decisions,
    fetch_decisions_async,
    fetch_entropies,
    fetch_entropies_async,
    forget_entropies,
    forget_entropies_async,
)
from aepo.vllm.extension import EntropyWorkerExtension
from aepo.vllm.processor import EntropyProcessor

__all__ = [
    "EntropyError",
    "EntropyProcessor",
    "EntropyWorkerExtension",
    "entropy_status",
    "entropy_status_async",
    "fetch_decisions",
    "fetch_decisions_async",
    "fetch_entropies",
    "fetch_entropies_async",
    "forget_entropies",
    "forget_entropies_async",
]
