"""vLLM engines behind HTTP: `vllm serve` with the aepo plugin, through its OpenAI-compatible completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aepo.files.weight_directory import PARTLY_LOADED
from aepo.rollout.engine import GenerationRequest
from aepo.rollout.engines.vllm import answers as vllm_answers
from aepo.rollout.engines.vllm.http import ANSWER, ANSWER_BYTES, ask, http_client
from aepo.rollout.engines.vllm.loop_thread import LoopThread
from aepo.rollout.engines.vllm.replica import (
    LOGPROBS_MODE,
    Completion,
    Recorded,
    ReplicaError,
    ReplicaGoneError,
    partly_loaded,
    sampling_settings,
)

if TYPE_CHECKING:
    from aepo.vllm.weights import WeightClient

HEARTBEAT = 30.0  # seconds of silence after which a server is asked whether it is alive
# Of one message to the plugin's routes, which refuse more (aepo/vllm/endpoints.py).
KEYS, TOKENS = 4096, 1 << 20
# Of answers: a token comes with its log-prob and three times as text, a prompt token as its id, an entropy has 25.
TOKEN_BYTES, PROMPT_TOKEN_BYTES, ENTROPY_BYTES = 4096, 16, 32
NAN_REFUSED = "Out of range float values"  # what vLLM's JSON encoder says


class RemoteReplica:
    """`Replica` at a base URL such as http://host:8000.

    How long a text takes is not known. So a server that has said nothing for a while is asked for its status, which its
    engine answers between two steps: it is gone when it does not, and when one segment takes longer than `longest` [s].
    """

    def __init__(self, url: str, status: Mapping[str, Any], model: str, eos_ids: Sequence[int], longest: float) -> None:
        self.name = url
        self.max_positions: int = status["max_model_len"]
        self._weights_dir: str | None = status["weights_dir"]
        self._vocab_size: int = status["vocab_size"]
        self._client = http_client(url)
        self._asking = http_client(url)  # connections of its own: generating may hold all of the other's
        self._model = model
        self._eos_ids = list(eos_ids)
        self._longest = longest
        self._heard = time.monotonic()
        self._beat = asyncio.Lock()

    @classmethod
    async def connect(
        cls, url: str, eos_ids: Sequence[int], vocab_size: int, *, updatable: bool, longest: float
    ) -> RemoteReplica:
        """updatable: weights will be sent. ConnectionError: it does not answer, or not what is expected, or has a part
        of new weights and gets no others. ValueError: it was started without what we need, which is named."""
        path, missing = "/aepo/status", "started without VLLM_PLUGINS=aepo"
        async with http_client(url) as client:
            answer = await ask(client, url, "/v1/models", method="GET", seconds=ANSWER)
            with vllm_answers.checking(url, "/v1/models"):
                model = vllm_answers.model_name(answer)
            answer = await ask(client, url, path, method="GET", seconds=ANSWER, if_not_found=missing)
        with vllm_answers.checking(url, path):
            status = vllm_answers.status(answer)
        for name, found, expected in (
            ("vocabulary", status["vocab_size"], vocab_size),
            ("--logprobs-mode", status["logprobs_mode"], LOGPROBS_MODE),
        ):
            if found != expected:
                raise ValueError(f"{url}: {name} is {vllm_answers.quoted(found)}, expected {expected}")
        if updatable and status["weights_dir"] is None:
            raise ValueError(f"{url}: {vllm_answers.one_line(status['no_weights'])}")
        if not updatable and status["weight_version"] == PARTLY_LOADED:
            raise partly_loaded(url)
        return cls(url, status, model, eos_ids, longest)

    def shared_directory(self) -> str:
        """Where that server, which is `updatable`, reads new weights from. ReplicaError: this machine does not have it
        or cannot write there."""
        assert self._weights_dir is not None
        with vllm_answers.checking(self.name, "/aepo/status"):
            return vllm_answers.shared_directory(self._weights_dir)

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
        path = "/v1/completions"
        most = ANSWER_BYTES + TOKEN_BYTES * request.max_new_tokens + PROMPT_TOKEN_BYTES * len(request.token_ids)
        try:
            answer = await self._watched(ask(self._client, self.name, path, body, seconds=None, most=most))
        except ReplicaError as error:
            if NAN_REFUSED in str(error):
                raise FloatingPointError(f"{self.name}: the model's logits are not finite: {error}") from error
            raise
        with vllm_answers.checking(self.name, path):
            return vllm_answers.completion(answer, request, self._vocab_size)

    async def _watched(self, generating: Coroutine[Any, Any, Any]) -> Any:
        """The completion, as long as the server is alive."""
        started = time.monotonic()
        work = asyncio.ensure_future(generating)
        try:
            while not work.done():
                left = started + self._longest - time.monotonic()
                if left <= 0:
                    raise ReplicaGoneError(f"{self.name} did not finish a segment within {self._longest:g} s")
                await asyncio.wait({work}, timeout=min(HEARTBEAT, left))
                if not work.done():
                    await self._check_alive()
            self._heard = time.monotonic()
            return work.result()
        finally:
            work.cancel()
            await asyncio.wait({work})  # until the connection is closed, which aborts the request

    async def _check_alive(self) -> None:
        async with self._beat:  # one for all that wait
            if time.monotonic() - self._heard >= HEARTBEAT:
                await ask(self._asking, self.name, "/aepo/status", method="GET", seconds=ANSWER)
                self._heard = time.monotonic()

    async def entropies(self, lengths: Mapping[str, int]) -> Recorded:
        values: dict[str, Sequence[float]] = {}
        version, path = None, "/aepo/entropies"
        for part in _parts(lengths):
            most = ANSWER_BYTES + ENTROPY_BYTES * sum(part.values())
            answer = await self._post(path, {"keys": part}, most)
            with vllm_answers.checking(self.name, path):
                read = vllm_answers.recorded(answer, part, self._vocab_size)
            if version not in (None, read.version):
                raise ReplicaError(f"{self.name}: the weights changed, from {version} to {read.version}")
            values |= read.entropies
            version = read.version
        return Recorded(values, version)

    async def forget(self, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), KEYS):
            await self._post("/aepo/forget", {"keys": list(keys[start : start + KEYS])})

    def weight_client(self, loop: LoopThread) -> WeightClient:
        from aepo.rollout.engines.vllm.weight_clients import RemoteWeightClient

        return RemoteWeightClient(self.name, loop)

    async def close(self) -> None:
        """The server goes on."""
        await self._client.aclose()
        await self._asking.aclose()

    async def _post(self, path: str, body: dict[str, Any], most: int = ANSWER_BYTES) -> Any:
        answer = await ask(self._asking, self.name, path, body, seconds=ANSWER, most=most)
        self._heard = time.monotonic()
        return answer


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
