"""vLLM engines on this machine: one `AsyncLLM` each, in processes of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig
from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.config import WeightTransferConfig
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from aepo.config import VLLMConfig
from aepo.rollout.engine import GenerationRequest
from aepo.rollout.engines.vllm import (
    LOGPROBS_MODE,
    Completion,
    LoopThread,
    Recorded,
    ReplicaGoneError,
    finish_reason,
    sampling_settings,
)
from aepo.rollout.engines.vllm_weight_clients import LocalWeightClient
from aepo.vllm import entropy_status_async, fetch_entropies_async, forget_entropies_async
from aepo.vllm.weights import BACKEND

Result = TypeVar("Result")


async def start_replicas(
    model_dir: Path, *, eos_ids: Sequence[int], settings: VLLMConfig, version: int, seed: int
) -> list[LocalReplica]:
    """`settings.replicas` engines, started at the same time. ValueError: more than one on a machine with GPUs."""
    if settings.replicas > 1 and torch.cuda.is_available():
        raise ValueError(
            f"vllm.replicas = {settings.replicas}: all of them would share the same GPUs; run one `vllm serve` per GPU "
            "(CUDA_VISIBLE_DEVICES) and list them in vllm.endpoints"
        )
    arguments = engine_args(model_dir, settings, seed)
    names = [f"replica {index}" for index in range(settings.replicas)]
    starts = [asyncio.to_thread(AsyncLLM.from_engine_args, arguments) for _ in names]
    engines = await asyncio.gather(*starts, return_exceptions=True)
    failures = [engine for engine in engines if isinstance(engine, BaseException)]
    for engine in engines:
        if isinstance(engine, BaseException):
            continue
        if failures:
            engine.shutdown()
        else:
            await engine.update_weight_version(str(version))
            await entropy_status_async(engine)  # fails where entropies cannot be recorded
    if failures:
        raise failures[0]
    return [LocalReplica(name, engine, eos_ids) for name, engine in zip(names, engines, strict=True)]


def engine_args(model_dir: Path, settings: VLLMConfig, seed: int) -> AsyncEngineArgs:
    """What every engine of a rollout needs, and what the configuration says."""
    place: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_utilization}
    if not torch.cuda.is_available():
        # A seeded request whose prompt comes in parts kills the CPU engine of vLLM 0.32 ("CPU Generator does not use
        # offset"), so prompts must come whole. Prefixes are cached in whole blocks, which have 128 tokens there unless
        # one says otherwise.
        place = {
            "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
            "enable_chunked_prefill": False,
            "block_size": 32,
        }
    return AsyncEngineArgs(
        model=str(model_dir),
        # Not "auto", which turns float32 into bfloat16
        dtype=settings.dtype or str(AutoConfig.from_pretrained(model_dir).dtype).removeprefix("torch."),
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        enforce_eager=settings.enforce_eager,
        seed=seed,
        generation_config="vllm",  # not the model's: its top-p would change the distribution that is trained on
        logprobs_mode=LOGPROBS_MODE,
        logits_processors=["aepo.vllm:EntropyProcessor"],
        worker_extension_cls="aepo.vllm.EntropyWorkerExtension",
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        disable_log_stats=True,
        **place,
    )


class LocalReplica:
    """`Replica` over an `AsyncLLM` that was started on the running loop."""

    def __init__(self, name: str, llm: AsyncLLM, eos_ids: Sequence[int]) -> None:
        self.name = name
        self.max_positions: int = llm.model_config.max_model_len
        self._llm = llm
        self._eos_ids = list(eos_ids)

    async def complete(self, request: GenerationRequest, key: str) -> Completion:
        return await self.alive(self._complete(request, key))

    async def _complete(self, request: GenerationRequest, key: str) -> Completion:
        prompt = TokensPrompt(prompt_token_ids=list(request.token_ids))
        async for output in self._llm.generate(prompt, self._sampling(request, key), request_id=key):
            last = output.outputs[0]
        token_ids = tuple(last.token_ids)
        steps = zip(last.logprobs or (), token_ids, strict=True)
        logprobs = tuple(step[token].logprob for step, token in steps if step is not None)
        spans = last.weight_versions or ()
        versions = [span.version for span in spans if span.end > span.start]
        if len(versions) > 1:
            raise RuntimeError(f"{self.name}: the weights changed within a segment, versions {' to '.join(versions)}")
        return Completion(
            token_ids,
            logprobs,
            finish_reason(last.finish_reason, last.stop_reason),
            len(request.token_ids) - (output.num_cached_tokens or 0),
            versions[0] if versions else None,
        )

    def _sampling(self, request: GenerationRequest, key: str) -> SamplingParams:
        return SamplingParams(
            **sampling_settings(request, self._eos_ids),
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"aepo_key": key},
        )

    async def entropies(self, lengths: Mapping[str, int]) -> Recorded:
        return Recorded(await self.alive(fetch_entropies_async(self._llm, lengths)), version=None)

    async def forget(self, keys: Sequence[str]) -> None:
        await self.alive(forget_entropies_async(self._llm, keys))

    def weight_client(self, loop: LoopThread) -> LocalWeightClient:
        return LocalWeightClient(self.name, self._llm, lambda call: loop.run(self.alive(call)))

    async def close(self) -> None:
        self._llm.shutdown()
        del self._llm  # its destructor fails where it runs as late as Python's end

    async def alive(self, work: Awaitable[Result]) -> Result:
        """The result; ReplicaGoneError if the engine's process dies, which leaves calls to its workers unanswered."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=0.5)
                if self._llm.errored and not task.done():
                    raise EngineDeadError()
            return task.result()
        except EngineDeadError as error:
            raise ReplicaGoneError(f"{self.name}: the engine's process has died") from error
        finally:
            task.cancel()
            await asyncio.wait({task})  # until a request is aborted: only then has it no record any more
