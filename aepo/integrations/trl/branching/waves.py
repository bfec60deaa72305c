"""The waves of a rollout: a segment for all paths that want the model, branch decisions, calls of tools.

The segments of a wave come from one call of TRL's `_generate_single_turn`, whatever engine is behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl.chat_template_utils import parse_response

from aepo.integrations.trl.branching.entropies import measure
from aepo.integrations.trl.branching.environments import Environments
from aepo.integrations.trl.branching.paths import Group, Path
from aepo.integrations.trl.branching.tools import Result, run_calls


class Waves:
    """Brings all groups of a batch to their end. window: tokens of a segment whose entropy is looked at."""

    def __init__(self, trainer: Any, environments: Environments, groups: Sequence[Group], window: int) -> None:
        self._trainer = trainer
        self._environments = environments
        self._groups = groups
        self._window = window

    def run(self) -> None:
        while wave := [(group, path) for group in self._groups for path in group.ready]:
            for group in self._groups:
                group.ready = []
            asked = self._generate(wave)
            self._measure([(group, path) for group, path in wave if group.undecided(path)])
            for group, path in wave:
                group.decide(path)
            for group, path in self._run_tools(wave, asked):
                group.finish(path)
            self._measure([(group, path) for group, path in wave if group.undecided(path)])
            for group in self._groups:
                group.go_on()
        assert all(group.complete for group in self._groups)

    def _generate(self, wave: Sequence[tuple[Group, Path]]) -> list[list[dict[str, Any]]]:
        """Every path gets its next segment. Returned: the calls that each asks for."""
        trainer = self._trainer
        tokens, logprobs = trainer._generate_single_turn([path.tokens for _, path in wave], None, {}, num_generations=1)
        asked = []
        for index, (_, path) in enumerate(wave):
            room = trainer.max_completion_length - len(path.completion)
            segment = list(tokens[index][:room])
            tools = self._told(path.row)
            message = parse_response(trainer._tokenizer, segment, prefix=path.tokens, tools=tools) if segment else None
            path.add_segment(segment, None if logprobs is None else logprobs[index][:room], message)
            asked.append((message or {}).get("tool_calls") or [])
        return asked

    def _told(self, row: int) -> list[Any]:
        """The tools that the prompt of the row lists."""
        trainer = self._trainer
        return trainer._env_tools[trainer._batch_environments[row]] if trainer.environments else trainer.tools

    def _measure(self, wanted: Sequence[tuple[Group, Path]]) -> None:
        groups = {path.row: group for group, path in wanted}
        for path, initial, places in measure(self._trainer, [path for _, path in wanted], self._window):
            groups[path.row].measured(path, initial, places)

    def _run_tools(
        self, wave: Sequence[tuple[Group, Path]], asked: Sequence[list[dict[str, Any]]]
    ) -> list[tuple[Group, Path]]:
        """Paths that asked for calls read the results. Returned: those that have ended."""
        trainer, environments = self._trainer, self._environments
        calling = [
            (group, path, calls)
            for (group, path), calls in zip(wave, asked, strict=True)
            if calls and path.rounds < trainer.max_tool_calling_iterations
        ]
        for _, path, _ in calling:
            if path.undecided:
                environments.keep(path.undecided[-1], path.row)
        loop = getattr(trainer, "async_loop", None)
        found = run_calls([(calls, environments.tools(path.row)) for _, path, calls in calling], loop)
        going_on = set()
        for (group, path, _), results in zip(calling, found, strict=True):
            if self._read(path, results):
                group.ready.append(path)
                going_on.add(path.row)
        return [(group, path) for group, path in wave if path.row not in going_on]

    def _read(self, path: Path, results: Sequence[Result]) -> bool:
        """False: the results do not fit, and the path ends as it is."""
        path.rounds += 1
        path.calls += len(results)
        path.failures += sum(result.failed for result in results)
        messages = [result.message for result in results]
        tokens = self._trainer._get_tool_suffix_ids(messages)
        too_long = len(path.completion) + len(tokens) > self._trainer.max_completion_length
        if too_long or len(path.tokens) + len(tokens) >= max_positions(self._trainer):
            return False
        path.add_results(tokens, messages, self._environments.turn(path.row, results))
        return True


def max_positions(trainer: Any) -> int:
    """Tokens of a prompt and its completion that the engine can hold."""
    if trainer.use_vllm and trainer.vllm_mode == "colocate":
        return trainer.vllm_generation.llm.llm_engine.model_config.max_model_len
    return trainer.model.config.get_text_config().max_position_embeddings
