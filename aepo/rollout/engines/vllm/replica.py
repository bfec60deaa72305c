"""One vLLM engine as `VLLMEngine` sees it, on this machine (local.py) or behind HTTP (remote.py): what it is asked,
what it answers, how it fails.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from aepo.rollout.engine import GenerationRequest
from aepo.rollout.engines.vllm.loop_thread import LoopThread
from aepo.types import TokenIds

if TYPE_CHECKING:
    from aepo.vllm.weights import WeightClient

LOGPROBS_MODE = "processed_logprobs"  # of vLLM: at the request's temperature

FinishReason = Literal["stop", "eos", "length", "abort"]


class ReplicaError(ConnectionError):
    """A replica refuses, answers what cannot be right, or has weights that are not ours."""


class ReplicaGoneError(ReplicaError):
    """A replica has died or cannot be reached. Others may go on with its requests."""


def partly_loaded(name: str) -> ReplicaError:
    """Of a replica that calls its weights so."""
    return ReplicaError(f"{name}: an update of its weights did not finish, a part may be old: send again or restart it")


@dataclass(frozen=True, slots=True)
class Completion:
    """What a replica wrote; its entropies are fetched by key."""

    token_ids: TokenIds
    logprobs: tuple[float, ...]  # under the sampling distribution
    finish_reason: FinishReason
    prefilled: int  # tokens of the prefix that no cache had
    version: str | None  # of the weights, where the replica stamps it on the tokens


@dataclass(frozen=True, slots=True)
class Recorded:
    """Entropies by key, and the version of the weights when they were read, where the replica tells it."""

    entropies: Mapping[str, Sequence[float]]
    version: str | None


class Replica(Protocol):
    """One vLLM engine. Each method raises `ReplicaGoneError` if it is not there any more."""

    name: str
    max_positions: int

    async def complete(self, request: GenerationRequest, key: str) -> Completion:
        """Generate one segment, its entropies recorded under `key`. Cancelling aborts it in the engine."""
        ...

    async def entropies(self, lengths: Mapping[str, int]) -> Recorded:
        """Hand out and drop what was recorded under these keys: so many tokens each."""
        ...

    async def forget(self, keys: Sequence[str]) -> None:
        """Drop what was recorded under those of these keys that exist."""
        ...

    def weight_client(self, loop: LoopThread) -> WeightClient:
        """What a `WeightSender` steers, from any thread but the loop's."""
        ...

    async def close(self) -> None: ...


def sampling_settings(request: GenerationRequest, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Of one segment, in the names that vLLM's SamplingParams and its completions share."""
    return {
        "temperature": request.temperature,
        "max_tokens": request.max_new_tokens,
        "seed": request.seed >> 1,  # vLLM's are signed
        "stop": list(request.stop),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # tags may be special tokens
        "spaces_between_special_tokens": False,
        "ignore_eos": True,  # exactly these end a text:
        "stop_token_ids": list(eos_ids),
        "logprobs": 0,  # of the sampled token alone
    }


def finish_reason(reason: str | None, stopped_by: int | str | None) -> FinishReason:
    """vLLM's words in ours: a stop string is "stop", a token that ends a text "eos"."""
    if reason == "stop":
        return "stop" if isinstance(stopped_by, str) else "eos"
    if reason in ("length", "abort"):
        return reason  # type: ignore[return-value]  # mypy does not narrow to the literals
    found = reprlib.repr(reason)  # a server's may be long
    raise RuntimeError(f"vLLM ended a request with finish_reason = {found}, expected stop, length or abort")
