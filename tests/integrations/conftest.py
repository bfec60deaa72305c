"""Real vLLM engines over a tiny random Qwen3, in this process: `make test-vllm`.

A process per file, because an engine changes what torch does in the whole process, and stays in it. Both of vLLM's
model runners run here. The second one, the default on GPUs, needs Triton; on a CPU the interpreter serves it, and all
that vLLM looks for is an entry for a "cpu" backend, which Triton as published lacks.
"""

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    TORCHDYNAMO_DISABLE="1",  # logprobs compile a C++ helper for 14 s without
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

import shutil
from types import SimpleNamespace

import pytest
import torch
import triton.backends

from tests.aepo.engine_toys import model, tokenizer
from tests.integrations.server import KEY, served

if not torch.cuda.is_available():  # tests/conftest.py has turned the interpreter on
    backend = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
    triton.backends.backends.setdefault("cpu", backend)

ENGINES = []  # all of them until the end: one that is collected takes the process-wide groups of all with it


def qwen(dtype):
    """260 tokens, 256 of them bytes. vLLM's attention on CPUs has no heads of 8; its reload breaks tied embeddings."""
    return model(dtype=dtype, head_dim=32, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    qwen(torch.float32).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def make_llm(model_dir: str, runner: str = "v1", **changes):
    """A vllm.LLM in this process that records entropies. `changes`: any of its arguments."""
    import vllm.envs  # after the lines above
    from vllm.v1.sample.ops import topk_topp_sampler

    if not torch.cuda.is_available():
        topk_topp_sampler.HAS_TRITON = False  # the interpreter cannot run its kernel; vLLM has it in PyTorch too
    vllm.envs.disable_envs_cache()  # which the engine before this one has turned on
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if runner == "v2" else "0"
    settings = {
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
        "max_logprobs": -1,
        "dtype": "float32",
        "kv_cache_memory_bytes": 64 << 20,
        "logits_processors": ["aepo.vllm:EntropyProcessor"],
        "worker_extension_cls": "aepo.vllm.EntropyWorkerExtension",
        **changes,
    }
    ENGINES.append(vllm.LLM(model_dir, **settings))
    return ENGINES[-1]


@pytest.fixture(scope="session", params=["v1", "v2"])
def llm(request, model_dir):
    """One engine per runner for everything that needs no engine of its own. Requests fit in one step's tokens."""
    return make_llm(model_dir, request.param)


@pytest.fixture(scope="session")
def url(model_dir, tmp_path_factory):
    """A server of the same model; its weights are those of whoever has sent some."""
    path = tmp_path_factory.mktemp("served")
    shutil.copytree(model_dir, path, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, served(path) as address:
        patch.setenv("VLLM_API_KEY", KEY)
        yield address
