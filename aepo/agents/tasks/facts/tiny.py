"""The tiny model: a Llama of 1 million parameters with a tokenizer of whole words, before any training."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aepo.agents.tasks.facts.geography import MAX_NUMBER

TAGS = tuple(f"<{slash}{name}>" for name in ("search", "python", "result", "answer") for slash in ("", "/"))
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
# A word or a sign takes the space before it along, so that decoding is joining.
PIECES = r" ?[A-Za-z]+|[0-9]+| ?[^A-Za-z0-9\s]|\s"


def tiny_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token for every word of the texts and every number up to MAX_NUMBER; other text in the longest known parts.

    Numbers are whole because copying one is then a single step: with a token per digit, 1 calculation in 20 was right
    after training on 1.0 million tokens; with whole numbers, 3 sums in 4 after 0.7 million.
    """
    words = {piece for text in texts for piece in re.findall(PIECES, text) if not piece.isdigit()}
    characters = set(string.ascii_letters + string.digits + string.punctuation + " \n")
    numbers = {str(number) for number in range(MAX_NUMBER + 1)}
    special = (PAD, EOS, UNK, *TAGS)
    vocabulary = {token: i for i, token in enumerate((*special, *sorted(words | characters | numbers)))}
    # WordPiece without a prefix for the parts of a word is: the longest match first.
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK, continuing_subword_prefix=""))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, eos_token=EOS, unk_token=UNK, clean_up_tokenization_spaces=False
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Random float32 weights, with attention that copies from the start.

    In every layer the key projection starts equal to the query projection, so that a token attends to its like, and
    the output projection as the transpose of an orthogonal value projection, so that what is attended to becomes
    likelier ("mimetic initialization", Trockman & Kolter, arXiv 2305.09828). In a prototype, after training on 0.4
    million tokens, 0 of 100 held-out walks through a question were right without it, 54 with the value part alone,
    and 64 with both parts and an initializer range of 0.05 in place of 0.02.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            torch.nn.init.orthogonal_(attention.v_proj.weight)
            attention.o_proj.weight.copy_(0.5 * attention.v_proj.weight.T)
    return model
