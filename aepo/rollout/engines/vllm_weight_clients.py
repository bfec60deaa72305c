"""How a `WeightSender` reaches the replicas: vLLM's calls of a weight update, on an `AsyncLLM` and over HTTP.

All of them are called by the trainer's thread and return when the engine has answered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import requests
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.v1.engine.async_llm import AsyncLLM

from aepo.rollout.engines.vllm import ReplicaGoneError


class LocalWeightClient:
    """`WeightClient` of an engine on this machine. run: waits for a call to it, on the loop that it lives on."""

    def __init__(self, name: str, llm: AsyncLLM, run: Callable[[Awaitable[Any]], Any]) -> None:
        self.name = name
        self._llm = llm
        self._run = run

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._run(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info)))

    def start_weight_update(self) -> None:
        self._run(self._llm.start_weight_update())

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._run(self._llm.update_weights(WeightTransferUpdateRequest(update_info)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._run(self._llm.finish_weight_update(weight_version))

    def reset_prefix_cache(self) -> bool:
        return self._run(self._llm.reset_prefix_cache())


class RemoteWeightClient(HTTPVLLMWeightSyncClient):
    """`WeightClient` of a `vllm serve`, through the routes that VLLM_SERVER_DEV_MODE=1 opens."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.name = url

    def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
        try:
            super()._post(path, json)
        except requests.ConnectionError as error:
            raise ReplicaGoneError(f"{self.name} does not answer: {error}") from error

    def reset_prefix_cache(self) -> bool:
        response = requests.post(f"{self.base_url}/reset_prefix_cache", timeout=self.timeout)
        response.raise_for_status()
        return response.json()["success"]
