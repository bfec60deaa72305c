"""A recorder of what a trainer of TRL's does in every step, and runs of it on made-up completions."""

import collections
import dataclasses
import gc
import random

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOTrainer
from trl_toys import make_model, make_tokenizer, make_trainer, prompts

from aepo.integrations.trl import AEPOConfig, AEPOTrainer

gc.freeze()  # Trainer.train collects garbage twice: 0.4 s each where it looks at all that was imported

TOKENIZER = make_tokenizer()
EVALUATED = prompts(4)
MOVING = {"learning_rate": 2e-2, "lr_scheduler_type": "constant"}
"""Steps that take ratios out of every preset's clip range."""


@dataclasses.dataclass
class Generation:
    """A generation batch, before TRL shuffles it, and the weights that it was scored with."""

    weights: dict[str, Tensor]
    batch: dict[str, Tensor]


@dataclasses.dataclass
class Step:
    """An optimiser step: its micro-batches, and what the trainer made of them."""

    weights: dict[str, Tensor]
    generation: Generation
    micro_batches: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    gradients: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def recorded(trainer_class: type) -> type:
    """The trainer with `generations` and `steps`, of training and of evaluation (which has no gradients)."""

    class Recorded(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.generations: list[Generation] = []
            self.steps: list[Step] = []
            self.evaluated: list[Step] = []
            self._open: Step | None = None
            self.add_callback(_Gradients(self))

        def _generate_and_score_completions(self, inputs):
            weights = _copied(self.model.state_dict())
            self.generations.append(Generation(weights, _copied(super()._generate_and_score_completions(inputs))))
            return self.generations[-1].batch

        def _compute_loss(self, model, inputs):
            training = self.model.training
            step = self._open if training else None
            if step is None:
                step = Step(_copied(self.model.state_dict()), self.generations[-1])
                (self.steps if training else self.evaluated).append(step)
                self._open = step if training else self._open
            step.micro_batches.append(_copied(inputs))
            loss = super()._compute_loss(model, inputs)
            step.losses.append(loss.item())
            return loss

    return Recorded


class _Gradients(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        step, self.trainer._open = self.trainer._open, None
        step.gradients = {name: x.grad.detach().clone() for name, x in model.named_parameters() if x.grad is not None}


def _copied(tensors):
    return {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in tensors.items()}


def made_up(questions, trainer):
    """A rollout_func: completions of 1 to 8 tokens that depend on nothing but the prompt and which of its completions
    it is. Of those with more than 3 tokens about half have tool results, 0 in env_mask; some end with an end token."""
    seen = collections.Counter()
    found = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    for prompt in questions:
        draw = random.Random(f"{prompt} {seen[prompt]}")
        seen[prompt] += 1
        length = draw.randint(1, 8)
        tokens, mask = [draw.randrange(33, 90) for _ in range(length)], [1] * length
        if length > 3 and draw.random() < 0.5:
            mask[1:3] = 0, 0
        if draw.random() < 0.6:
            tokens[-1] = TOKENIZER.eos_token_id
        found["prompt_ids"].append(TOKENIZER(prompt)["input_ids"])
        found["completion_ids"].append(tokens)
        found["logprobs"].append([-1 - 6 * draw.random() for _ in tokens])
        found["env_mask"].append(mask)
    return found


Recorded = recorded(AEPOTrainer)
RecordedGRPO = recorded(GRPOTrainer)


def run(folder, trainer=Recorded, config=AEPOConfig, **changed):
    """A trained trainer: made-up completions with tool results, prompts of different lengths, gradients not clipped."""
    changed = {"rollout_func": made_up, "max_grad_norm": 0.0} | changed
    if changed.get("beta"):  # TRL loads the reference from where the model came from
        make_model(TOKENIZER).save_pretrained(folder / "start")
        changed["model"] = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    made = make_trainer(trainer, config, folder, **changed)
    made.train()
    return made


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]
