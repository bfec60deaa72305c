"""The rollout batch that every trainer gets, made up from a seed; the model; and what its gradient should be."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from aepo_kernels.advantages import group_advantages

PAD, END = 0, 1
"""Tokens that no path has, so that nothing is cut off or left out."""
HEAD_SIZE = 64
ENTROPY_ADVANTAGE = 0.2
"""AEPO's a."""


class Competitor(NamedTuple):
    """Who updates, and by which objective: only equal ones compare."""

    trainer: str
    objective: str

    def __str__(self) -> str:
        return f"{self.trainer}, {self.objective}"


GRPO, AEPO = "GRPO", "AEPO"
TRL = Competitor("TRL", GRPO)
TRL_PATCHED = Competitor("TRL, patch_trl()", GRPO)
AEPO_TRAINER = Competitor("AEPOTrainer", GRPO)
OWN = Competitor("aepo's trainer", GRPO)
AEPO_TRAINER_AEPO = Competitor("AEPOTrainer", AEPO)
OWN_AEPO = Competitor("aepo's trainer", AEPO)
COMPETITORS = (TRL, TRL_PATCHED, AEPO_TRAINER, OWN, AEPO_TRAINER_AEPO, OWN_AEPO)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One shape. All paths have one length, so that a trainer that pads has nothing to pad."""

    questions: int
    vocab: int
    branched: bool = True
    """Half of a question's paths copy another one up to a tool result; else only its prompt is shared."""
    hidden: int = 256
    layers: int = 4
    paths: int = 8
    """Of a question."""
    prompt: int = 128
    """Tokens; so are the next two."""
    written: int = 32
    """By the model, in each turn."""
    read: int = 64
    """From a tool, after each turn but the last."""
    turns: int = 4

    @property
    def completion(self) -> int:
        """Tokens of a path after its prompt."""
        return self.turns * self.written + (self.turns - 1) * self.read

    @property
    def sequences(self) -> int:
        return self.questions * self.paths

    @property
    def trained(self) -> int:
        """Tokens that the model wrote, of all paths."""
        return self.sequences * self.turns * self.written

    @property
    def positions(self) -> int:
        """Tokens of all paths."""
        return self.sequences * (self.prompt + self.completion)

    def model(self, seed: int = 0) -> Qwen3ForCausalLM:
        """Random float32 weights. With this spread the entropies of tokens differ, as AEPO's advantage needs it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Qwen3ForCausalLM(
                Qwen3Config(
                    vocab_size=self.vocab,
                    hidden_size=self.hidden,
                    intermediate_size=3 * self.hidden,
                    num_hidden_layers=self.layers,
                    num_attention_heads=self.hidden // HEAD_SIZE,
                    num_key_value_heads=max(self.hidden // HEAD_SIZE // 2, 1),
                    head_dim=HEAD_SIZE,
                    max_position_embeddings=self.prompt + self.completion,
                    initializer_range=0.05,
                    tie_word_embeddings=True,
                    pad_token_id=PAD,
                    eos_token_id=END,
                    bos_token_id=None,
                )
            )


@dataclasses.dataclass(frozen=True)
class MadePath:
    """What a rollout would have handed to a trainer."""

    question: int
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    written: tuple[bool, ...]
    """Of each token of the completion."""
    reward: float
    advantage: float
    """Within its question."""

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.prompt, *self.completion)

    @property
    def generated(self) -> tuple[bool, ...]:
        """Of each token."""
        return (*(False for _ in self.prompt), *self.written)


def make_paths(cell: Cell, seed: int = 0) -> list[MadePath]:
    """The paths of a question stand in a row."""
    draw = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(max(PAD, END) + 1, cell.vocab) for _ in range(count))

    turn = (True,) * cell.written + (False,) * cell.read
    written = (turn * cell.turns)[: cell.completion]
    # TRL divides by std + 1e-4: next to a std of about 100 that is less than the rounding of float32 gradients.
    rewards = [draw.gauss(0, 100) for _ in range(cell.sequences)]
    groups = torch.arange(cell.sequences) // cell.paths
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64), groups).tolist()
    made: list[MadePath] = []
    for question in range(cell.questions):
        prompt = tokens(cell.prompt)
        completions: list[tuple[int, ...]] = []
        for index in range(cell.paths):
            kept = _kept(cell, index) * len(turn)
            start = completions[index - cell.paths // 2][:kept] if kept else ()
            completions.append(start + tokens(cell.completion - kept))
        for completion in completions:
            row = len(made)
            made.append(MadePath(question, prompt, completion, written, rewards[row], advantages[row]))
    return made


def _kept(cell: Cell, index: int) -> int:
    """Turns, each with what the tool said, that a path copies from the one half a question before it."""
    return 1 + index % (cell.turns - 1) if cell.branched and index >= cell.paths // 2 else 0


def distinct_positions(paths: Sequence[MadePath]) -> int:
    """Tokens of all paths, those of a shared prefix counted once."""
    seen = set()
    for path in paths:
        prefix = 0
        for token in path.tokens:
            prefix = hash((prefix, token))
            seen.add(prefix)
    return len(seen)


def true_gradients(model: Qwen3ForCausalLM, paths: Sequence[MadePath], objective: str) -> dict[str, Tensor]:
    """Of the mean over tokens of -A r at r = 1, where nothing is clipped; AEPO weighs A by the entropies.

    Path by path, in float64; transformers computes norms and positions in float32 in any case. All paths have as many
    trained tokens, so that the mean over tokens is the mean over paths of their means.
    """
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        entropies = [_statistics(model, path)[1] for path in paths]
    mean, std = torch.cat(entropies).mean(), torch.cat(entropies).std()
    count = sum(map(len, entropies))
    for path, entropy in zip(paths, entropies, strict=True):
        factor = 1 + ENTROPY_ADVANTAGE * (entropy - mean) / std if objective == AEPO else 1.0
        logprobs, _ = _statistics(model, path)
        (-(path.advantage * factor * logprobs).sum() / count).backward()  # d r = d logprob at r = 1
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _statistics(model: Qwen3ForCausalLM, path: MadePath) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the tokens that the model wrote."""
    ids, generated = torch.tensor(path.tokens), torch.tensor(path.generated)
    log_p = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], dim=-1)[generated[1:]]
    return log_p.gather(-1, ids[generated][:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def gradient_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest over the parameters: norm of the error / norm of the truth; infinite where one is missing or NaN."""
    if found.keys() != truth.keys():
        return float("inf")
    errors = torch.stack([(found[name].double() - true).norm() / true.norm() for name, true in truth.items()])
    return errors.max().nan_to_num(torch.inf, torch.inf).item()
