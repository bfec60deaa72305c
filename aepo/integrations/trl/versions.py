"""What of TRL this package stands on: its versions, and the parameters of what is overridden, called and replaced.

Everything here was read in TRL 1.16.0 and is tested against it. Private names carry most of it, so they are compared
with the installed TRL before they are used.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import math
import warnings
from collections.abc import Iterator
from types import CodeType, ModuleType
from typing import Any

import torch

WRITTEN_FOR = (1, 16)
DOCUMENTED_UNTIL = (1, 18)
INSTALL = 'pip install "aepo-kernels[trl]"'

# Of GRPOTrainer, after self. A version may add parameters behind these, with defaults.
OVERRIDES: dict[str, tuple[str, ...]] = {
    "_get_per_token_logps_and_entropies": (
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ),
    "_compute_loss": ("model", "inputs"),
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate": ("prompts",),
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"),
    "_tool_call_loop": (
        "prompts",
        "prompt_ids",
        "completion_ids",
        "completions",
        "logprobs",
        "images",
        "multimodal_fields",
    ),
    "_tokenize_prompts": ("prompts",),
    "_get_tool_suffix_ids": ("tool_messages",),
    "_prepare_inputs": ("generation_batch",),
}

# Of AsyncGRPOTrainer, and the entries of a batch of its that are read here.
ASYNC: dict[str, tuple[str, ...]] = {
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
}
ASYNC_BATCH = frozenset(
    {
        "token_index",
        "old_log_probs",
        "advantages",
        "segment_id",
        "global_n_tokens",
        "global_n_forward_tokens",
        "mean_seq_len",
    }
)

# Of the function behind TRL's head, after ctx. All are passed by position, so there may be no other.
HEAD_PARAMETERS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
HEAD, COMPACT = "_ChunkedLogProbFunction", "_use_triton"
"""Names in trl.trainer.utils: that function, and whether masked positions are left out before it."""


def check_trl() -> None:
    """Raise ImportError where TRL is missing or too old; warn where it is newer than what is known here."""
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"aepo.integrations.trl needs TRL, which is not installed: {INSTALL}") from None
    # Of transformers, which TRL brings; torch alone has none.
    from packaging.version import InvalidVersion, Version

    written = ".".join(map(str, WRITTEN_FOR))
    try:
        release = Version(str(version)).release[:2]
    except InvalidVersion:
        raise ImportError(f"aepo.integrations.trl needs TRL {written} or later; found {version!r}: {INSTALL}") from None
    if release < WRITTEN_FOR:
        raise ImportError(f"aepo.integrations.trl needs TRL {written} or later; found TRL {version}: {INSTALL}")
    if release == WRITTEN_FOR:
        return
    about = f"aepo.integrations.trl was written for TRL {written} and tested with it alone; found TRL {version}"
    if release <= DOCUMENTED_UNTIL:
        warnings.warn(
            f"{about}, of which only the documentation was read (AsyncGRPOTrainer has moved, its settings and metrics "
            "have other names). Parameters are compared before use; whether what lies behind them is the same is not "
            "known.",
            stacklevel=2,
        )
    else:
        warnings.warn(
            f"{about}, of which nothing is known. Parameters are compared before use, but the same names may mean "
            f"something else: compare a first run with one on TRL {written}.",
            stacklevel=2,
        )


def check_overrides(trainer: type) -> None:
    """Raise TypeError with every difference between the methods of GRPOTrainer, `trainer`, and OVERRIDES."""
    found = [difference for name, known in OVERRIDES.items() if (difference := _difference(trainer, name, known))]
    if found:
        raise TypeError(_another(trainer, "AEPOTrainer", found))


def check_async_overrides(trainer: type) -> None:
    """The same of AsyncGRPOTrainer: its methods, and that its loss reads its batches by the names known here."""
    found = [difference for name, known in ASYNC.items() if (difference := _difference(trainer, name, known))]
    if not found:
        unread = ASYNC_BATCH - set(_strings(trainer.compute_loss.__code__))  # type: ignore[attr-defined]
        found = [f"compute_loss does not read {name!r} of a batch" for name in sorted(unread)]
    if found:
        raise TypeError(_another(trainer, "AEPOAsyncTrainer", found))


def _another(trainer: type, ours: str, found: list[str]) -> str:
    version = importlib.metadata.version("trl")
    return f"{trainer.__name__} of TRL {version} is not the one {ours} was written for: {'; '.join(found)}"


def _difference(trainer: type, name: str, known: tuple[str, ...]) -> str | None:
    method = getattr(trainer, name, None)
    if method is None:
        return f"{name} is missing"
    parameters = list(inspect.signature(method).parameters.values())[1:]
    names = tuple(x.name for x in parameters)
    if names[: len(known)] != known:
        return f"{name} takes ({', '.join(names)}), expected ({', '.join(known)})"
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    more = [x.name for x in parameters[len(known) :] if x.default is x.empty and x.kind not in optional]
    return f"{name} also needs {', '.join(more)}" if more else None


def head_differences(utils: ModuleType) -> list[str]:
    """What speaks against another head in the place of that of `utils`, which is trl.trainer.utils. Empty: nothing."""
    try:
        return _head_differences(utils)
    except Exception as error:  # of something that cannot even be looked at, or that fails when it is tried
        return [f"comparing it failed: {type(error).__name__}: {error}"]


def _head_differences(utils: ModuleType) -> list[str]:
    missing = [name for name in (HEAD, COMPACT, "add_fused_lm_head") if not callable(getattr(utils, name, None))]
    if missing:
        return [f"trl.trainer.utils has no {', '.join(missing)}"]
    unread = {HEAD, COMPACT} - set(_names_read(utils.add_fused_lm_head.__code__))
    found = [f"add_fused_lm_head does not read {name}" for name in sorted(unread)]
    asked = tuple(inspect.signature(getattr(utils, COMPACT)).parameters)
    if asked != ("device",):
        found.append(f"expected {COMPACT}(device), found {COMPACT}({', '.join(asked)})")
    forward = getattr(getattr(utils, HEAD), "forward", None)
    parameters = tuple(inspect.signature(forward).parameters)[1:] if forward else None
    if parameters != HEAD_PARAMETERS:
        got = "no forward" if parameters is None else f"forward(ctx, {', '.join(parameters)})"
        return [*found, f"expected {HEAD}.forward(ctx, {', '.join(HEAD_PARAMETERS)}), found {got}"]
    return found + _result_differences(getattr(utils, HEAD))


def _names_read(code: CodeType) -> Iterator[str]:
    """Global names (and attributes) in a function and in those that it makes."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names_read(inner)


def _strings(code: CodeType) -> Iterator[str]:
    """In a function and in those that it makes."""
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _strings(constant)


def _result_differences(head: Any) -> list[str]:
    """Of what the function returns for two equal logits: (logprobs, entropy, and three that were not asked for)."""
    zeros = torch.zeros(2, 1, device="cpu")
    with torch.no_grad():
        result = head.apply(zeros, zeros, None, zeros[:, 0].long(), 1.0, 2, None, 1.0, ("entropy",))
    if not isinstance(result, tuple) or len(result) != 5:
        return [f"expected {HEAD} to return 5 things, found {len(result) if isinstance(result, tuple) else 'one'}"]
    shown = [None if x is None else [round(value, 4) for value in x.tolist()] for x in result]
    half = round(math.log(2), 4)
    expected = [[-half, -half], [half, half], None, None, None]
    return [] if shown == expected else [f"expected {HEAD} to return {expected} for two equal logits, found {shown}"]
