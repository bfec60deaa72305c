"""New weights into running vLLM engines, as signed files: the trainer's side (sender, write), that of every worker
(worker, files, reload), and what passes between them (manifest)."""

from aepo.vllm.weights.manifest import FileUpdateInfo, process_secret, signing_secret
from aepo.vllm.weights.sender import FileSender, WeightClient, WeightSender, finish_update, stamped
from aepo.vllm.weights.worker import BACKEND, FileInitInfo
from aepo.vllm.weights.write import WeightUpdateError, written

__all__ = [
    "BACKEND",
    "FileInitInfo",
    "FileSender",
    "FileUpdateInfo",
    "WeightClient",
    "WeightSender",
    "WeightUpdateError",
    "finish_update",
    "process_secret",
    "signing_secret",
    "stamped",
    "written",
]
