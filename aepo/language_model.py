"""A language model with its tokenizer and the way that questions and tool results become tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from aepo.types import TokenIds

# For models with a chat template: what they are told, and two dialogues about places that are in no task. With the same
# examples inside the system message, SmolLM2-135M-Instruct called no tool for any of 16 questions.
INSTRUCTIONS = (
    "You answer questions with two tools. <search>words</search> finds a sentence about a country. "
    "<python>code</python> runs a program. End with <answer>name or number</answer>."
)
# A line break after each call: without one, a token such as "><" closes the tag and begins the next one.
EXAMPLES = (
    (
        "What is the currency of the country whose capital is Poseidonis?",
        "<search>country with capital Poseidonis</search>\n"
        "<result> Atlantis: Poseidonis is the capital of Atlantis.</result>\n"
        "<search>currency of Atlantis</search>\n"
        "<result> Atlantis: the currency of Atlantis is the Trident.</result>\n"
        "<answer>Trident</answer>",
    ),
    (
        "How many million people live in Atlantis and Lemuria together?",
        "<search>population of Atlantis</search>\n"
        "<result> Atlantis: the population of Atlantis is 12 million.</result>\n"
        "<search>population of Lemuria</search>\n"
        "<result> Lemuria: the population of Lemuria is 30 million.</result>\n"
        "<python>print(12 + 30)</python>\n"
        "<result> 42</result>\n"
        "<answer>42</answer>",
    ),
)


@dataclass(frozen=True)
class LanguageModel:
    """With a chat template, questions are put to it as a user's; without one, as a line of text.

    model: causal, on its device. tokenizer: a fast one; its tags may be tokens or ordinary text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def from_directory(cls, path: Path, *, dtype: torch.dtype, device: str | torch.device) -> LanguageModel:
        """A model directory in the format of transformers. OSError: it is not there, or not one."""
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its types
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

    def prompt_tokens(self, question_text: str) -> TokenIds:
        """What comes before the first generated token."""
        if self.tokenizer.chat_template is None:
            return self.encode(f"{question_text}\n")
        messages = [{"role": "system", "content": INSTRUCTIONS}]
        for question, walk in EXAMPLES:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": walk}]
        messages.append({"role": "user", "content": question_text})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.encode(str(text))

    def tool_result_tokens(self, result_text: str) -> TokenIds:
        """What a model reads after its call."""
        return self.encode(f"<result> {result_text}</result>\n")

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, with its tags, without end-of-text tokens."""
        return str(
            self.tokenizer.decode(
                [token for token in token_ids if token not in self.eos_ids], skip_special_tokens=False
            )
        )

    def encode(self, text: str) -> TokenIds:
        """Nothing is added at the start or the end."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))
