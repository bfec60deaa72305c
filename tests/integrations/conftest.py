"""Real vLLM engines over a tiny random Qwen3, in this process: `.venv/bin/python -m pytest tests/integrations`.

A process of its own, because an engine changes what torch does in the whole process. Both of vLLM's model runners run
here. The second one is the default on GPUs and needs Triton, whose interpreter serves it on a CPU: the entry for a "cpu"
backend, which Triton as published lacks, is all that vLLM looks for.
"""

import os
from types import SimpleNamespace

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # logprobs compile a C++ helper in 14 s without
    "TRITON_INTERPRET": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
os.environ.update(ENVIRONMENT)

import gc

import pytest
import torch
import triton.backends

from tests.aepo.engine_toys import model, tokenizer

triton.backends.backends.setdefault(
    "cpu", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A random model of 260 tokens, 256 of them bytes, in float32; its output layer is not tied (docs/vllm.md)."""
    path = tmp_path_factory.mktemp("model")
    # vLLM's attention on CPUs has no heads of 8
    model(dtype=torch.float32, head_dim=32, tie_word_embeddings=False).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def make_llm(model_dir: str, runner: str = "v1", **changes):
    """A vllm.LLM in this process that records entropies. `changes`: any of its arguments."""
    import vllm.envs  # after the lines above

    vllm.envs.disable_envs_cache()  # which the engine before this one has turned on
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if runner == "v2" else "0"
    settings = {
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
        "dtype": "float32",
        "logits_processors": ["aepo.vllm:EntropyProcessor"],
        "worker_extension_cls": "aepo.vllm.EntropyWorkerExtension",
        "kv_cache_memory_bytes": 64 << 20,
        **changes,
    }
    return vllm.LLM(model_dir, **settings)


@pytest.fixture(scope="session", params=["v1", "v2"])
def llm(request, model_dir):
    """One engine per runner for everything that needs no engine of its own."""
    yield make_llm(model_dir, request.param)
    gc.collect()
