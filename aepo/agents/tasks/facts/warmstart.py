"""Supervised training of the tiny model on demonstrations, once: the result is kept in the cache directory."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from aepo.agents.formats.tags import TagsFormat
from aepo.agents.tasks.facts.demonstrations import CAREFUL, HASTY, UNKNOWN, Demonstration, demonstrations
from aepo.agents.tasks.facts.geography import documents, real_world
from aepo.agents.tasks.facts.task import KINDS, PAIRS, FactsTask, plans
from aepo.agents.tasks.facts.tiny import tiny_tokenizer
from aepo.config import WarmStartConfig
from aepo.models.cache import cached
from aepo.models.language_model import LanguageModel
from aepo.models.small import IGNORED, Example, Progress, imitate, small_llama
from aepo.types import ToolResult, Turn


def warm_started(
    config: WarmStartConfig, cache_dir: Path, *, device: str | torch.device = "cpu", progress: Progress | None = None
) -> LanguageModel:
    """The tiny model after its training, in float32; from the cache, if the same training was done before.

    ValueError: `cache_dir` cannot be written."""
    fresh = untrained(config)

    def make(directory: Path) -> None:
        torch.nn.Module.to(fresh.model, device)
        train(fresh, config, progress)
        fresh.model.save_pretrained(directory)
        fresh.tokenizer.save_pretrained(directory)

    target = cached(cache_dir / f"tiny-{_digest(config, fresh)}", make)
    return LanguageModel.from_directory(target, dtype=torch.float32, device=device)


def untrained(config: WarmStartConfig) -> LanguageModel:
    """With the tokenizer for everything that questions, calls and results can say."""
    tokenizer = tiny_tokenizer(_texts())
    return LanguageModel(small_llama(tokenizer, config.seed), tokenizer)


def train(language_model: LanguageModel, config: WarmStartConfig, progress: Progress | None = None) -> None:
    """Of what the demonstrator wrote: careful demonstrations first, then hasty ones."""
    text_format = tags(language_model)

    def examples(skill: tuple[float, float, float]) -> Iterator[Example]:
        found = demonstrations(f"{config.seed} {skill}", skill)
        return (encode(language_model, text_format, one) for one in found)

    imitate(language_model.model, config, examples(CAREFUL), examples(HASTY), progress)


def tags(language_model: LanguageModel) -> TagsFormat:
    """The format of the demonstrations."""
    tokenizer, vocab_size, eos_ids = language_model.tokenizer, language_model.vocab_size, language_model.eos_ids
    return TagsFormat(tokenizer, vocab_size, eos_ids, (), tool_instructions=FactsTask.tool_instructions)


def encode(
    language_model: LanguageModel, text_format: TagsFormat, demonstration: Demonstration
) -> tuple[list[int], list[int]]:
    """Tokens of a whole demonstration, and labels: the token where the demonstrator wrote it, IGNORED elsewhere."""

    def written(text: str) -> list[int]:
        return language_model.tokenizer.encode(text, add_special_tokens=False)

    tokens = list(text_format.prompt_tokens([{"role": "user", "content": demonstration.question}]))
    labels = [IGNORED] * len(tokens)
    for step in demonstration.steps:
        call = written(f"<{step.tool}> {step.argument}</{step.tool}>")
        result = text_format.result_tokens(Turn("", ""), [ToolResult(step.result, None, 0.0)])
        tokens += [*call, *result]
        labels += [*call, *[IGNORED] * len(result)]
    answer = written(f"<answer> {demonstration.answer}</answer>")
    return [*tokens, *answer], [*labels, *answer]


def _texts() -> Iterator[str]:
    """Every word of the task: its documents, and the questions and calls of each kind about each country."""
    world = real_world()
    yield from documents(world)
    yield f" {UNKNOWN}"
    countries = sorted(world)
    for kind in KINDS:
        for plan in plans(world, countries[:5] if kind in PAIRS else countries, kind):
            yield plan.text
            yield from (f" {step.argument}" for step in plan.steps)


def _digest(config: WarmStartConfig, fresh: LanguageModel) -> str:
    """Of all that decides the result: settings, initial weights, tokenizer, and a sample of the demonstrations."""
    sample = [
        list(map(asdict, itertools.islice(demonstrations(str(config.seed), skill), 50))) for skill in (CAREFUL, HASTY)
    ]
    digest = hashlib.sha256(json.dumps([asdict(config), fresh.tokenizer.get_vocab(), sample], sort_keys=True).encode())
    for name, weight in fresh.model.state_dict().items():
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()[:16]
