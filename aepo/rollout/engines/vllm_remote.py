"""vLLM engines behind HTTP: `vllm serve` with the aepo plugin, through its OpenAI-compatible completions."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Mapping, Sequence
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
from aepo.rollout.engines.vllm_http import ANSWER, CONNECT, content, headers, reaching

if TYPE_CHECKING:
    from aepo.vllm.weights import WeightClient

HEARTBEAT = 30.0  # seconds of silence after which a server is asked whether it is alive
# Of one message to the plugin's routes, which refuse more (aepo/vllm/endpoints.py).
KEYS, TOKENS = 4096, 1 << 20


class RemoteReplica:
    """`Replica` at a base URL such as http://host:8000. `weights_dir`: where that server reads new weights from.

    How long a text takes is not known. So a server that has said nothing for a while is asked for its status, which its
    engine answers between two steps: it is gone when it does not, and when one segment takes longer than `longest` [s].
    """

    def __init__(self, url: str, status: Mapping[str, Any], model: str, eos_ids: Sequence[int], longest: float) -> None:
        self.name = url
        self.max_positions: int = status["max_model_len"]
        self.weights_dir: str | None = status["weights_dir"]
        self._client = _client(url, read=None)
        self._asking = _client(url, read=ANSWER)  # connections of its own: generating may hold all of the other's
        self._model = model
        self._eos_ids = list(eos_ids)
        self._longest = longest
        self._heard = time.monotonic()
        self._beat = asyncio.Lock()

    @classmethod
    async def connect(
        cls, url: str, eos_ids: Sequence[int], vocab_size: int, *, updatable: bool, longest: float
    ) -> RemoteReplica:
        """updatable: weights will be sent. ConnectionError: it does not answer. ValueError: it was started without what
        we need, which is named."""
        async with _client(url, read=ANSWER) as client:
            with reaching(url):
                models = content(url, await client.get("/v1/models"))
                response = await client.get("/aepo/status")
            status = content(url, response, "started without VLLM_PLUGINS=aepo")
        for name, found, expected in (
            ("vocabulary", status["vocab_size"], vocab_size),
            ("--logprobs-mode", status["logprobs_mode"], LOGPROBS_MODE),
        ):
            if found != expected:
                raise ValueError(f"{url}: {name} is {found}, expected {expected}")
        if updatable and status["weights_dir"] is None:
            raise ValueError(f"{url}: {status['no_weights']}")
        return cls(url, status, models["data"][0]["id"], eos_ids, longest)

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
        answer = await self._watched(body)
        (choice,) = answer["choices"]
        return Completion(
            tuple(choice["token_ids"]),
            tuple(choice["logprobs"]["token_logprobs"]),
            finish_reason(choice["finish_reason"], choice["stop_reason"]),
            answer["usage"]["prompt_tokens"] - (answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0),
            version=None,
        )

    async def _watched(self, body: dict[str, Any]) -> Any:
        """The completion, as long as the server is alive."""
        started = time.monotonic()
        work = asyncio.ensure_future(self._post(self._client, "/v1/completions", body))
        try:
            while not work.done():
                left = started + self._longest - time.monotonic()
                if left <= 0:
                    raise ReplicaGoneError(f"{self.name} did not finish a segment within {self._longest:g} s")
                await asyncio.wait({work}, timeout=min(HEARTBEAT, left))
                if not work.done():
                    await self._check_alive()
            return work.result()
        finally:
            work.cancel()
            await asyncio.wait({work})  # until the connection is closed, which aborts the request

    async def _check_alive(self) -> None:
        async with self._beat:  # one for all that wait
            if time.monotonic() - self._heard >= HEARTBEAT:
                with reaching(self.name):
                    content(self.name, await self._asking.get("/aepo/status"))
                self._heard = time.monotonic()

    async def entropies(self, lengths: Mapping[str, int]) -> Recorded:
        values: dict[str, list[float]] = {}
        version = None
        for part in _parts(lengths):
            answer = await self._post(self._asking, "/aepo/entropies", {"keys": part})
            # JSON has no NaN
            values |= {key: [math.nan if x is None else x for x in row] for key, row in answer["entropies"].items()}
            version = answer["weight_version"]
        return Recorded(values, version)

    async def forget(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), KEYS):
            await self._post(self._asking, "/aepo/forget", {"keys": list(keys[start : start + KEYS])})

    def weight_client(self, loop: LoopThread) -> WeightClient:
        from aepo.rollout.engines.vllm_weight_clients import RemoteWeightClient

        return RemoteWeightClient(self.name)

    async def close(self) -> None:
        """The server goes on."""
        await self._client.aclose()
        await self._asking.aclose()

    async def _post(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
        with reaching(self.name):
            response = await client.post(path, json=body)
        self._heard = time.monotonic()
        return content(self.name, response)


def _client(url: str, read: float | None) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url.rstrip("/"), timeout=httpx.Timeout(read, connect=CONNECT, pool=None), headers=headers()
    )


def _parts(lengths: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """In messages of at most KEYS keys and TOKENS tokens."""
    part: dict[str, int] = {}
    tokens = 0
    for key, length in lengths.items():
        if part and (len(part) == KEYS or tokens + length > TOKENS):
            yield part
            part, tokens = {}, 0
        part[key] = length
        tokens += length
    if part:
        yield part
