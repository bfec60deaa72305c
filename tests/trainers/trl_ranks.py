"""One rank of the runs that test_trl_ranks.py compares with runs of one process: started by torchrun.

torchrun --nproc-per-node 2 tests/trainers/trl_ranks.py DIRECTORY      what a rank saw goes to DIRECTORY/RANK.pt
"""

import functools
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from trl_recorder import TOKENIZER, made_up, recorded
from trl_toys import make_model, make_trainer

from aepo.integrations.trl import AEPOConfig, AEPOTrainer

MOVING = {"optim": "sgd", "learning_rate": 2e-2, "lr_scheduler_type": "constant"}
"""Two steps on the same rollouts; by SGD, whose steps do not enlarge rounding."""


def one_rank_is_empty(questions, trainer):
    """Completions of the second half of a batch of 8 never end: mask_truncated_completions leaves them out."""
    found = made_up(questions, trainer)
    second = trainer.accelerator.process_index == 1 or trainer.accelerator.num_processes == 1
    for row, ids in enumerate(found["completion_ids"]):
        ends = not (second and row >= len(questions) - 4)
        found["completion_ids"][row] = [*ids[:-1], TOKENIZER.eos_token_id if ends else 65]
    return found


def own_loss(logprobs, entropy, batch):
    mean, std = batch.entropy_stats
    ratio = (logprobs - batch.rollout_logprobs).exp().clamp(max=3)
    value = -(ratio * batch.advantages * (1 + 0.2 * (batch.old_entropy - mean) / std)).sum() / batch.tokens
    return value - logprobs.sum() / batch.paths / 50, {"ratio": ratio.mean(), "tokens": batch.tokens}


CASES = {
    "aepo": {"preset": "aepo", "objective": {"entropy_advantage": 0.9}},
    "gspo": {"preset": "gspo", "beta": 0.1},
    "dr_grpo": {"preset": "dapo", "loss_type": "dr_grpo", "gradient_accumulation_steps": 2},
    "gigpo": {"preset": "gigpo"},
    "reinforce++": {"preset": "reinforce++", "log_completions": True},
    "own_loss": {"loss_fn": own_loss},
    "an_empty_rank": {
        "preset": "aepo",
        "rollout_func": one_rank_is_empty,
        "mask_truncated_completions": True,
    },
    "an_empty_rank_own_loss": {
        "loss_fn": own_loss,
        "rollout_func": one_rank_is_empty,
        "mask_truncated_completions": True,
    },
}


@functools.cache
def start() -> Path:
    """Where the reference is loaded from. In a process group rank 0 alone would save it."""
    folder = Path(tempfile.mkdtemp())
    make_model(TOKENIZER).save_pretrained(folder)
    return folder


def run(case: str, rows: int) -> dict:
    """Gradients of the steps (with several ranks: averaged), losses and logged numbers, `rows` on this rank."""
    settings = {"rollout_func": made_up, "num_iterations": 2, "max_grad_norm": 0.0, **MOVING, **CASES[case]}
    folder = Path(tempfile.mkdtemp())
    if settings.get("beta"):
        settings["model"] = AutoModelForCausalLM.from_pretrained(start(), dtype=torch.float32)
    trainer = make_trainer(recorded(AEPOTrainer), AEPOConfig, folder, per_device_train_batch_size=rows, **settings)
    trainer.train()
    return {
        "gradients": [
            {name.removeprefix("module."): x for name, x in step.gradients.items()} for step in trainer.steps
        ],
        "weights": {
            name: x.detach().clone() for name, x in trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        },
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "advantages": list(trainer._logs["advantages"]),
        "mine": trainer.generations[0].batch["advantages"],
        "valid": [int(step.micro_batches[0]["completion_mask"].sum()) for step in trainer.steps],
    }


if __name__ == "__main__":
    start()  # before there is a process group
    found = {case: run(case, 4) for case in CASES}
    torch.save(found, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
