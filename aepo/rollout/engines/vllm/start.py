"""How a `VLLMEngine` begins: on engines of this machine, which are started, or on servers that run already."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aepo.config import VLLMConfig
from aepo.files.weight_directory import default_directories, default_directory, patterns
from aepo.parallel import Weights
from aepo.rollout.engines.vllm.engine import VLLMEngine
from aepo.rollout.engines.vllm.loop_thread import LoopThread
from aepo.rollout.engines.vllm.orphans import OrphanGuard, temporary_directory

if TYPE_CHECKING:
    from aepo.rollout.engines.vllm.remote import RemoteReplica

# Of vLLM's processes, where the user has not said otherwise.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",  # 100 lines at a start, between those of the trainer
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # standard output is the command's, and may be JSON
}
SOCKET_BYTES = 107  # of the path of a socket, which vLLM names with 36 of them


def launch(
    model_dir: Path, *, eos_ids: Sequence[int], vocab_size: int, settings: VLLMConfig, version: int, seed: int
) -> VLLMEngine:
    """Start `settings.replicas` engines on this machine, each in processes of its own.

    model_dir: weights, configuration and tokenizer, as transformers saves them. version: of these weights.
    ModuleNotFoundError: vLLM is not installed. ValueError: vLLM refuses the settings. If it fails or is interrupted, no
    process is left.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from aepo.rollout.engines.vllm.local import start_replicas
    from aepo.vllm.weights import stamped

    place = os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir()
    if len(os.fsencode(place)) > SOCKET_BYTES - len("/aepo-vllm-/") - 12 - 36:
        place = "/tmp"
    given, stamp = settings.weights_dir, stamped(version)
    with contextlib.ExitStack() as undo:
        places = default_directories() if given is None else [Path(given)]
        guard = temporary_directory(Path(place), "aepo-vllm-", patterns(places))
        undo.callback(guard.end)
        loop = LoopThread()
        undo.callback(loop.close)
        replicas = loop.run(
            start_replicas(model_dir, eos_ids=eos_ids, settings=settings, version=stamp, seed=seed, guard=guard)
        )
        nbytes = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
        engine = VLLMEngine(
            replicas,
            loop,
            vocab_size=vocab_size,
            version=version,
            weights_dir=default_directory(nbytes) if given is None else Path(given),
            stamp=stamp,
            guard=guard,
        )
        undo.pop_all()
    return engine


def connect(
    *, eos_ids: Sequence[int], vocab_size: int, settings: VLLMConfig, version: int, weights: Weights | None
) -> VLLMEngine:
    """Use the running `vllm serve` of `settings.endpoints`; their flags are in docs/vllm.md.

    weights: are sent to them at once, since nobody knows which ones they have; None: they keep them, for good.
    ConnectionError: one of them does not answer, or names a directory for new weights that cannot be written here.
    ValueError: one of them lacks what we need, or serves another vocabulary.
    """
    with contextlib.ExitStack() as undo:
        loop = LoopThread()
        undo.callback(loop.close)
        replicas = loop.run(_connected(settings, eos_ids, vocab_size, updatable=weights is not None))
        undo.callback(lambda: loop.run(_close(replicas)))
        directory = guard = None
        if weights is not None:
            directory = Path(settings.weights_dir or replicas[0].shared_directory())
            guard = OrphanGuard(None, patterns([directory]))
            undo.callback(guard.end)
        engine = VLLMEngine(replicas, loop, vocab_size=vocab_size, version=version, weights_dir=directory, guard=guard)
        if weights is not None:
            engine.refresh(version, weights)
        undo.pop_all()
    return engine


async def _connected(
    settings: VLLMConfig, eos_ids: Sequence[int], vocab_size: int, *, updatable: bool
) -> list[RemoteReplica]:
    from aepo.rollout.engines.vllm.remote import RemoteReplica

    replicas: list[RemoteReplica] = []
    try:
        for url in settings.endpoints:
            replicas.append(
                await RemoteReplica.connect(
                    url, eos_ids, vocab_size, updatable=updatable, longest=settings.request_timeout
                )
            )
    except BaseException:
        await _close(replicas)
        raise
    return replicas


async def _close(replicas: Sequence[RemoteReplica]) -> None:
    for replica in replicas:
        await replica.close()
