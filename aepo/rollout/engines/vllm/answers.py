"""What a `vllm serve` answers, checked before it is believed. A server may be broken, or be something else."""

from __future__ import annotations

import contextlib
import math
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aepo.files.weight_directory import update_directory
from aepo.rollout.engine import GenerationRequest
from aepo.rollout.engines.vllm.replica import Completion, Recorded, ReplicaError, finish_reason

ROUNDING = 1e-3  # of log-probs and entropies [nats] that float32 logits give
LOWEST = -9999.0  # vLLM writes this for every log-prob below, and JSON has no -infinity
WORDS = 500  # characters of what a server says, in a message
VERSION = 100  # characters of what somebody calls weights; ours have up to 32


def one_line(text: str) -> str:
    """What a server says, for a message that people read on a terminal: cut, and nothing steers that."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))[:WORDS]


def quoted(value: Any) -> str:
    """The same for a value of an answer. reprlib alone makes 390,000 characters of lists in lists."""
    return one_line(reprlib.repr(value))


@contextlib.contextmanager
def checking(url: str, path: str) -> Iterator[None]:
    """ReplicaError that names server and route for whatever is wrong with an answer."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise ReplicaError(f"{url}: {path} answered what cannot be right: {error}") from None


def field(holder: Any, name: str, *kinds: type) -> Any:
    """Of an object, one of these kinds."""
    if not isinstance(holder, dict) or name not in holder:
        raise ValueError(f"expected an object with {name!r}, got {quoted(holder)}")
    if type(holder[name]) not in kinds:
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name!r} is {quoted(holder[name])}, expected {expected}")
    return holder[name]


def model_name(answer: Any) -> str:
    models = field(answer, "data", list)
    if not models:
        raise ValueError("'data' is empty, expected a model")
    return field(models[0], "id", str)


def status(answer: Any) -> Mapping[str, Any]:
    for name, kinds in (
        ("vocab_size", (int,)),
        ("max_model_len", (int,)),
        ("logprobs_mode", (str,)),
        ("weights_dir", (str, type(None))),
        ("no_weights", (str, type(None))),
    ):
        field(answer, name, *kinds)
    weight_version(answer)
    if answer["max_model_len"] < 1:
        raise ValueError(f"'max_model_len' is {quoted(answer['max_model_len'])}, expected at least 1")
    if answer["weights_dir"] is None and answer["no_weights"] is None:
        raise ValueError("'weights_dir' and 'no_weights' are null, expected one of them")
    return answer


def shared_directory(path: str) -> str:
    """`weights_dir` of a status, tried out. On a server's word nothing is made but an update in what exists already,
    and nothing else is removed."""
    root, *parts = path.removesuffix("/").split("/")
    why: str | None = "not a normal path"
    if path.isprintable() and root == "" and parts and not {"", ".", ".."}.intersection(parts):
        try:
            with update_directory(Path(path)):
                return path
        except OSError as error:
            why = error.strerror
    raise ValueError(
        f"'weights_dir' is {quoted(path)} ({why}), expected the absolute path of a directory that exists here and can "
        "be written to; where it has another path here, set vllm.weights_dir"
    )


def completion(answer: Any, request: GenerationRequest, vocab_size: int) -> Completion:
    choices = field(answer, "choices", list)
    if len(choices) != 1:
        raise ValueError(f"'choices' has {len(choices)} entries, expected 1")
    (choice,) = choices
    field(choice, "finish_reason", str)
    field(choice, "stop_reason", str, int, type(None))
    reason = finish_reason(choice["finish_reason"], choice["stop_reason"])
    token_ids = field(choice, "token_ids", list)
    fewest = 0 if reason == "abort" else 1
    if not fewest <= len(token_ids) <= request.max_new_tokens:
        raise ValueError(f"{len(token_ids)} tokens, expected {fewest} to {request.max_new_tokens}")
    for token in token_ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"'token_ids' has {quoted(token)}, expected integers in [0, {vocab_size})")
    logprobs: list[float] = []
    if token_ids:
        logprobs = _numbers("token_logprobs", field(field(choice, "logprobs", dict), "token_logprobs", list))
    if len(logprobs) != len(token_ids):
        raise ValueError(f"{len(logprobs)} log-probs of {len(token_ids)} tokens")
    for logprob in logprobs:
        if logprob > ROUNDING:
            raise ValueError(f"'token_logprobs' has {logprob}, expected numbers <= 0")
    usage, prompt = field(answer, "usage", dict), len(request.token_ids)
    if field(usage, "prompt_tokens", int) != prompt:
        raise ValueError(f"'prompt_tokens' is {quoted(usage['prompt_tokens'])}, expected {prompt}")
    details = field(usage, "prompt_tokens_details", dict, type(None)) if "prompt_tokens_details" in usage else None
    cached = 0
    if details and details.get("cached_tokens") is not None:
        cached = field(details, "cached_tokens", int)
    if not 0 <= cached <= prompt:
        raise ValueError(f"'cached_tokens' is {quoted(cached)}, expected 0 to {prompt}")
    return Completion(
        tuple(token_ids),
        tuple(-math.inf if logprob <= LOWEST else logprob for logprob in logprobs),
        reason,
        prompt - cached,
        version=None,
    )


def recorded(answer: Any, lengths: Mapping[str, int], vocab_size: int) -> Recorded:
    """Entropies [nats] of exactly these keys; null is NaN, which JSON does not have."""
    rows = field(answer, "entropies", dict)
    if rows.keys() != lengths.keys():
        raise ValueError(f"'entropies' has the keys {quoted(sorted(rows))}, asked were {sorted(lengths)[:6]}")
    entropies = {}
    for key, length in lengths.items():
        row = [math.nan if x is None else x for x in field(rows, key, list)]
        if len(row) != length:
            raise ValueError(f"{len(row)} entropies for {key!r}, expected {length}")
        entropies[key] = _numbers("entropies", row)
        for x in entropies[key]:
            if x < -ROUNDING or x > math.log(vocab_size) + ROUNDING:
                raise ValueError(f"an entropy is {x}, expected 0 to log {vocab_size}")
    return Recorded(entropies, weight_version(answer))


def weight_version(answer: Any) -> str:
    """It is compared, and said in messages as it is."""
    found = field(answer, "weight_version", str)
    if len(found) > VERSION or not found.isprintable():
        raise ValueError(f"'weight_version' is {quoted(found)}, expected at most {VERSION} printable characters")
    return found


def nonces(answer: Any) -> list[str]:
    found = field(answer, "nonces", list)
    if not found or not all(isinstance(nonce, str) and nonce for nonce in found):
        raise ValueError(f"'nonces' is {quoted(found)}, expected a text per worker")
    return found


def _numbers(name: str, values: list[Any]) -> list[float]:
    """As floats. NaN passes: it says something about the model."""
    for value in values:
        if type(value) not in (int, float) or abs(value) > 1e300:
            raise ValueError(f"{name!r} has {quoted(value)}, expected finite numbers")
    return [float(value) for value in values]
