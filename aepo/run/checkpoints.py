"""What a run saves, and goes on from.

A checkpoint is written beside the others under a temporary name, flushed to the disk and then renamed: whatever happens
meanwhile, the older ones stay as they are.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aepo.files.sums import sha256_of
from aepo.files.tensors import write_tensors
from aepo.parallel import Parallel
from aepo.registry import error_text
from aepo.run.checkpoint import FORMAT, CheckpointError, best_of, checkpoint_path, list_checkpoints
from aepo.run.checkpoint_load import load_state, optimizer_name
from aepo.run.files import flush
from aepo.run.layout import SUMS, additions, step_path, temporaries_in
from aepo.run.records import Fingerprints
from aepo.run.removal import remove_checkpoint, remove_temporary


class Checkpoints:
    """Those of one run, in `directory`, of the model that it trains. Every process calls the methods; the main one
    writes.

    keep: so many of the newest are kept, and the best. config_yaml: the settings of the run.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        config_yaml: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer,
        parallel: Parallel,
    ) -> None:
        self.directory = directory
        self._keep, self._config_yaml = keep, config_yaml
        self._model, self._tokenizer, self._optimizer = model, tokenizer, optimizer
        self._parallel = parallel

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or will be."""
        return checkpoint_path(self.directory, step)

    def load(self, step: int) -> Path:
        """Verify the checkpoint of this step and load what is trained, in place. Returns its path.

        CheckpointError, in one line and before a weight is changed, where it is damaged, newer than this program, or
        of another model or optimizer.
        """
        path = self.path(step)
        load_state(path, self._model, self._optimizer, self._parallel)
        return path

    def save(self, step: int, heldout_success: float | None, records: Fingerprints | None = None) -> Path:
        """Write the checkpoint of `step`, then remove all before it but the newest `keep`, with this one, and the best.
        records: of the run, which have to be there when it is resumed from here.

        CheckpointError, in one line, where the disk is full or not writable, weights or moments are not finite, or
        whatever else is in the way; what was there before is still there, and nothing else. What cannot be removed is
        a warning.
        """
        if self._parallel.is_main:
            self._place(step, {"heldout_success": heldout_success, "records": records or {}})
            with _warns(f"cannot read {self.directory}"):
                self._clean_up()
                self._prune(step)
        else:
            self._take_part()
        return step_path(self.directory, "step", step)

    def _place(self, step: int, facts: Mapping[str, Any]) -> None:
        final, temporary = step_path(self.directory, "step", step), step_path(self.directory, ".writing", step)
        replaced = step_path(self.directory, ".replaced", step)
        set_aside = placed = False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clean_up()
            if final.is_symlink() or (final.exists() and not final.is_dir()):
                raise FileExistsError(f"{final.name} is there and was not written by a run")
            temporary.mkdir()
            self._write(temporary, step, facts)
            for path in (*temporary.rglob("*"), temporary):
                flush(path)
            if final.exists():
                final.rename(replaced)
                set_aside = True
            temporary.rename(final)
            placed = True
            flush(self.directory)
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
                kept = ", ".join(c.path.name for c in list_checkpoints(self.directory)) or "none"
            raise CheckpointError(
                f"cannot save checkpoint {final}: {error_text(error)}. Older checkpoints kept: {kept}"
            ) from error

    def _write(self, directory: Path, step: int, facts: Mapping[str, Any]) -> None:
        """facts: what else state.json says."""
        moments = self._moments()
        parameters = {name for name, _ in self._model.named_parameters()}  # buffers may hold infinities
        sums = {}
        for file, tensors, finite, metadata in (
            ("model.safetensors", self._weights, parameters, {"format": "pt"}),
            ("optimizer.safetensors", moments.items, moments.keys(), None),
        ):
            sums[file] = write_tensors(directory / file, tensors, finite=finite, metadata=metadata)
        self._save_as_a_transformers_model(directory)
        state = {
            "format": FORMAT,
            "step": step,
            **facts,
            "optimizer": optimizer_name(self._optimizer),
            "moments": len({name.rpartition("|")[0] for name in moments}),  # parameters that have some
        }
        (directory / "state.json").write_text(json.dumps(state) + "\n")
        (directory / "run.yaml").write_text(self._config_yaml, encoding="utf-8")
        for path in directory.rglob("*"):
            if path.is_file() and path.name not in sums:
                sums[path.relative_to(directory).as_posix()] = sha256_of(path)
        (directory / SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))

    def _save_as_a_transformers_model(self, directory: Path) -> None:
        """All but the weights."""
        config = copy.deepcopy(self._model.config)
        config.dtype = self._model.dtype  # which a model that was cast does not say
        config.save_pretrained(directory)
        if (generation := getattr(self._model, "generation_config", None)) is not None:
            # Not save_pretrained, which refuses what some models are published with (a temperature without sampling).
            generation.to_json_file(directory / "generation_config.json")
        self._tokenizer.save_pretrained(directory)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((names[0], tensor) for names, tensor in self._parallel.full_weights(self._model))

    def _moments(self) -> dict[str, Tensor]:
        """All that the optimizer keeps, by NAME|KEY."""
        state = self._parallel.state(self._model, self._optimizer, whole=True)
        return {name: value for name, value in state.items() if "|" in name}

    def _take_part(self) -> None:
        """Calls the verbs as the process does that writes."""
        self._moments()
        for _ in {tensor.element_size() for _, tensor in self._weights()}:
            for _ in self._weights():
                pass

    def _clean_up(self) -> None:
        """What a run that was killed while it saved has left; of a step that was written anew, the older one."""
        for path in temporaries_in(self.directory, "checkpoints"):
            with _warns(f"cannot remove {path}"):
                remove_temporary(path)

    def _prune(self, step: int) -> None:
        mine = [c for c in list_checkpoints(self.directory) if c.step <= step and not c.path.is_symlink()]
        best = best_of(mine)
        for checkpoint in mine[: -self._keep]:
            with _warns(f"cannot remove {checkpoint.path}"):
                if checkpoint != best and not additions(checkpoint.path):
                    remove_checkpoint(checkpoint.path)


@contextlib.contextmanager
def _warns(what: str) -> Iterator[None]:
    """For what comes after a checkpoint is whole and in its place: it does not undo that."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError, ValueError):  # standard error may be closed
            print(f"warning: {what}: {error_text(error)}", file=sys.stderr)
