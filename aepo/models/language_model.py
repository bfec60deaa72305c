"""A language model with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from aepo.models.adapters import refuse_adapter_directory
from aepo.registry import error_text


@dataclass(frozen=True)
class LanguageModel:
    """model: causal, on its device. tokenizer: a fast one. What its tokens mean is the business of a `ChatFormat`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def from_directory(cls, path: Path, *, dtype: torch.dtype, device: str | torch.device) -> LanguageModel:
        """A model directory in the format of transformers. ValueError, in one line: it is not one, a weight is missing,
        does not fit or is damaged, or it holds an adapter."""
        refuse_adapter_directory(path)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, local_files_only=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # transformers has no kind of its own
            raise ValueError(f"{path}: expected a model directory of transformers: {error_text(error)}") from error
        model, found = loaded
        if missing := sorted(found["missing_keys"]):  # transformers makes them up
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise ValueError(f"{path}: expected all weights of the model, {missing[0]} is missing{more}")
        model.to(device)
        return cls(model.eval(), tokenizer)

    @property
    def vocab_size(self) -> int:
        """Size of the distributions that tokens are drawn from."""
        return self.model.config.get_text_config().vocab_size

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, in ascending order."""
        found = {self.tokenizer.eos_token_id}
        generation = getattr(self.model, "generation_config", None)
        configured = getattr(generation, "eos_token_id", None)
        found.update(configured if isinstance(configured, list) else [configured])
        return tuple(sorted(token for token in found if token is not None))
