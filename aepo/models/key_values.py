"""The keys and values that a model keeps of every token, as its configuration has them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class KeyValueShape:
    layers: int
    heads: int  # of keys and of values; queries may have more
    head_dim: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> KeyValueShape:
        text = config.get_text_config()
        return cls(
            layers=text.num_hidden_layers,
            heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        )

    @property
    def per_token(self) -> int:
        """Numbers, keys and values together."""
        return 2 * self.layers * self.heads * self.head_dim
