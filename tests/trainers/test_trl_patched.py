"""Unchanged trainers of TRL after patch_trl(): the same training, as near to float64 as before."""

from __future__ import annotations

import pytest
import torch
import trl_toys
from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from aepo.integrations.trl import head
from aepo.integrations.trl.head import patch_trl, unpatch_trl


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch_trl()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Tokens of each call of our operation."""
    seen, operation = [], head.linear_logprobs_and_entropy

    def counted(hidden, *args, **others):
        seen.append(len(hidden))
        return operation(hidden, *args, **others)

    monkeypatch.setattr(head, "linear_logprobs_and_entropy", counted)
    return seen


PAIRS = [{"prompt": f"ab{i}", "chosen": " yes" * (1 + i % 3), "rejected": " no" * (1 + i % 2)} for i in range(8)]
SINGLE = [{"prompt": f"ab{i}", "completion": " yes" * (1 + i % 3), "label": i % 2 == 0} for i in range(8)]
ONLINE = {"num_generations", "max_completion_length"}  # settings that the others do not have


def saved_model(folder):
    """On disk as well: reference models are loaded from where the model came from."""
    model = trl_toys.make_model(trl_toys.make_tokenizer())
    model.save_pretrained(folder)
    model.config.name_or_path = str(folder)
    return model


def online(trainer, config, **changed):
    return lambda folder: trl_toys.make_trainer(
        trainer, config, folder, model=saved_model(folder), max_steps=1, **changed
    )


def offline(trainer, config, data, **changed):
    def make(folder):
        arguments = trl_toys.settings(folder, max_steps=1, **changed)
        return trainer(
            model=saved_model(folder),
            args=config(**{name: value for name, value in arguments.items() if name not in ONLINE}),
            train_dataset=Dataset.from_list(data),
            processing_class=trl_toys.make_tokenizer(),
        )

    return make


TRAINERS = {  # and whether it calls our operation: SFT asks for top-1 accuracy, DPO and KTO do of the live model only
    "GRPO": (online(GRPOTrainer, GRPOConfig, beta=0.04, temperature=0.7), True),
    "RLOO": (online(RLOOTrainer, RLOOConfig), True),
    "DPO": (offline(DPOTrainer, DPOConfig, PAIRS), True),
    "SFT": (offline(SFTTrainer, SFTConfig, [{k: row[k] for k in ("prompt", "completion")} for row in SINGLE]), False),
    "KTO": (offline(KTOTrainer, KTOConfig, SINGLE), True),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_of_trl_trains_as_before(name, tmp_path, calls):
    """To a part in 10^5: both are float32, and a gradient's norm has a sum of 30,000 squares behind it."""
    make, ours = TRAINERS[name]
    logged = []
    for patch in (False, True):
        trainer = make(tmp_path / str(patch))
        assert not patch or patch_trl()
        assert not calls
        trainer.train()
        logged.append(trainer.state.log_history[0])
    assert bool(calls) == ours
    before, after = ({k: x for k, x in log.items() if isinstance(x, float) and "time" not in k} for log in logged)
    assert before["grad_norm"] > 0.01
    assert after == pytest.approx(before, rel=1e-5, abs=1e-6)


class Watched(GRPOTrainer):
    def _compute_loss(self, model, inputs):
        self.seen = inputs
        return super()._compute_loss(model, inputs)


def grpo_step(folder, patch: bool) -> tuple[Watched, dict[str, torch.Tensor]]:
    """One step of plain gradient descent, rate 1, loss bnpo: the weights move by the gradient."""
    changed = {"learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = trl_toys.make_trainer(
        Watched, GRPOConfig, folder, max_steps=1, loss_type="bnpo", temperature=0.7, beta=0.0, **changed
    )
    before = {name: x.detach().double().clone() for name, x in trainer.model.named_parameters()}
    if patch:
        assert patch_trl()
    trainer.train()
    unpatch_trl()
    return trainer, {name: before[name] - x.detach().double() for name, x in trainer.model.named_parameters()}


def true_gradients(seen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the mean over the batch's tokens of -A ratio, at ratio 1, in float64 from whole logits."""
    model = trl_toys.make_model(trl_toys.make_tokenizer()).double()
    ids = torch.cat([seen["prompt_ids"], seen["completion_ids"]], 1)
    mask = torch.cat([seen["prompt_mask"], seen["completion_mask"]], 1)
    length = seen["completion_ids"].shape[1]
    logits = model(ids, attention_mask=mask).logits[:, -length - 1 : -1] / 0.7
    logprobs = logits.log_softmax(-1).gather(2, seen["completion_ids"][..., None])[..., 0]
    counts = seen["completion_mask"].double()
    loss = -(seen["advantages"].double()[:, None] * (logprobs - logprobs.detach()).exp() * counts).sum() / counts.sum()
    loss.backward()
    return {name: x.grad for name, x in model.named_parameters()}


def test_a_patched_step_is_as_near_to_float64_as_trls(tmp_path):
    """A weight of size w is stored to w 2^-24; what else may differ is the order of float32 sums, of which there are
    hundreds behind the gradient of a weight: 16 roundings of the largest one."""
    moved = {}
    for patch in (False, True):
        trainer, moved[patch] = grpo_step(tmp_path / str(patch), patch)
        true = true_gradients(trainer.seen)
    assert max(float(x.abs().max()) for x in true.values()) > 0.1
    for name, gradient in true.items():
        ours, theirs = (float((moved[patch][name] - gradient).abs().max()) for patch in (True, False))
        assert ours <= max(theirs, 16 * 2.0**-24 * max(1.0, float(gradient.abs().max()))), (name, ours, theirs)
