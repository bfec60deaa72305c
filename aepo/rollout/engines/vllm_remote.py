"""vLLM engines behind HTTP: `vllm serve` with the aepo plugin, through its OpenAI-compatible completions."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import httpx

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

if TYPE_CHECKING:
    from aepo.vllm.weights import WeightClient

# Reading waits as long as generating takes; connecting to a server that is there does not.
TIMEOUT = httpx.Timeout(None, connect=10.0)


class RemoteReplica:
    """`Replica` at a base URL such as http://host:8000."""

    def __init__(
        self, url: str, client: httpx.AsyncClient, model: str, max_positions: int, eos_ids: Sequence[int]
    ) -> None:
        self.name = url
        self.max_positions = max_positions
        self._client = client
        self._model = model
        self._eos_ids = list(eos_ids)

    @classmethod
    async def connect(cls, url: str, eos_ids: Sequence[int], vocab_size: int, *, updatable: bool) -> RemoteReplica:
        """updatable: weights will be sent. ConnectionError: it does not answer. ValueError: it was started without what
        we need, which is named."""
        client = httpx.AsyncClient(base_url=url.rstrip("/"), timeout=TIMEOUT)
        try:
            models = await _json(url, client.get("/v1/models"))
            status = await _json(url, client.get("/aepo/status"), "started without VLLM_PLUGINS=aepo")
            if updatable:
                await _json(url, client.get("/weight_info"), "started without VLLM_SERVER_DEV_MODE=1")
            for name, found, expected in (
                ("vocabulary", status["vocab_size"], vocab_size),
                ("--logprobs-mode", status["logprobs_mode"], LOGPROBS_MODE),
            ):
                if found != expected:
                    raise ValueError(f"{url}: {name} is {found}, expected {expected}")
        except BaseException:
            await client.aclose()
            raise
        return cls(url, client, models["data"][0]["id"], status["max_model_len"], eos_ids)

    async def complete(self, request: GenerationRequest, key: str) -> Completion:
        body = {
            "model": self._model,
            "prompt": list(request.token_ids),
            **sampling_settings(request, self._eos_ids),
            # The server's defaults may be those of the model's generation_config: nothing but the temperature may act.
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "return_token_ids": True,
            "vllm_xargs": {"aepo_key": key},
        }
        answer = await self._post("/v1/completions", body)
        (choice,) = answer["choices"]
        return Completion(
            tuple(choice["token_ids"]),
            tuple(choice["logprobs"]["token_logprobs"]),
            finish_reason(choice["finish_reason"], choice["stop_reason"]),
            answer["usage"]["prompt_tokens"] - (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0),
            version=None,
        )

    async def entropies(self, lengths: Mapping[str, int]) -> Recorded:
        answer = await self._post("/aepo/entropies", {"keys": dict(lengths)})
        # JSON has no NaN
        values = {key: [math.nan if x is None else x for x in row] for key, row in answer["entropies"].items()}
        return Recorded(values, answer["weight_version"])

    async def forget(self, keys: Sequence[str]) -> None:
        await self._post("/aepo/forget", {"keys": list(keys)})

    def weight_client(self, loop: LoopThread) -> WeightClient:
        from aepo.rollout.engines.vllm_weight_clients import RemoteWeightClient

        return RemoteWeightClient(self.name)

    async def close(self) -> None:
        """The server goes on."""
        await self._client.aclose()

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        return await _json(self.name, self._client.post(path, json=body))


async def _json(url: str, work: Awaitable[httpx.Response], if_not_found: str = "") -> Any:
    """The answer's content. ReplicaGoneError: there is none. ValueError: the server refuses, with its words."""
    try:
        response = await work
    except httpx.TransportError as error:
        raise ReplicaGoneError(f"{url} does not answer: {type(error).__name__} {error}") from error
    if response.status_code >= 500:
        raise ReplicaGoneError(f"{url} failed with status {response.status_code}: {response.text[:500]}")
    if response.status_code >= 400:
        hint = f"{if_not_found} ({response.request.url.path})" if response.status_code == 404 and if_not_found else ""
        words = f"refused {response.request.url.path} with status {response.status_code}: {response.text[:500]}"
        raise ValueError(f"{url}: {hint or words}")
    return response.json()
