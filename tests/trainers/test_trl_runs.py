"""Claims about whole runs of AEPOTrainer: what GRPOTrainer can do, it can, with the same metrics and files."""

import pandas
import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_recorder import EVALUATED, made_up, recorded
from trl_toys import dialogues, length_reward, make_trainer, prompts

from aepo.integrations.trl import AEPOConfig, AEPOTrainer


def make(folder, **changed):
    return make_trainer(AEPOTrainer, AEPOConfig, folder, **changed)


def last_log(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry][-1]


def weights(trainer):
    return {name: x.detach().clone() for name, x in trainer.model.named_parameters()}


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1}])
def test_lora_trains_its_adapter_alone_and_the_base_is_the_reference(settings, tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = make_trainer(recorded(AEPOTrainer), AEPOConfig, tmp_path, peft_config=lora, **settings)
    before = weights(trainer)
    trainer.train()
    for name, after in weights(trainer).items():
        assert torch.equal(after, before[name]) != ("lora" in name), name
    assert trainer.ref_model is None
    assert all("lora" in name for name in trainer.steps[0].gradients)
    if settings:
        assert last_log(trainer)["kl"] > 1e-4  # the adapter does not begin at 0
        batch = trainer.generations[0].batch
        with trainer.model.disable_adapter(), torch.no_grad():
            ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
            attended = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
            logits = trainer.model(input_ids=ids, attention_mask=attended).logits.double().log_softmax(-1)
        width = batch["completion_ids"].shape[1]
        base = logits[:, -width - 1 : -1].gather(-1, batch["completion_ids"][..., None]).squeeze(-1)
        valid = batch["completion_mask"] != 0
        torch.testing.assert_close(batch["ref_per_token_logps"].double()[valid], base[valid], rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    runs = [make(tmp_path, rollout_func=made_up, gradient_checkpointing=on, num_iterations=2) for on in (False, True)]
    for trainer in runs:
        trainer.train()
    for name, x in weights(runs[0]).items():
        torch.testing.assert_close(x, weights(runs[1])[name], rtol=1e-5, atol=1e-5)


def test_bf16_on_the_cpu_is_near_float32(tmp_path):
    logs = []
    for bf16 in (False, True):
        trainer = make(tmp_path, rollout_func=made_up, bf16=bf16, max_steps=1)
        trainer.train()
        logs.append(last_log(trainer))
    for name in ("entropy", "policy/entropy_std", "grad_norm"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.03)  # 8 bits in the layers: 0.4 percent each
    assert logs[1]["entropy"] != logs[0]["entropy"]


class _Evaluations(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.seen.append(metrics)


def test_evaluation_within_a_run_leaves_the_run_alone(tmp_path):
    seen = _Evaluations()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2, "per_device_eval_batch_size": 4}
    same = {"rollout_func": made_up, "optim": "sgd"}
    evaluated = make(tmp_path, eval_dataset=EVALUATED, callbacks=[seen], **same, **settings)
    evaluated.train()
    plain = make(tmp_path, **same)
    plain.train()
    for name, x in weights(evaluated).items():  # rows are shuffled by other random numbers, so sums are rounded anew
        torch.testing.assert_close(x, weights(plain)[name], rtol=1e-5, atol=1e-7)
    assert len(seen.seen) == 2
    assert {"eval_policy/entropy_std", "eval_policy/ratio_mean", "eval_reward", "eval_entropy"} <= seen.seen[0].keys()


@pytest.mark.parametrize("preset", ["aepo", "reinforce++"])
def test_a_resumed_run_is_the_uninterrupted_one(preset, tmp_path):
    settings = {"preset": preset, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_iterations": 1}
    whole = make(tmp_path, **settings)
    whole.train()
    again = make(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert all(torch.equal(x, weights(again)[name]) for name, x in weights(whole).items())
    assert again.state.log_history[-2]["reward"] == whole.state.log_history[-2]["reward"]


def test_the_model_card_names_the_method(tmp_path):
    trainer = make(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert "2510.14545" in card
    assert "AEPO" in card
    assert "aepo" in card.split("---")[1]


def test_the_table_of_completions_has_the_advantages_that_were_used(tmp_path):
    for preset in ("reinforce++", "grpo"):
        folder = tmp_path / preset
        trainer = make_trainer(
            recorded(AEPOTrainer), AEPOConfig, folder, preset=preset, rollout_func=made_up, log_completions=True
        )
        trainer.train()
        table = pandas.read_parquet(folder / "completions" / "completions_00001.parquet")
        assert table["advantage"].tolist() == pytest.approx(trainer.generations[0].batch["advantages"].tolist())
        assert table["length_reward"].tolist() == pytest.approx(length_reward(table["completion"]))
        assert len(table) == 4


@pytest.mark.parametrize(
    "settings", [{}, {"beta": 0.0, "top_entropy_quantile": 0.5}, {"mask_truncated_completions": True}]
)
def test_metrics_are_trls_and_the_policys(settings, tmp_path):
    ours, theirs = make(tmp_path, **settings), make_trainer(GRPOTrainer, GRPOConfig, tmp_path, **settings)
    ours.train()
    theirs.train()
    own = {"policy/" + name for name in ("ratio_mean", "ratio_max", "approx_kl", "clip_high", "clip_low", "dual_clip")}
    own |= {"policy/entropy_std", "policy/advantage_flips"}
    assert last_log(ours).keys() == last_log(theirs).keys() | own


def test_an_iterable_dataset(tmp_path):
    rows = prompts(8).to_list()
    trainer = make(tmp_path, dataset=IterableDataset.from_generator(lambda: iter(rows)))
    trainer.train()
    assert trainer.state.global_step == 2


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def test_tools_with_plain_rollouts(tmp_path):
    trainer = make(tmp_path, dataset=dialogues(), tools=[add], branched_rollouts=False)
    trainer.train()
    assert last_log(trainer)["tools/call_frequency"] == 0


def of_dialogues(questions, trainer):
    """A rollout_func for prompts that are dialogues."""
    found = made_up([prompt[-1]["content"] for prompt in questions], trainer)
    return {name: found[name] for name in ("prompt_ids", "completion_ids", "logprobs")}


def test_tools_beside_a_rollout_func_train_without_branches(tmp_path):
    """The preset's rollouts branch only where nobody else makes them."""
    trainer = make(tmp_path, dataset=dialogues(), tools=[add], preset="aepo", rollout_func=of_dialogues)
    trainer.train()
    assert trainer.state.global_step == 2
    assert not [name for name in last_log(trainer) if name.startswith("rollout/")]


class Counter:
    """An environment with one tool."""

    def reset(self, **kwargs):
        self.value = 0

    def increase(self, step: int) -> int:
        """Adds to the counter.

        Args:
            step: How much.
        """
        self.value += step
        return self.value


def test_environments_with_plain_rollouts(tmp_path):
    trainer = make(tmp_path, dataset=dialogues(), environment_factory=Counter, branched_rollouts=False)
    trainer.train()
    assert trainer.state.global_step == 2


async def vowels(completions, **kwargs):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def test_several_reward_functions_with_weights_one_of_them_async(tmp_path):
    for preset in ("grpo", "reinforce++"):
        trainer = make_trainer(
            recorded(AEPOTrainer),
            AEPOConfig,
            tmp_path,
            rewards=[length_reward, vowels],
            reward_weights=[0.5, -2.0],
            rollout_func=made_up,
            preset=preset,
            log_completions=True,
            max_steps=1,
        )
        trainer.train()
        table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
        rewards = torch.tensor((0.5 * table["length_reward"] - 2 * table["vowels"]).tolist(), dtype=torch.float64)
        expected = (rewards - rewards.mean()) / (rewards.std() + (1e-4 if preset == "grpo" else 0))
        assert trainer.generations[0].batch["advantages"].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
