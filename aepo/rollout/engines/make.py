"""The engine that a configuration asks for, over the weights of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from aepo.agents.protocol import blamed
from aepo.config import Config
from aepo.install import pip_install
from aepo.parallel import Parallel, Weights
from aepo.registry import plain
from aepo.rollout.engine import CONTRACT, PolicyEngine, own_engine
from aepo.rollout.engines.huggingface.engine import HuggingFaceEngine
from aepo.rollout.engines.vllm.engine import VLLMEngine
from aepo.rollout.engines.vllm.orphans import temporary_directory
from aepo.rollout.engines.vllm.start import connect, launch

if TYPE_CHECKING:
    from aepo.models.language_model import LanguageModel


def make_engine(
    config: Config, language_model: LanguageModel, eos_ids: Sequence[int], version: int, parallel: Parallel
) -> PolicyEngine:
    """With the weights that the model has now; `close` it. eos_ids: tokens that end a segment.

    vLLM on this machine reads the weights from a directory in that of the run, which is gone when this returns.

    ValueError: vLLM is not installed, or cannot serve this configuration; there is no engine of the user's own by that
    name, or what its function returns is none. AgentError: it failed. OSError: the weights cannot be written there.
    ConnectionError: an endpoint does not answer.
    """
    if ":" in config.rollout.engine:
        return _own(config, language_model, eos_ids, version, parallel.full_weights(language_model.model))
    if config.rollout.engine == "huggingface":
        return HuggingFaceEngine(language_model.model, language_model.tokenizer, eos_ids, version=version)
    try:
        if config.vllm.endpoints:
            return connect(
                eos_ids=eos_ids,
                vocab_size=language_model.vocab_size,
                settings=config.vllm,
                version=version,
                weights=parallel.full_weights(language_model.model),
            )
        return _launched(config, language_model, eos_ids, version, parallel)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("vllm", "httpx"):
            raise
        raise ValueError(f"rollout.engine = vllm: {package} is not installed; {pip_install('vllm')}") from None


def _own(
    config: Config, language_model: LanguageModel, eos_ids: Sequence[int], version: int, weights: Weights
) -> PolicyEngine:
    make = own_engine(config.rollout.engine)
    with blamed(f"rollout.engine: {plain(make).__qualname__}", make):
        engine = make(config, language_model, tuple(eos_ids), version, weights)
    if missing := [name for name in CONTRACT if not hasattr(engine, name)]:
        raise ValueError(
            f"rollout.engine = {config.rollout.engine!r}: expected an engine (docs/rollout.md), got "
            f"{type(engine).__name__} without {', '.join(missing)}"
        )
    return engine


def _launched(
    config: Config, language_model: LanguageModel, eos_ids: Sequence[int], version: int, parallel: Parallel
) -> VLLMEngine:
    directory = Path(config.run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    with temporary_directory(directory, ".engine-") as saved:
        assert saved.directory is not None
        try:
            _save(saved.directory, language_model, parallel)
        except (OSError, SafetensorError) as error:
            what = "the weights that vLLM starts from cannot be written"
            raise OSError(f"run.dir = {directory}: {what}: {error}") from None
        return launch(
            saved.directory,
            eos_ids=eos_ids,
            vocab_size=language_model.vocab_size,
            settings=config.vllm,
            version=version,
            seed=config.run.seed,
        )


def _save(directory: Path, language_model: LanguageModel, parallel: Parallel) -> None:
    """By transformers, which has the names of a checkpoint for weights that it keeps otherwise; so all of them are in
    this process's memory, as copies, since they may be gone one by one."""
    weights = parallel.full_weights(language_model.model)
    state = {names[0]: tensor.to("cpu", copy=True) for names, tensor in weights if parallel.is_main}
    if parallel.is_main:
        language_model.model.save_pretrained(directory, state_dict=state)
        language_model.tokenizer.save_pretrained(directory)
