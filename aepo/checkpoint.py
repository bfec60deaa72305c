"""Checkpoints: everything that a run is, after a finished step.

    checkpoints/step_000010/
        model.safetensors, config.json, tokenizer files   a transformers model directory
        optimizer.safetensors                             moments of AdamW, by parameter name
        state.json                                        step and held-out success
        run.yaml                                          the configuration
        SHA256SUMS                                        of all files above; `sha256sum -c SHA256SUMS` checks them too

The learning rate, the questions and all random numbers are functions of (configuration, step), so `step` is the whole
data and scheduler position. A checkpoint is written beside the others under a temporary name, flushed to the disk and
then renamed: whatever happens meanwhile, the older ones stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1
SUMS = "SHA256SUMS"
REQUIRED = {"model.safetensors", "optimizer.safetensors", "state.json", "run.yaml"}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or is not what was written."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    step: int
    heldout_success: float | None  # None: no evaluation at this step


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}"


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """By step. A checkpoint whose state cannot be read is listed without a held-out success."""
    found = []
    for path in directory.glob("step_*"):
        try:
            success = json.loads((path / "state.json").read_text())["heldout_success"]
        except (OSError, ValueError, KeyError):
            success = None
        found.append(Checkpoint(path, int(path.name.removeprefix("step_")), success))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def best_checkpoint(directory: Path) -> Checkpoint | None:
    """The one with the highest held-out success, the latest of equals."""
    evaluated = [c for c in list_checkpoints(directory) if c.heldout_success is not None]
    return max(evaluated, key=lambda c: (c.heldout_success, c.step), default=None)


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
) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep` and the best; later steps go too, they are
    of a future that was left by resuming from an older step.

    CheckpointError where the disk is full or not writable; what was there before is still there.
    """
    final = checkpoint_path(directory, step)
    temporary, replaced = directory / f".writing_{step:06d}", directory / f".replaced_{step:06d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        safetensors.torch.save_model(model, str(temporary / "model.safetensors"), metadata={"format": "pt"})
        model.config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        safetensors.torch.save_file(_moments(model, optimizer), temporary / "optimizer.safetensors")
        state = {"format": FORMAT, "step": step, "heldout_success": heldout_success}
        (temporary / "state.json").write_text(json.dumps(state) + "\n")
        (temporary / "run.yaml").write_text(config_yaml)
        files = sorted(path.name for path in temporary.iterdir())
        (temporary / SUMS).write_text("".join(f"{_sha256(temporary / name)}  {name}\n" for name in files))
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        _flush(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = ", ".join(c.path.name for c in list_checkpoints(directory)) or "none"
        raise CheckpointError(f"cannot save checkpoint {final}: {error}. Older checkpoints kept: {kept}") from error
    shutil.rmtree(replaced, ignore_errors=True)
    _prune(directory, step, keep)
    return final


def verify_checkpoint(path: Path) -> None:
    """CheckpointError that names the first file which is missing or not what was written, and the next older
    checkpoint that is whole."""
    problem = _problem(path)
    if problem is None:
        return
    older = [c for c in list_checkpoints(path.parent) if c.path.name < path.name and _problem(c.path) is None]
    advice = (
        f"{older[-1].path.name} is whole: resume from it with --from-step {older[-1].step}"
        if older
        else ("there is no older checkpoint that is whole")
    )
    raise CheckpointError(f"corrupt checkpoint: {problem}; {advice}")


def load_weights(path: Path, model: PreTrainedModel) -> None:
    """Verify the checkpoint and load its weights into `model`."""
    verify_checkpoint(path)
    safetensors.torch.load_model(model, path / "model.safetensors", device=str(model.device))


def load_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """Verify, then load weights and optimizer in place. Returns the step."""
    load_weights(path, model)
    moments = safetensors.torch.load_file(path / "optimizer.safetensors")
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        entries = {
            key: moments[f"{name}|{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}|{key}" in moments
        }
        if entries:  # AdamW keeps `step` on the host
            optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in entries.items()}
    return json.loads((path / "state.json").read_text())["step"]


def _moments(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}|{key}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _problem(path: Path) -> str | None:
    """Why this checkpoint is not what was written, or None."""
    try:
        expected = [line.partition("  ")[::2] for line in (path / SUMS).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        return f"{path / SUMS} cannot be read ({error})"
    if not {name for _, name in expected} >= REQUIRED:
        return f"{path / SUMS} is cut off"
    for checksum, name in expected:
        try:
            if _sha256(path / name) != checksum:
                return f"{path / name} does not have the checksum it was written with"
        except OSError as error:
            return f"{path / name} cannot be read ({error})"
    return None


def _prune(directory: Path, step: int, keep: int) -> None:
    for checkpoint in list_checkpoints(directory):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)
    best = best_checkpoint(directory)
    for checkpoint in list_checkpoints(directory)[:-keep]:
        if best is None or checkpoint.path != best.path:
            shutil.rmtree(checkpoint.path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """To the disk itself; for a directory, its entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
