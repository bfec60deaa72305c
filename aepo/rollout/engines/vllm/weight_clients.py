"""How a `WeightSender` reaches the replicas: an `AsyncLLM` of this process, and a `vllm serve` over HTTP.

All of them are called by the trainer's thread and return when the engine has answered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.v1.engine.async_llm import AsyncLLM

from aepo.rollout.engines.vllm import answers as vllm_answers
from aepo.rollout.engines.vllm.http import ANSWER, api_key, ask, http_client
from aepo.rollout.engines.vllm.loop_thread import LoopThread
from aepo.rollout.engines.vllm.replica import ReplicaError
from aepo.vllm.weights import finish_update, process_secret, signing_secret

Result = TypeVar("Result")
SLOWEST = 50e6  # bytes per second: an engine reads and hashes the files, 0.8e9 on one core of a CPU


class LocalWeightClient:
    """`WeightClient` of an engine on this machine. run: waits for a call to it, on the loop that it lives on."""

    def __init__(self, name: str, llm: AsyncLLM, run: Callable[[Awaitable[Any]], Any]) -> None:
        self.name = name
        self.secret = process_secret()
        self._llm = llm
        self._run = run

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._run(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info)))

    def start_weight_update(self) -> list[str]:
        self._run(self._llm.start_weight_update())
        return self._run(self._llm.collective_rpc("aepo_nonce"))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._run(self._llm.update_weights(WeightTransferUpdateRequest(update_info)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if weight_version is None:  # an update was withdrawn
            self._run(self._llm.finish_weight_update())
        else:
            self._run(finish_update(self._llm, weight_version))

    def reset_prefix_cache(self) -> bool:
        return self._run(self._llm.reset_prefix_cache())


class RemoteWeightClient:
    """`WeightClient` of a `vllm serve` with our plugin, through its routes. The key is VLLM_API_KEY of the environment.

    loop: where it is spoken to; None: a thread of its own. `ReplicaGoneError`: it does not answer in time.
    `ReplicaError`: it refuses, with its words, or loads other weights than those that were sent.
    """

    def __init__(self, url: str, loop: LoopThread | None = None) -> None:
        self.name = url
        self.secret = signing_secret(api_key() or "")
        self._loop = loop or LoopThread()
        self._bytes = 0  # of the update that is under way

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The server has told its engine when it started."""

    def start_weight_update(self) -> list[str]:
        return self._post("start", read=vllm_answers.nonces)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if update_info["withdraw"]:
            self._post("withdraw", read=_accepted)
            return
        self._bytes = sum(file["bytes"] for file in update_info["files"])
        self._post("update", update_info, self._bytes / SLOWEST, read=_accepted)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Stamped is the version that was signed; without one an update was withdrawn, which has finished it.

        ReplicaError: the server has loaded another version, which somebody else has sent."""
        if weight_version is None:
            return
        loaded = self._post("finish", longer=self._bytes / SLOWEST, read=vllm_answers.weight_version)
        if loaded != weight_version:
            raise ReplicaError(
                f"{self.name}: loaded weights version {loaded}, expected {weight_version}: somebody else sends weights"
            )

    def reset_prefix_cache(self) -> bool:
        return self._post("reset_prefix_cache", read=lambda answer: vllm_answers.field(answer, "success", bool))

    def _post(
        self,
        step: str,
        body: dict[str, Any] | None = None,
        longer: float = 0.0,
        *,
        read: Callable[[Any], Result],
    ) -> Result:
        path = f"/aepo/weights/{step}"

        async def post() -> Any:
            async with http_client(self.name) as client:
                return await ask(client, self.name, path, body, seconds=ANSWER + longer)

        answer = self._loop.run(post())
        with vllm_answers.checking(self.name, path):
            return read(answer)


def _accepted(answer: Any) -> None:
    if not isinstance(answer, dict):
        raise ValueError(f"expected an object, got {vllm_answers.quoted(answer)}")
