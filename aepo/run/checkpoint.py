"""Checkpoints as they lie on the disk: everything that a run is, after a finished step.

    checkpoints/step_000010/
        model.safetensors, config.json, generation_config.json, tokenizer files
                                                          a transformers model directory
        optimizer.safetensors                             by parameter name the moments of AdamW, and the float32
                                                          masters of weights of 16 bits
        state.json                                        step and held-out success
        run.yaml                                          the configuration
        SHA256SUMS                                        of all files above; `sha256sum -c SHA256SUMS` checks them too

The learning rate, the questions and all random numbers are functions of (configuration, step), so `step` is the whole
data and scheduler position.

Whatever else lies in that directory, or in a checkpoint, is the user's: it is neither read nor removed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aepo.files.sums import sha256_of
from aepo.registry import error_text
from aepo.run.files import regular
from aepo.run.layout import SUMS, WHOLE, listed_files, step_of, step_path
from aepo.run.records import Fingerprints

FORMAT = 1
REQUIRED = {"model.safetensors", "config.json", "optimizer.safetensors", "state.json", "run.yaml"}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, is not what was written, or is not of this model."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    step: int
    heldout_success: float | None  # None: no evaluation at this step


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or will be."""
    path, replaced = step_path(directory, "step", step), step_path(directory, ".replaced", step)
    return replaced if replaced.is_dir() and not path.exists() else path  # the run was killed between two renames


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """By step; also those that are links. One whose state cannot be read is listed without a held-out success."""
    there = directory.iterdir() if directory.is_dir() else ()
    steps = {step_of(path) for path in there if WHOLE.fullmatch(path.name) and path.is_dir()}
    return [
        Checkpoint(path, step, _heldout_success(path))
        for step, path in ((step, checkpoint_path(directory, step)) for step in sorted(steps))
    ]


def best_checkpoint(directory: Path) -> Checkpoint | None:
    """The one with the highest held-out success, the latest of equals."""
    return best_of(list_checkpoints(directory))


def best_of(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    evaluated = [c for c in checkpoints if c.heldout_success is not None]
    return max(evaluated, key=lambda c: (c.heldout_success, c.step), default=None)


def verify_checkpoint(path: Path) -> None:
    """CheckpointError that names the first file which is missing or not what was written, and the next older
    checkpoint that is whole."""
    there = list_checkpoints(path.parent)
    if not path.is_dir():
        steps = ", ".join(str(one.step) for one in there) or "none"
        raise CheckpointError(f"{path}: there is no such checkpoint, the steps are: {steps}")
    problem = _problem(path)
    if problem is None:
        return
    step = _step(path)
    older = (one for one in reversed(there) if step is not None and one.step < step)
    whole = next((one for one in older if _problem(one.path) is None), None)
    advice = (
        f"{whole.path.name} is whole: resume from it with --from-step {whole.step}"
        if whole
        else "there is no older checkpoint that is whole"
    )
    raise CheckpointError(f"corrupt checkpoint: {problem}; {advice}")


def verified_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint that is whole. CheckpointError: it is not, or of a newer format."""
    verify_checkpoint(path)
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot load checkpoint {path}: state.json: {error_text(error)}") from error
    if problem := _state_problem(state, _step(path)):
        raise CheckpointError(f"cannot load checkpoint {path}: {problem}")
    return state


def records_before(path: Path) -> Fingerprints:
    """Of the run, when this checkpoint was written; empty: it is of a version that did not say. The checkpoint is one
    that has been verified."""
    return json.loads((path / "state.json").read_text()).get("records", {})


def _problem(path: Path) -> str | None:
    """Why this checkpoint is not what was written, or None."""
    try:
        expected = listed_files(path)
    except (OSError, UnicodeDecodeError) as error:
        return f"{path / SUMS} cannot be read ({error})"
    if not expected.keys() >= REQUIRED:
        return f"{path / SUMS} is cut off"
    for name, checksum in expected.items():
        try:
            if sha256_of(regular(path / name)) != checksum:
                return f"{path / name} does not have the checksum it was written with"
        except (OSError, ValueError) as error:
            return f"{path / name} cannot be read ({error})"
    return None


def _state_problem(state: Any, step: int | None) -> str | None:
    """Why this content of state.json cannot be used, or None. step: of the directory's name."""
    if not isinstance(state, dict):
        return f"state.json: expected an object, got {type(state).__name__}"
    for name, lowest in (("format", 1), ("step", 0), ("moments", 0)):
        value = state.get(name, 0 if name == "moments" else None)  # the first checkpoints of format 1 have none
        if type(value) is not int or value < lowest:
            return f"state.json: {name}: expected a whole number from {lowest}, got {value!r}"
    records = state.get("records", {})
    if not (isinstance(records, dict) and all(map(_is_fingerprint, records.values()))):
        return "state.json: records: expected size and hash of each file"
    if state["format"] > FORMAT:
        return f"state.json: format {state['format']} is of a newer version of aepo, this one reads {FORMAT}"
    if step is not None and state["step"] != step:
        return f"state.json: step {state['step']} does not fit the directory's name"
    return None


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) is int and isinstance(value[1], str)


def _heldout_success(path: Path) -> float | None:
    try:
        success = json.loads(regular(path / "state.json").read_text())["heldout_success"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return success if type(success) in (int, float) and math.isfinite(success) else None


def _step(path: Path) -> int | None:
    """None: a copy under another name."""
    return step_of(path) if WHOLE.fullmatch(path.name) else None
