"""One update by each trainer, through the methods that its own training loop calls.

An update is everything from sampled paths to new weights: log-probs of other policies where the method needs them, all
micro-batches forward and backward, and AdamW's step. TRL's trainers run their real `train()`: a rollout function hands
the made-up paths in, and callbacks say where a step begins and ends.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from aepo.advantages import Sample
from aepo.bench.trainer_rows import (
    AEPO_TRAINER,
    AEPO_TRAINER_AEPO,
    OWN,
    OWN_AEPO,
    TRL,
    TRL_PATCHED,
    Cell,
    Competitor,
    MadePath,
    make_paths,
)
from aepo.config import load_config
from aepo.integrations.trl import AEPOConfig, AEPOTrainer, patch_trl
from aepo.learning.forward import token_statistics
from aepo.learning.learner import Learner
from aepo.learning.pack_paths import pack
from aepo.parallel import OneProcess
from aepo.types import Trajectory

ROWS_PER_MICROBATCH = 8
"""TRL's default; our own trainer gets as many tokens."""
NEVER_CLIPPED = 1e6
"""Of gradient norms, which every trainer computes."""


class Meter(Protocol):
    """What stands around every update."""

    def wanted(self) -> bool:
        """Whether there is to be another one; may wait for the answer."""
        ...

    def begin(self) -> None: ...

    def end(self) -> None: ...


Trainer = Callable[[Cell, Qwen3ForCausalLM, Meter], None]
"""Updates the model as long as the meter wants it."""


def trl(cell: Cell, model: Qwen3ForCausalLM, meter: Meter) -> None:
    _train(GRPOTrainer, GRPOConfig, cell, model, meter, loss_type="grpo")


def trl_patched(cell: Cell, model: Qwen3ForCausalLM, meter: Meter) -> None:
    if not patch_trl():  # its warning has said why
        raise RuntimeError("patch_trl() left TRL as it is")
    trl(cell, model, meter)


def aepo_in_trl(preset: str, cell: Cell, model: Qwen3ForCausalLM, meter: Meter) -> None:
    _train(AEPOTrainer, AEPOConfig, cell, model, meter, preset=preset)


def own_trainer(preset: str, cell: Cell, model: Qwen3ForCausalLM, meter: Meter) -> None:
    """AEPO's log-probs and entropies are computed in the update, as TRL has to; GRPO's ratio is against the log-probs
    that the paths came with, and TRL's is 1."""
    config = load_config(
        overrides=[
            f"policy.preset={preset}",
            f"policy.old_logprobs={'recompute' if preset == 'aepo' else 'engine'}",
            f"train.tokens_per_microbatch={ROWS_PER_MICROBATCH * (cell.prompt + cell.completion)}",
            f"train.questions={cell.questions}",
            f"rollout.paths={cell.paths}",
            f"rollout.max_tokens={cell.completion}",
            "rollout.fresh_paths=null",
            f"optimizer.max_grad_norm={NEVER_CLIPPED}",
        ]
    )
    learner = Learner(model, config, str, OneProcess())
    samples = [_sample(model, index % cell.paths, path) for index, path in enumerate(make_paths(cell))]
    step = 0
    while meter.wanted():
        step += 1
        meter.begin()
        batch = learner.pack_samples(samples, [str(question) for question in range(cell.questions)])
        learner.update(step, learner.add_log_probs(batch))
        meter.end()


def _sample(model: Qwen3ForCausalLM, index: int, path: MadePath) -> Sample:
    """With the log-probs and entropies that an engine would have sampled it with."""
    generated = path.generated

    def spread(values: Sequence[float]) -> tuple[float, ...]:
        rest = iter(values)
        return tuple(next(rest) if one else 0.0 for one in generated)

    nothing = spread([0.0] * sum(generated))
    steps = tuple(0 if one else -1 for one in generated)
    bare = Sample(
        path.question,
        index,
        Trajectory(path.tokens, generated, nothing, nothing, steps, ()),
        spread([path.advantage] * sum(generated)),
    )
    logprobs, entropies = (spread(values.tolist()) for values in token_statistics(model, pack([bare]), 1.0))
    return dataclasses.replace(
        bare, trajectory=dataclasses.replace(bare.trajectory, logprobs=logprobs, entropies=entropies)
    )


def _train(trainer: type[Any], config: type[Any], cell: Cell, model: Any, meter: Meter, **objective: Any) -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # of rollout_func
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(
            model=model,
            reward_funcs=_reward,
            args=config(
                output_dir=folder,
                per_device_train_batch_size=ROWS_PER_MICROBATCH,
                gradient_accumulation_steps=cell.sequences // ROWS_PER_MICROBATCH,
                num_generations=cell.paths,
                max_completion_length=cell.completion,
                max_steps=1_000_000,  # the meter says when
                max_grad_norm=NEVER_CLIPPED,
                lr_scheduler_type="constant",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                dataloader_pin_memory=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **objective,
            ),
            train_dataset=Dataset.from_list([{"prompt": str(question)} for question in range(cell.questions)]),
            processing_class=_tokenizer(),
            rollout_func=functools.partial(_rollout, make_paths(cell), cell.paths),
            callbacks=[_Steps(meter)],
        )
        made.remove_callback(PrinterCallback)
        made.train()


class _Steps(TrainerCallback):
    """Where TRL's steps begin and end. Paths are handed in within a step, before its first micro-batch."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._meter.wanted():
            raise ValueError("a trainer was started for no update")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.end()
        control.should_training_stop = not self._meter.wanted()


def _rollout(paths: Sequence[MadePath], of_question: int, prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
    """Of prompts that are the numbers of questions, each as often as it has paths."""
    seen = [0] * (len(paths) // of_question)
    chosen = []
    for prompt in prompts:
        question = int(prompt)
        chosen.append(paths[question * of_question + seen[question]])
        seen[question] += 1
    return {
        "prompt_ids": [list(path.prompt) for path in chosen],
        "completion_ids": [list(path.completion) for path in chosen],
        "logprobs": [[0.0] * len(path.completion) for path in chosen],  # read with vLLM alone
        "env_mask": [[int(one) for one in path.written] for path in chosen],
        "given_reward": [path.reward for path in chosen],
    }


def _reward(given_reward: Sequence[float], **_: Any) -> list[float]:
    return list(given_reward)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Knows the two special tokens; TRL decodes the paths for its rewards, to texts that nobody reads."""
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", padding_side="left")


TRAINERS: dict[Competitor, Trainer] = {
    TRL: trl,
    TRL_PATCHED: trl_patched,
    AEPO_TRAINER: functools.partial(aepo_in_trl, "grpo"),
    OWN: functools.partial(own_trainer, "grpo"),
    AEPO_TRAINER_AEPO: functools.partial(aepo_in_trl, "aepo"),
    OWN_AEPO: functools.partial(own_trainer, "aepo"),
}


class OneUpdate:
    """A meter that keeps the gradients of the one update that it wants, as AdamW gets them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self._model = model

    def wanted(self) -> bool:
        return not self.gradients

    def begin(self) -> None:
        self._hook = register_optimizer_step_pre_hook(self._keep)

    def end(self) -> None:
        self._hook.remove()

    def _keep(self, *_: Any) -> None:
        named = self._model.named_parameters()
        self.gradients = {name: one.grad.clone() for name, one in named if one.grad is not None}
