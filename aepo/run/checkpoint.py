"""Checkpoints: everything that a run is, after a finished step.

    checkpoints/step_000010/
        model.safetensors, config.json, generation_config.json, tokenizer files
                                                          a transformers model directory
        optimizer.safetensors                             moments of AdamW, by parameter name
        state.json                                        step and held-out success
        run.yaml                                          the configuration
        SHA256SUMS                                        of all files above; `sha256sum -c SHA256SUMS` checks them too

The learning rate, the questions and all random numbers are functions of (configuration, step), so `step` is the whole
data and scheduler position. A checkpoint is written beside the others under a temporary name, flushed to the disk and
then renamed: whatever happens meanwhile, the older ones stay as they are.

Whatever else lies in that directory, or in a checkpoint, is the user's: it is neither read nor removed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aepo.files.sums import sha256_of
from aepo.files.tensors import write_tensors
from aepo.registry import error_text
from aepo.run.checkpoint_fit import MOMENTS, model_problem, moments_problem, state_problem, stored_weights
from aepo.run.files import regular
from aepo.run.records import Fingerprints

FORMAT = 1
SUMS = "SHA256SUMS"
REQUIRED = {"model.safetensors", "config.json", "optimizer.safetensors", "state.json", "run.yaml"}
# .writing: not whole yet. .replaced: whole, of the step that is just written anew. .removing: no longer whole.
NAME = re.compile(r"(step|\.writing|\.replaced|\.removing)_([0-9]{6,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, is not what was written, or is not of this model."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    step: int
    heldout_success: float | None  # None: no evaluation at this step


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or will be."""
    path, replaced = _path(directory, "step", step), _path(directory, ".replaced", step)
    return replaced if replaced.is_dir() and not path.exists() else path  # the run was killed between two renames


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """By step. A checkpoint whose state cannot be read is listed without a held-out success."""
    steps = {step for kind, step, _ in _ours(directory, links=True) if kind in ("step", ".replaced")}
    return [
        Checkpoint(path, step, _heldout_success(path))
        for step, path in ((step, checkpoint_path(directory, step)) for step in sorted(steps))
    ]


def best_checkpoint(directory: Path) -> Checkpoint | None:
    """The one with the highest held-out success, the latest of equals."""
    return _best(list_checkpoints(directory))


def save_checkpoint(
    directory: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    *,
    heldout_success: float | None,
    config_yaml: str,
    keep: int,
    records: Fingerprints | None = None,
) -> Path:
    """Write the checkpoint of `step`, then remove all before it but the newest `keep`, with this one, and the best.
    records: of the run, which have to be there when it is resumed from here.

    CheckpointError, in one line, where the disk is full or not writable, weights or moments are not finite, or whatever
    else is in the way; what was there before is still there, and nothing else. What cannot be removed is a warning.
    """
    final, temporary = _path(directory, "step", step), _path(directory, ".writing", step)
    replaced = _path(directory, ".replaced", step)
    set_aside = placed = False
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _clean_up(directory)
        if final.is_symlink() or (final.exists() and not final.is_dir()):
            raise FileExistsError(f"{final.name} is there and was not written by a run")
        temporary.mkdir()
        _write(temporary, step, model, tokenizer, optimizer, heldout_success, config_yaml, records or {})
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        if final.exists():
            final.rename(replaced)
            set_aside = True
        temporary.rename(final)
        placed = True
        _flush(directory)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if placed:
                final.rename(temporary)
            if set_aside:
                replaced.rename(final)
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        kept = "unknown"
        with contextlib.suppress(Exception):
            kept = ", ".join(c.path.name for c in list_checkpoints(directory)) or "none"
        raise CheckpointError(
            f"cannot save checkpoint {final}: {error_text(error)}. Older checkpoints kept: {kept}"
        ) from error
    with _warns(f"cannot read {directory}"):
        _clean_up(directory)
        _prune(directory, step, keep)
    return final


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


def load_weights(path: Path, model: PreTrainedModel) -> None:
    """Verify the checkpoint and load its weights into `model`, in place. CheckpointError, in one line and before a
    weight is changed, where it is damaged, newer than this program, or of another model."""
    _checked_state(path, model)
    _copy_weights(path, model)


def records_before(path: Path) -> Fingerprints:
    """Of the run, when this checkpoint was written; empty: it is of a version that did not say. The checkpoint is one
    that has been verified."""
    return json.loads((path / "state.json").read_text()).get("records", {})


def load_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """As `load_weights`, and the moments of the optimizer, which must be of this one too. Returns the step."""
    state = _checked_state(path, model)
    trained = _trained(model, optimizer)
    if problem := moments_problem(path, trained, type(optimizer).__name__, state):
        raise CheckpointError(f"cannot load checkpoint {path}: {problem}")
    moments: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    with safe_open(path / "optimizer.safetensors", "pt") as file:
        stored = set(file.keys())
        for name, parameter in trained.items():
            if f"{name}|step" in stored:
                found = {key: file.get_tensor(f"{name}|{key}") for key in MOMENTS}
                moments[parameter] = {  # AdamW keeps `step` on the host
                    key: (value if key == "step" else value.to(parameter)).clone() for key, value in found.items()
                }
    _copy_weights(path, model)
    optimizer.state.clear()
    optimizer.state.update(moments)
    return state["step"]


