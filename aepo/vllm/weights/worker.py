"""The worker's side of a weight update: a backend of vLLM's weight-transfer protocol that reads signed files.

vLLM's own backends begin to take the model apart when an update starts: if a later call fails, the engine is left
without weights, and the next update mixes in what the failed one had buffered. Here an engine is whole between any two
calls. What is checked is checked here, in the worker, so it holds whichever way an update comes: routes of ours, those
of vLLM's development mode, or collective_rpc.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from aepo.vllm.weights.files import CheckpointFiles, Shapes
from aepo.vllm.weights.manifest import FileUpdateInfo, check, shown
from aepo.vllm.weights.reload import check_fit, clean_caches, load

BACKEND = "aepo_file"


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Whose updates an engine takes (none: nobody's), and the directory that has them. The first one counts: later ones
    must be the same."""

    secrets: list[str] = field(default_factory=list, repr=False)
    directory: str | None = None


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Receives files with the names and shapes of the model's checkpoint, in any floating-point dtype."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo
    supports_draft_weight_update = False  # vLLM refuses them by that name; no test here has a draft model

    nonce: str | None = None  # of the update that has been started; good for one
    loads = 0  # how often a load was begun
    _trusted: FileInitInfo | None = None
    _staged: CheckpointFiles | None = None
    _withdrawn = False
    _accepted: Shapes | None = None  # those that fitted the model, so that they are tried once

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """ValueError: other secrets or another directory than the first time, or a secret that is none."""
        found = init_info.secrets
        if not isinstance(found, list) or not all(isinstance(secret, str) and secret for secret in found):
            raise ValueError("secrets must be a list of texts that are not empty")
        if not isinstance(init_info.directory, str | None):
            raise ValueError(f"directory must be a path or None; got {shown(init_info.directory)}")
        if self._trusted is None:
            self._trusted = init_info
        elif not hmac.compare_digest(*(json.dumps(info.secrets).encode() for info in (init_info, self._trusted))):
            raise ValueError("this engine takes weights from somebody else, and that cannot be changed")
        elif init_info.directory != self._trusted.directory:
            raise ValueError("this engine reads weights from another directory, and that cannot be changed")

    def start_weight_update(self) -> None:
        self._staged, self._withdrawn, self.nonce = None, False, secrets.token_hex(16)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """ValueError: the update is not signed for this engine, the files are not those of the update, or do not fit.
        The model is as it was in any case."""
        nonce, self.nonce, self._staged = self.nonce, None, None
        if update_info.withdraw is True:
            self._withdrawn = True
            return
        trusted = self._trusted or FileInitInfo()
        check(update_info, nonce, trusted.secrets)
        if trusted.directory is None:
            raise ValueError("this engine takes no weights: it was started without AEPO_WEIGHTS_DIR")
        files = CheckpointFiles(Path(trusted.directory), update_info, self.model_config.dtype)
        if files.shapes != self._accepted:
            check_fit(self.model, self.model_config, files.shapes, self.parallel_config.tensor_parallel_size)
            self._accepted = files.shapes
        self._staged = files

    @property
    def staged_version(self) -> str | None:
        """Of the update that was accepted and is not loaded yet."""
        return None if self._staged is None else self._staged.version

    def finish_weight_update(self) -> None:
        """RuntimeError: there is nothing to load, or the weights are partly new, and must be sent again before anything
        is generated."""
        files, self._staged = self._staged, None
        if files is None:
            if self._withdrawn:
                return
            raise RuntimeError("no update was accepted: this engine keeps its weights")
        files.check_unchanged()
        self.loads += 1
        try:
            load(self.model, self.model_config, files)
        except Exception as error:
            raise RuntimeError(f"this engine has a part of the new weights only: {error}") from error
        clean_caches(self.model)

    def shutdown(self) -> None:
        self._staged = None


# By name, so that a module that is imported twice registers once.
with contextlib.suppress(ValueError):
    WeightTransferEngineFactory.register_engine(BACKEND, __name__, FileWeightTransferEngine.__name__)
