"""What a rollout asks of an inference engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from aepo.registry import resolve_function
from aepo.types import TokenIds

if TYPE_CHECKING:
    from aepo.parallel import Weights


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Continue `token_ids`. The random numbers of output position i depend on (seed, i) and nothing else."""

    token_ids: TokenIds  # the whole prefix, never text: re-tokenising would change it
    max_new_tokens: int
    temperature: float  # > 0 and finite; 0 means greedy
    seed: int  # unsigned 64 bit
    stop: tuple[str, ...]  # generation ends with the token that completes one of these; that token is kept
    group: str = ""  # requests of one group share a beginning, so their prefix is best computed in one place


@dataclass(frozen=True, slots=True)
class Generation:
    """What the model wrote, with the exact log-probability and entropy [nats] of every token."""

    token_ids: TokenIds
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    finish_reason: Literal["stop", "eos", "length"]
    version: int  # of the weights


@dataclass
class EngineCounters:
    """Tokens since the engine was made."""

    asked: int = 0  # prefix tokens of all requests
    prefilled: int = 0  # those that went through the model; the others were there already, or shared by several rows
    generated: int = 0


class Engine(Protocol):
    """Batched generation that computes a shared prefix once.

    `lockstep` engines want all requests of a wave in one call and give the same result for the same calls; the
    others are called once per request, concurrently, so that no path waits for another one's tool.
    """

    lockstep: bool
    max_positions: int  # longest sequence served: tokens of the prefix and generated ones together

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """One result per request, in order."""
        ...

    def release(self) -> None:
        """The rollout batch is over: forget every cached prefix and unfinished request."""
        ...


class PolicyEngine(Engine, Protocol):
    """An engine that follows the weights of a model which is being trained."""

    def refresh(self, version: int, weights: Weights) -> None:
        """The model has new weights: generate with those, and call them `version`. An engine that runs the model itself
        has them already, and does not look at `weights`."""
        ...

    def close(self) -> None:
        """End what was started for this engine. A second call does nothing."""
        ...


CONTRACT = ("lockstep", "max_positions", "generate", "release", "refresh", "close")


def own_engine(name: str) -> Callable[..., PolicyEngine]:
    """The function that makes one of the user's own, `rollout.engine`. ValueError: there is none of this name."""
    return resolve_function(name, "rollout.engine", "config, language_model, eos_ids, version, weights")


def check_request(index: int, request: GenerationRequest, max_positions: int, vocab_size: int) -> None:
    """ValueError naming what an engine with these limits cannot serve of `requests[index]`."""
    length, new = len(request.token_ids), request.max_new_tokens
    for broken, text in (
        (length == 0, "token_ids is empty"),
        (new < 1, f"max_new_tokens = {new}, expected at least 1"),
        (
            not 0 <= request.temperature < math.inf,
            f"temperature = {request.temperature}, expected >= 0 and finite",
        ),
        (not 0 <= request.seed < 2**64, f"seed = {request.seed}, expected an unsigned 64-bit integer"),
        ("" in request.stop, "an empty stop string"),
        (
            length + new > max_positions,
            f"{length} tokens + {new} new ones, but the model has {max_positions} positions",
        ),
    ):
        if broken:
            raise ValueError(f"requests[{index}]: {text}")
    lowest, highest = min(request.token_ids), max(request.token_ids)
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(f"requests[{index}]: token ids {lowest}..{highest}, expected 0..{vocab_size - 1}")
