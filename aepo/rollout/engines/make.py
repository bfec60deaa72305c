"""The engine that a configuration asks for, over the weights of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from safetensors import SafetensorError

from aepo.config import Config
from aepo.install import pip_install
from aepo.rollout.engine import Engine
from aepo.rollout.engines.huggingface.engine import HuggingFaceEngine
from aepo.rollout.engines.vllm.engine import VLLMEngine
from aepo.rollout.engines.vllm.orphans import temporary_directory

if TYPE_CHECKING:
    from aepo.models.language_model import LanguageModel


class PolicyEngine(Engine, Protocol):
    """An engine that follows the weights of a model which is being trained."""

    def refresh(self, version: int) -> None:
        """The model has new weights: generate with those, and call them `version`."""
        ...

    def close(self) -> None:
        """End what was started for this engine. A second call does nothing."""
        ...


def make_engine(config: Config, language_model: LanguageModel, eos_ids: Sequence[int], version: int) -> PolicyEngine:
    """With the weights that the model has now; `close` it. eos_ids: tokens that end a segment.

    vLLM on this machine reads the weights from a directory in that of the run, which is gone when this returns.

    ValueError: vLLM is not installed, or cannot serve this configuration. OSError: the weights cannot be
    written there. ConnectionError: an endpoint does not answer.
    """
    model, tokenizer = language_model.model, language_model.tokenizer
    if config.rollout.engine == "huggingface":
        return HuggingFaceEngine(model, tokenizer, eos_ids, version=version)
    vocab_size, settings = language_model.vocab_size, config.vllm
    try:
        if settings.endpoints:
            return VLLMEngine.connect(
                eos_ids=eos_ids, vocab_size=vocab_size, model=model, settings=settings, version=version
            )
        directory = Path(config.run.dir)
        directory.mkdir(parents=True, exist_ok=True)
        with temporary_directory(directory, ".engine-") as saved:
            assert saved.directory is not None
            try:
                model.save_pretrained(saved.directory)
                tokenizer.save_pretrained(saved.directory)
            except (OSError, SafetensorError) as error:
                what = "the weights that vLLM starts from cannot be written"
                raise OSError(f"run.dir = {directory}: {what}: {error}") from None
            return VLLMEngine.launch(
                saved.directory,
                eos_ids=eos_ids,
                vocab_size=vocab_size,
                model=model,
                settings=settings,
                version=version,
                seed=config.run.seed,
            )
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("vllm", "httpx"):
            raise
        raise ValueError(f"rollout.engine = vllm: {package} is not installed; {pip_install('vllm')}") from None
