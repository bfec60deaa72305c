"""What the tests of aepo.integrations.trl train: bytes as tokens, TRL's Qwen3 template, a model of 30,000 weights."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # of rollout_func and environment_factory, in every test
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a model hub

import torch
import trl
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte and per tag; the text of the template is exactly TRL's, which knows how to parse its calls."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in (PAD, START, END)])
    inner.add_tokens([AddedToken(token, special=False) for token in TAGS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=END, padding_side="left")
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, spread: float = 0.3, **config) -> Qwen3ForCausalLM:
    """Random weights in float32. `spread`: of the initial weights; a wide one gives tokens of many entropies."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": spread,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return Qwen3ForCausalLM(Qwen3Config(**settings | config))


def prompts(count: int = 8) -> Dataset:
    """Prompts of different lengths, as text."""
    return Dataset.from_list([{"prompt": "abc " * (1 + i % 3) + str(i)} for i in range(count)])


def dialogues(count: int = 8) -> Dataset:
    """The same as dialogues, for tools and environments."""
    return Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts(count)])


def length_reward(completions, **_) -> list[float]:
    """Different for almost every completion."""
    return [float(len(str(completion))) for completion in completions]


def settings(folder: Path, **changed) -> dict:
    """Arguments of GRPOConfig (and of AEPOConfig) for a run of seconds on a CPU."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
    } | changed


def make_trainer(
    trainer: Callable, config: Callable, folder: Path, *, dataset=None, model=None, rewards=length_reward, **changed
):
    """A trainer of TRL's or ours. Keywords that GRPOTrainer takes itself are handed to it, the others to its config."""
    tokenizer = make_tokenizer()
    own = {
        name: changed.pop(name)
        for name in (
            "tools",
            "environment_factory",
            "rollout_func",
            "peft_config",
            "eval_dataset",
            "loss_fn",
            "callbacks",
        )
        if name in changed
    }
    return trainer(
        model=make_model(tokenizer) if model is None else model,
        reward_funcs=rewards,
        args=config(**settings(folder, **changed)),
        train_dataset=prompts() if dataset is None else dataset,
        processing_class=tokenizer,
        **own,
    )
