"""Supervised training of the tiny model on demonstrations, once: the result is kept in the cache directory."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from aepo.agents.formats.tags import TagsFormat
from aepo.agents.tasks.facts.demonstrations import CAREFUL, HASTY, UNKNOWN, Demonstration, demonstrations
from aepo.agents.tasks.facts.geography import documents, real_world
from aepo.agents.tasks.facts.task import KINDS, PAIRS, FactsTask, plans
from aepo.agents.tasks.facts.tiny import tiny_model, tiny_tokenizer
from aepo.config import WarmStartConfig
from aepo.models.language_model import LanguageModel
from aepo.types import ToolResult, Turn

Progress = Callable[[int, int, float], None]  # steps done, steps in all, loss [nats per token]

IGNORED = -100  # label of what the demonstrator did not write
POOL = 16  # batches' worth of demonstrations that are sorted by length together: 6% padding instead of 28%


def warm_started(
    config: WarmStartConfig, cache_dir: Path, *, device: str | torch.device = "cpu", progress: Progress | None = None
) -> LanguageModel:
    """The tiny model after its training, in float32; from the cache, if the same training was done before."""
    fresh = untrained(config)
    target = cache_dir / f"tiny-{_digest(config, fresh)}"
    if not target.exists():
        torch.nn.Module.to(fresh.model, device)
        train(fresh, config, progress)
        _save(fresh, target)
    return LanguageModel.from_directory(target, dtype=torch.float32, device=device)


def untrained(config: WarmStartConfig) -> LanguageModel:
    """With the tokenizer for everything that questions, calls and results can say."""
    tokenizer = tiny_tokenizer(_texts())
    return LanguageModel(tiny_model(tokenizer, config.seed), tokenizer)


def train(language_model: LanguageModel, config: WarmStartConfig, progress: Progress | None = None) -> None:
    """AdamW on what the demonstrator wrote: careful demonstrations first, to learn how, then hasty ones.

    The learning rate rises over 20 steps, stays, and falls linearly to a twentieth over the last 60%.
    """
    model, steps = language_model.model, config.steps
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.peak_rate, betas=(0.9, 0.95), weight_decay=0.0)
    careful = round(config.careful_share * steps)
    batches = itertools.chain(
        itertools.islice(_batches(language_model, config, CAREFUL), careful),
        itertools.islice(_batches(language_model, config, HASTY), steps - careful),
    )
    for step, (tokens, labels) in enumerate(batches):
        late = max(0.0, step / steps - 0.4) / 0.6
        optimizer.param_groups[0]["lr"] = config.peak_rate * min(1.0, (step + 1) / 20) * (1 - 0.95 * late)
        loss = _loss(model, tokens.to(model.device), labels.to(model.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            progress(step + 1, steps, loss.item())
    model.eval()


def _loss(model: PreTrainedModel, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean over the tokens that count [nats]. tokens, labels: int64 [B, L]; logits are made for those tokens alone."""
    hidden = model.base_model(input_ids=tokens).last_hidden_state[:, :-1]
    counts = labels[:, 1:] != IGNORED
    return F.cross_entropy(model.get_output_embeddings()(hidden[counts]), labels[:, 1:][counts])


def _batches(
    language_model: LanguageModel, config: WarmStartConfig, skill: tuple[float, float, float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels [B, L] of similar lengths, about `batch_tokens` of them with the padding."""
    source = demonstrations(f"{config.seed} {skill}", skill)
    order, text_format = random.Random(config.seed), tags(language_model)
    while True:
        pool: list[tuple[list[int], list[int]]] = []
        while sum(len(tokens) for tokens, _ in pool[-1:]) * len(pool) < POOL * config.batch_tokens:
            pool.append(encode(language_model, text_format, next(source)))
        pool.sort(key=lambda pair: len(pair[0]))
        batches: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in pool:
            if batches[-1] and len(pair[0]) * (len(batches[-1]) + 1) > config.batch_tokens:
                batches.append([])
            batches[-1].append(pair)
        order.shuffle(batches)
        for batch in batches:
            yield _padded([tokens for tokens, _ in batch], 0), _padded([labels for _, labels in batch], IGNORED)


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


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


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


def _save(language_model: LanguageModel, target: Path) -> None:
    """Under its name only once it is complete; another process may have been faster with the same."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        language_model.model.save_pretrained(partial)
        language_model.tokenizer.save_pretrained(partial)
        if not target.exists():
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
