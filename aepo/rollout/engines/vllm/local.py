"""vLLM engines on this machine: one `AsyncLLM` each, in processes of its own."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import vllm.envs
from pydantic import ValidationError
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import AutoConfig
from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.config import WeightTransferConfig
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from aepo.config import VLLMConfig
from aepo.models.key_values import KeyValueShape
from aepo.rollout.engine import GenerationRequest
from aepo.rollout.engines.vllm.loop_thread import LoopThread
from aepo.rollout.engines.vllm.orphans import OrphanGuard
from aepo.rollout.engines.vllm.replica import (
    LOGPROBS_MODE,
    Completion,
    Recorded,
    ReplicaError,
    ReplicaGoneError,
    finish_reason,
    sampling_settings,
)
from aepo.rollout.engines.vllm.weight_clients import LocalWeightClient
from aepo.vllm import entropy_status_async, fetch_entropies_async, forget_entropies_async
from aepo.vllm.weights import BACKEND

Result = TypeVar("Result")
HEARTBEAT = 30.0  # seconds without a result after which an engine is asked whether it is there
ANSWER = 300.0  # seconds for that: it does not answer while it loads new weights


async def start_replicas(
    model_dir: Path, *, eos_ids: Sequence[int], settings: VLLMConfig, version: str, seed: int, guard: OrphanGuard
) -> list[LocalReplica]:
    """`settings.replicas` engines, started at the same time, in processes marked by `guard`. If one of them fails, or
    this is cancelled, none is left.

    ValueError: more than one on a machine with GPUs; vLLM refuses the settings.
    """
    if settings.replicas > 1 and torch.cuda.is_available():
        raise ValueError(
            f"vllm.replicas = {settings.replicas}: all of them would share the same GPUs; run one `vllm serve` per GPU "
            "(CUDA_VISIBLE_DEVICES) and list them in vllm.endpoints"
        )
    arguments = engine_args(model_dir, settings, seed)
    names = [f"replica {index}" for index in range(settings.replicas)]
    vllm.envs.disable_envs_cache()  # an engine before this one has turned it on, with a directory that is gone
    starts: list[Future[AsyncLLM]] = []
    place = str(guard.directory)
    with guard.environment(
        VLLM_RPC_BASE_PATH=place,  # sockets; vLLM leaves some behind, also when it is shut down
        VLLM_CPU_KVCACHE_SPACE=None,  # would be taken in place of vllm.kv_cache_gib
        VLLM_WORKER_MULTIPROC_METHOD="spawn",  # a fork shows the environment that its parent began with
        TORCHINDUCTOR_CACHE_DIR=os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir(),  # not in `place`
    ):
        pool = ThreadPoolExecutor(len(names), thread_name_prefix="aepo-vllm-start")
        try:
            starts += [pool.submit(AsyncLLM.from_engine_args, arguments) for _ in names]
            engines = await asyncio.gather(*map(asyncio.wrap_future, starts))
            replicas = [LocalReplica(name, llm, eos_ids) for name, llm in zip(names, engines, strict=True)]
            for replica in replicas:
                await replica.begin(version)
        except BaseException as error:
            _end_starts(starts, guard)
            if isinstance(error, ValueError):  # pydantic's, with a page of text
                raise ValueError(refusal(error)) from None
            if isinstance(error, RuntimeError) and "initialization failed" in str(error):
                raise ValueError(failed_start(str(error), model_dir, settings, arguments)) from None
            raise
        finally:
            pool.shutdown(wait=False)
    return replicas


def _end_starts(starts: Sequence[Future[AsyncLLM]], guard: OrphanGuard) -> None:
    """A start cannot be cancelled. It fails when its process dies, which it may be just about to make. Not a coroutine:
    nothing is to cancel this."""
    guard.kill()
    while wait(starts, timeout=0.1).not_done:
        guard.kill()
    for start in starts:
        if start.exception() is None:
            start.result().shutdown()


def refusal(error: ValueError) -> str:
    """One line of what vLLM says about a setting, with our name for it."""
    said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    said = " ".join(said.removeprefix("Value error, ").split()).split(". ")[0]  # what follows are vLLM's own options
    named = [f"vllm.{field.name}" for field in fields(VLLMConfig) if field.name in said]
    return f"vLLM refuses {' and '.join(named) or 'these settings'}: {said}"


def failed_start(said: str, model_dir: Path, settings: VLLMConfig, arguments: AsyncEngineArgs) -> str:
    """One line about an engine's process that ended while it started. Its reason is known in that process alone.

    said: by vLLM about it, "..Failed core proc(s): {'EngineCore': EXIT_CODE}"; of one that was just killed often "{}".
    """
    memory = f"vllm.gpu_memory_utilization = {settings.gpu_memory_utilization:g}"
    if arguments.kv_cache_memory_bytes is not None:
        memory = f"vllm.kv_cache_gib = {settings.kv_cache_gib:g}"
        config = AutoConfig.from_pretrained(model_dir).get_text_config()
        positions = settings.max_model_len or config.max_position_embeddings
        width = getattr(torch, str(arguments.dtype)).itemsize
        needed = KeyValueShape.of(config).per_token * width * positions / 2**30
        if needed > settings.kv_cache_gib:
            return (
                f"{memory}: keys and values of one sequence of {positions} positions (vllm.max_model_len) take "
                f"{needed:.3g} GiB"
            )
    found = re.search(r": (-?\d+)", said)
    code = f" (exit code {found[1]})" if found else ""
    return (
        f"vLLM's engine ended while it started{code}; its own message stands above, "
        "unless it was killed, by somebody or by the kernel for lack of memory. What it may lack memory for: "
        f"{memory}, vllm.max_model_len = {settings.max_model_len}, vllm.max_num_seqs = {settings.max_num_seqs}"
    )


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
            raise ReplicaError(f"{self.name}: the weights changed within a segment, versions {' to '.join(versions)}")
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

    async def begin(self, version: str) -> None:
        """The version of its weights. RuntimeError: entropies cannot be recorded there."""
        await self.alive(self._llm.update_weight_version(version))
        await self.alive(entropy_status_async(self._llm))

    async def close(self) -> None:
        """vLLM kills an engine that has not ended after VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS, 5."""
        await asyncio.to_thread(self._llm.shutdown)
        del self._llm  # its destructor fails where it runs as late as Python's end

    async def alive(self, work: Awaitable[Result]) -> Result:
        """The result; ReplicaGoneError if the engine's process dies, which leaves calls to its workers unanswered, or
        is silent: what work takes is not known, but an engine answers between two steps."""
        task = asyncio.ensure_future(work)
        asked = time.monotonic()
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=0.5)
                if self._llm.errored and not task.done():
                    raise EngineDeadError()
                if not task.done() and time.monotonic() - asked > HEARTBEAT:
                    await self._answer(task)
                    asked = time.monotonic()
            return task.result()
        except EngineDeadError as error:
            raise ReplicaGoneError(f"{self.name}: the engine's process has died") from error
        finally:
            task.cancel()
            await asyncio.wait({task})  # until a request is aborted: only then has it no record any more

    async def _answer(self, task: asyncio.Task[Any]) -> None:
        """Returns when the engine has answered, or the task has ended."""
        beat = asyncio.ensure_future(entropy_status_async(self._llm))
        try:
            deadline = time.monotonic() + ANSWER
            while not (task.done() or beat.done() or self._llm.errored):
                if time.monotonic() > deadline:
                    raise ReplicaGoneError(f"{self.name}: the engine's process has not answered for {ANSWER:g} s")
                await asyncio.wait({task, beat}, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
        finally:
            beat.cancel()
            await asyncio.wait({beat})