def _write(
    directory: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    heldout_success: float | None,
    config_yaml: str,
    records: Fingerprints,
) -> None:
    weights = {names[0]: tensor for names, tensor in stored_weights(model)}
    parameters = {name for name, _ in model.named_parameters()}  # buffers may hold infinities
    moments = {
        f"{name}|{key}": value
        for name, parameter in _trained(model, optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    state = {
        "format": FORMAT,
        "step": step,
        "heldout_success": heldout_success,
        "optimizer": type(optimizer).__name__,
        "moments": len({name.rpartition("|")[0] for name in moments}),  # parameters that have some
        "records": records,
    }
    sums = {}
    for file, tensors, finite, metadata in (
        ("model.safetensors", weights, parameters, {"format": "pt"}),
        ("optimizer.safetensors", moments, moments.keys(), None),
    ):
        sums[file] = write_tensors(directory / file, tensors, finite=finite, metadata=metadata)
    model.config.save_pretrained(directory)
    if (generation := getattr(model, "generation_config", None)) is not None:
        # Not save_pretrained, which refuses what some models are published with (a temperature without sampling).
        generation.to_json_file(directory / "generation_config.json")
    tokenizer.save_pretrained(directory)
    (directory / "state.json").write_text(json.dumps(state) + "\n")
    (directory / "run.yaml").write_text(config_yaml, encoding="utf-8")
    for path in directory.rglob("*"):
        if path.is_file() and path.name not in sums:
            sums[path.relative_to(directory).as_posix()] = sha256_of(path)
    (directory / SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def _checked_state(path: Path, model: PreTrainedModel) -> dict[str, Any]:
    verify_checkpoint(path)
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot load checkpoint {path}: state.json: {error_text(error)}") from error
    if problem := state_problem(state, FORMAT, _step(path)) or model_problem(path, model):
        raise CheckpointError(f"cannot load checkpoint {path}: {problem}")
    return state


@torch.no_grad()
def _copy_weights(path: Path, model: PreTrainedModel) -> None:
    """One tensor at a time: a model on a GPU is not there twice."""
    with safe_open(path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
        for names, tensor in stored_weights(model):
            tensor.copy_(file.get_tensor(next(name for name in names if name in stored)))


def _trained(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    """The optimizer's parameters by their names in the model."""
    theirs = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in theirs}


def _problem(path: Path) -> str | None:
    """Why this checkpoint is not what was written, or None."""
    try:
        expected = _sums(path)
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


def _sums(path: Path) -> dict[str, str]:
    lines = regular(path / SUMS).read_text().splitlines()
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}


def _heldout_success(path: Path) -> float | None:
    try:
        success = json.loads(regular(path / "state.json").read_text())["heldout_success"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return success if type(success) in (int, float) and math.isfinite(success) else None


def _best(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    evaluated = [c for c in checkpoints if c.heldout_success is not None]
    return max(evaluated, key=lambda c: (c.heldout_success, c.step), default=None)


def _path(directory: Path, kind: str, step: int) -> Path:
    return directory / f"{kind}_{step:06d}"


def _ours(directory: Path, *, links: bool) -> Iterator[tuple[str, int, Path]]:
    """What a run wrote in the directory, by the exact names: the kind, the step and the path. links: also those to
    directories, which are the user's."""
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = NAME.fullmatch(path.name)
        if match is None or not path.is_dir() or (path.is_symlink() and not links):
            continue
        kind, step = match[1], int(match[2])
        if path == _path(directory, kind, step):  # no further zeros
            yield kind, step, path


def _step(path: Path) -> int | None:
    match = NAME.fullmatch(path.name)
    return int(match[2]) if match else None


def _not_ours(path: Path) -> list[Path]:
    """What a checkpoint's directory holds besides the files of its list."""
    try:
        known = {SUMS, *(name.partition("/")[0] for name in _sums(path))}
    except (OSError, UnicodeDecodeError):
        known = {SUMS}
    return [entry for entry in path.iterdir() if entry.name not in known]


def _clean_up(directory: Path) -> None:
    """What a run that was killed while it saved has left; of a step that was written anew, the older one."""
    for kind, step, path in list(_ours(directory, links=False)):
        if kind == "step":
            continue
        final = _path(directory, "step", step)
        with _warns(f"cannot remove {path}"):
            if kind == ".replaced" and not final.exists():
                path.rename(final)
                continue
            for entry in _not_ours(path) if kind == ".replaced" else ():
                if not (final / entry.name).exists():
                    entry.rename(final / entry.name)
            shutil.rmtree(path)


def _prune(directory: Path, step: int, keep: int) -> None:
    mine = [c for c in list_checkpoints(directory) if c.step <= step and not c.path.is_symlink()]
    best = _best(mine)
    for checkpoint in mine[:-keep]:
        with _warns(f"cannot remove {checkpoint.path}"):
            if checkpoint != best and not _not_ours(checkpoint.path):
                removing = _path(directory, ".removing", checkpoint.step)
                checkpoint.path.rename(removing)  # at once: half a checkpoint is none
                shutil.rmtree(removing)


@contextlib.contextmanager
def _warns(what: str) -> Iterator[None]:
    """For what comes after a checkpoint is whole and in its place: it does not undo that."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError, ValueError):  # standard error may be closed
            print(f"warning: {what}: {error_text(error)}", file=sys.stderr)


def _flush(path: Path) -> None:
    """To the disk itself; for a directory, its entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # file systems without it for directories
            raise
    finally:
        os.close(descriptor)
