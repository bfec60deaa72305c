"""What a controller calls: entropies and decisions of an engine that runs EntropyProcessor.

Every function takes a vllm.LLM; its twin `.._async` takes an AsyncLLM (any EngineClient) and is awaited. Each is one
call to the workers, which waits for the step that is running.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from aepo.vllm.decisions import branch_rule

Keys = Collection[str] | Mapping[str, int]
Decision = dict[str, float] | None


class EntropyError(ValueError):
    """Some keys cannot be answered: `problems` says why for each. Nothing was removed, also not of the other keys."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.problems = dict(problems)
        super().__init__("; ".join(f"{key!r}: {problem}" for key, problem in problems.items()))


def fetch_entropies(llm: Any, keys: Keys) -> dict[str, list[float]]:
    """Entropy [nats] of every output token by key. The records are removed from the engine.

    `keys`: keys, or a mapping to the number of output tokens. vLLM may run on for a step after a request has ended
    (stop strings, speculative tokens), so give the numbers: exactly so many are returned, and fewer raise. Raises
    EntropyError for keys that are unknown, were used by two requests at a time, or found no room.
    """
    return _values(llm.collective_rpc("aepo_fetch", args=(_counts(keys),)))


async def fetch_entropies_async(engine: Any, keys: Keys) -> dict[str, list[float]]:
    """`fetch_entropies` of an AsyncLLM."""
    return _values(await engine.collective_rpc("aepo_fetch", args=(_counts(keys),)))


def fetch_decisions(llm: Any, queries: Mapping[str, Mapping[str, Any]]) -> dict[str, Decision]:
    """The branching decision by key, from what is recorded so far; None: fewer than `window` tokens yet.

    A query has `alpha` and either `initial_entropy` [nats] or `initial_key`, whose own window gives it (all of its
    tokens where it has fewer). It may have `window`, `gamma`, `penalty`, `threshold` (defaults and meaning:
    RolloutConfig) and `consecutive` (0). A decision has `entropy` (mean over the window), `delta`, `probability` and
    `branch`, as in aepo.rollout.branching.decide_branch.
    Records stay. Raises EntropyError as `fetch_entropies`, ValueError or TypeError for a wrong query.
    """
    return _values(llm.collective_rpc("aepo_decide", args=(_queries(queries),)))


async def fetch_decisions_async(engine: Any, queries: Mapping[str, Mapping[str, Any]]) -> dict[str, Decision]:
    """`fetch_decisions` of an AsyncLLM."""
    return _values(await engine.collective_rpc("aepo_decide", args=(_queries(queries),)))


def forget_entropies(llm: Any, keys: Collection[str] | None = None) -> int:
    """Drop the records of these keys (None: all) and return how many there were. Unknown keys are no error."""
    return _first(llm.collective_rpc("aepo_forget", args=(_names(keys),)))


async def forget_entropies_async(engine: Any, keys: Collection[str] | None = None) -> int:
    """`forget_entropies` of an AsyncLLM."""
    return _first(await engine.collective_rpc("aepo_forget", args=(_names(keys),)))


def entropy_status(llm: Any) -> dict[str, Any]:
    """`records`; `tokens` in use of the `capacity`; `live` requests; `vllm`, `runner`, `logprobs_mode`, `vocab_size`,
    `max_model_len`."""
    return _first(llm.collective_rpc("aepo_status"))


async def entropy_status_async(engine: Any) -> dict[str, Any]:
    """`entropy_status` of an AsyncLLM."""
    return _first(await engine.collective_rpc("aepo_status"))


def _first(results: list[Any]) -> Any:
    """Of the workers that sample, which have all the same."""
    return next(result for result in results if result is not None)


def _values(results: list[Any]) -> dict[str, Any]:
    result = _first(results)
    if result["problems"]:
        raise EntropyError(result["problems"])
    return result["values"]


def _names(keys: Collection[str] | None) -> list[str] | None:
    if isinstance(keys, str) or not all(isinstance(key, str) for key in keys or ()):
        raise TypeError(f"keys must be a collection of str; got {reprlib.repr(keys)}")
    return None if keys is None else list(keys)


def _counts(keys: Keys) -> dict[str, int | None]:
    names = _names(keys)
    counts: dict[str, int | None] = dict(keys) if isinstance(keys, Mapping) else dict.fromkeys(names or ())
    for key, count in counts.items():
        if count is not None and (type(count) is not int or count < 0):
            raise TypeError(
                f"keys[{reprlib.repr(key)}] must be the number of output tokens, an int >= 0; got {reprlib.repr(count)}"
            )
    return counts


def _queries(queries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    if not isinstance(queries, Mapping) or not all(isinstance(query, Mapping) for query in queries.values()):
        raise TypeError(f"queries must be a mapping from key to a mapping; got {reprlib.repr(queries)}")
    for key, query in queries.items():
        try:
            branch_rule(query)
        except (TypeError, ValueError) as error:
            raise type(error)(f"queries[{reprlib.repr(key)}]: {error}") from error
    return {key: dict(query) for key, query in queries.items()}


def own_words(error: Exception) -> str:
    """Of the worker that failed, without what vLLM's processes say around them."""
    text = str(error)
    for around in (r"Call to \w+ method failed: (.*)", r"Worker failed with error '(.*)', please check the stack .*"):
        if match := re.fullmatch(around, text, re.DOTALL):
            text = match[1]
    return text
