"""Branched rollouts of AEPO in TRL: between its prompts and its completions, with its engine, tools and environments.

All state lives in the objects of one generation batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from trl import GRPOTrainer

from aepo.branching import BranchSettings
from aepo.integrations.trl.branching.environments import Environments, drop_forks, hide_forks
from aepo.integrations.trl.branching.paths import Group, Path, Seen
from aepo.integrations.trl.branching.waves import Waves


class BranchedRollout:
    """TRL's rollout function for one generation batch, and what its loop over tool calls would have returned.

    examples: the rows of the dataset. Every row gets one completion, sampled by itself from the question or from the
    place at which it left another row of its group.
    """

    def __init__(self, settings: BranchSettings, examples: Sequence[dict[str, Any]]) -> None:
        self._settings = settings
        self._examples = examples
        self._paths: list[Path] = []  # one per row, when all have ended
        self.other_prompts: dict[int, Any] = {}
        """Of rows whose environment had to be reset again and then said something else."""

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """TRL's keys, with the first segment of each row as its completion: TRL parses it before it asks for more."""
        prompt_ids, images, _ = trainer._tokenize_prompts(prompts)
        if images is not None:
            raise ValueError(
                "prompt: got images, expected text with branched rollouts; branched_rollouts=False takes both"
            )
        environments = Environments(trainer, self._examples, prompts)
        first_row = trainer.accelerator.process_index * len(prompts)
        log_vocabulary = math.log(trainer.model.config.get_text_config().vocab_size)
        groups = []
        for rows in rows_by_prompt(prompts, first_row, trainer.num_generations):
            fresh = share(self._settings.fresh_paths, len(rows), trainer.num_generations)
            prompt = prompt_ids[rows[0]]
            groups.append(Group(rows, prompt, fresh, self._settings, log_vocabulary, environments))
        Waves(trainer, environments, groups, self._settings.entropy_window).run()
        ended = {row: path for group in groups for row, path in group.finished.items()}
        self._paths = [ended[row] for row in range(len(prompts))]
        self.other_prompts = {row: prompt for row, (prompt, _) in environments.other_prompts.items()}
        log_means(trainer, [group.seen for group in groups])
        return {
            "prompt_ids": [path.prompt for path in self._paths],
            "completion_ids": [path.completion[: path.first] for path in self._paths],
            "logprobs": [path.logprobs[: path.first] for path in self._paths] if self._paths[0].logprobs else None,
        }

    def finished_paths(self) -> tuple[list, list, list, list | None, int, int, list]:
        """tool_mask, completions as messages, their tokens, log-probs (None: the engine has none), calls and failed
        calls, images per row. Calls before a branch count in every completion that has them."""
        paths = self._paths
        return (
            [path.mask for path in paths],
            [path.messages for path in paths],
            [path.completion for path in paths],
            [path.logprobs for path in paths] if paths[0].logprobs else None,
            sum(path.calls for path in paths),
            sum(path.failures for path in paths),
            [[] for _ in paths],
        )


class BranchingTrainer(GRPOTrainer):
    """GRPOTrainer whose training rollouts branch once `branch_with` was called; evaluations sample as TRL does."""

    rollout_func: Any
    _branching: BranchSettings | None = None
    _rollout: BranchedRollout | None = None  # of the batch that is being generated
    _examples: Sequence[dict[str, Any]] = ()  # of the batch that is being generated

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.environment_factories is not None:
            hide_forks(self)

    def branch_with(self, settings: BranchSettings) -> None:
        """From now on training rollouts branch. ValueError naming what they cannot go with."""
        for problem in _problems(self):
            raise ValueError(f"branched rollouts and {problem}")
        self._branching = settings

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._examples = inputs
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._examples = ()

    def _generate(self, prompts: list[Any]) -> Any:
        if self.environments:
            drop_forks(self)
        if self._branching is None or not self.model.training:
            return super()._generate(prompts)
        rollout = BranchedRollout(self._branching, self._examples)
        self.rollout_func: Any = rollout
        self._rollout = rollout
        try:
            generated = super()._generate(prompts)
        finally:
            self.rollout_func = None
            self._rollout = None
        for row, prompt in rollout.other_prompts.items():
            prompts[row] = prompt  # what reward functions and tables get
        return generated

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self._rollout is not None:
            return self._rollout.finished_paths()
        return super()._tool_call_loop(*args, **kwargs)


def _problems(trainer: Any) -> list[str]:
    """Each with what to change. Ranks take different numbers of waves, so nothing in one may wait for other ranks."""
    found = []
    if trainer.rollout_func is not None:
        found.append("rollout_func exclude each other: expected rollout_func=None, or branched_rollouts=False")
    if not trainer.tools:
        found.append("no tools: places to branch at are results of tools; expected tools or environment_factory")
    distributed = trainer._dist
    for name, active in (
        ("FSDP", distributed.is_fsdp),
        ("DeepSpeed ZeRO-3", distributed.is_zero3),
    ):
        if active:
            found.append(
                f"{name} exclude each other: parameters are gathered by all ranks at once; expected DDP or ZeRO-2"
            )
    if trainer.use_vllm and trainer.accelerator.num_processes > 1:
        if trainer.vllm_mode == "server":
            found.append("vllm_mode='server' need one process: its calls wait for all ranks; expected 'colocate'")
        elif trainer.vllm_tensor_parallel_size > 1:
            size = trainer.vllm_tensor_parallel_size
            found.append(f"vllm_tensor_parallel_size={size} exclude each other: ranks wait for each other; expected 1")
    return found


def rows_by_prompt(prompts: Sequence[Any], first_row: int, generations: int) -> list[list[int]]:
    """Groups of rows: those of one block of `generations` rows of all ranks' batch that have the same prompt.

    first_row: where the rows of this rank begin in that batch. Environments that `reset` at random make rows of a block
    differ.
    """
    groups: list[list[int]] = []
    for row, prompt in enumerate(prompts):
        block = (first_row + row) // generations
        for group in groups:
            if (first_row + group[0]) // generations == block and prompts[group[0]] == prompt:
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def share(fresh: int | None, rows: int, generations: int) -> int | None:
    """Of `fresh` rows of `generations`, as many as belong to a part of `rows` rows, rounded up."""
    return None if fresh is None else -(-fresh * rows // generations)


def log_means(trainer: Any, seen: Sequence[Seen]) -> None:
    """Means over the generation batch of all ranks; what nobody met is left out."""
    values = {
        "fresh_paths": [float(one.fresh_paths) for one in seen],
        "branches": [float(one.branches) for one in seen],
        "refused_branches": [float(one.refused) for one in seen],
        "branch_chance": [chance for one in seen for chance in one.chances],
        "root_entropy": [entropy for one in seen for entropy in one.root_entropies],
        "tool_entropy": [entropy for one in seen for entropy in one.tool_entropies],
    }
    own = torch.tensor([[math.fsum(one), len(one)] for one in values.values()], device=trainer.accelerator.device)
    total = trainer.accelerator.gather(own).view(-1, len(values), 2).sum(dim=0)
    for name, (added, count) in zip(values, total.tolist(), strict=True):
        if count:
            trainer._metrics["train"][f"rollout/{name}"].append(added / count)
