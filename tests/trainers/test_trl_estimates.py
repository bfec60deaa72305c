"""Claims: the entropies of a step are those of the policy that sampled, whatever else TRL scored; advantages that are
not TRL's own keep AEPO's factor, take GiGPO's settings, and know the groups of an evaluation.
"""

import collections

import pytest
import torch
from peft import LoraConfig
from trl_oracle import assert_step, group_estimate, loss_mask, row_keys, scored, truth_of
from trl_recorder import EVALUATED, TOKENIZER, Recorded, logged, made_up, run
from trl_toys import length_reward, make_trainer

from aepo.integrations.trl import AEPOConfig
from aepo_kernels import PolicyObjective


def test_entropies_are_the_adapters_where_only_the_reference_was_scored(tmp_path):
    """With LoRA and beta > 0 and one update per batch TRL scores the base alone, with the model that is trained."""
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = make_trainer(
        Recorded, AEPOConfig, tmp_path, peft_config=lora, beta=0.1, rollout_func=made_up, max_steps=1
    )
    trainer.train()
    (generation,) = trainer.generations
    batch, mask = generation.batch, loss_mask(generation.batch)
    assert "old_per_token_logps" not in batch
    trainer.model.load_state_dict(generation.weights)
    with torch.no_grad():
        adapted = scored(trainer.model.eval().double(), batch)[1]
        with trainer.model.disable_adapter():
            base = scored(trainer.model, batch)[1]
    assert (adapted - base)[mask].abs().max() > 1e-2
    plain = group_estimate(generation)
    rows = torch.tensor([plain[key] for key in row_keys(batch)], dtype=torch.float64)[:, None]
    expected = rows * (1 + 0.2 * (adapted - adapted[mask].mean()) / adapted[mask].std())
    torch.testing.assert_close(batch["advantages"][mask].double(), expected[mask], rtol=1e-4, atol=1e-5)
    assert logged(trainer, "policy/entropy_std") == pytest.approx([adapted[mask].std().item()], rel=1e-5)


def rewards_of(batch):
    texts = TOKENIZER.batch_decode([tokens for _, tokens in row_keys(batch)], skip_special_tokens=True)
    return torch.tensor(length_reward(texts), dtype=torch.float64)


def less_than_the_question(rewards, questions):
    """Each reward against 10 times the number of its question."""
    return rewards / 10 - questions


@pytest.mark.parametrize("advantage", ["batch", "test_trl_estimates:less_than_the_question"])
def test_other_estimates_get_the_entropy_factor(advantage, tmp_path):
    trainer = run(tmp_path, preset="aepo", advantage=advantage, per_device_train_batch_size=8)
    for step in trainer.steps:
        rewards = rewards_of(step.generation.batch)
        if advantage == "batch":
            estimate = (rewards - rewards.mean()) / rewards.std()
        else:
            estimate = rewards / 10 - torch.arange(8) // 4
        advantages = dict(zip(row_keys(step.generation.batch), estimate.tolist(), strict=True))
        assert_step(step, truth_of(step, PolicyObjective.preset("aepo"), advantages=advantages))


def same_results(prompts, trainer):
    """Every tool says the same, so that all second turns begin in one state."""
    found = made_up(prompts, trainer)
    for tokens, written in zip(found["completion_ids"], found["env_mask"], strict=True):
        tokens[:] = [token if own else 64 for token, own in zip(tokens, written, strict=True)]
    return found


def gigpo_oracle(generation, weight, discount):
    """Advantages of every row, per token of its completion: the group's, and those of turns that read the same."""
    keys, mask = row_keys(generation.batch), loss_mask(generation.batch)
    rewards = rewards_of(generation.batch)
    turns = collections.defaultdict(list)  # (prompt, number of the turn) -> (row, tokens, return)
    for row, ((prompt, _), written) in enumerate(zip(keys, mask.tolist(), strict=True)):
        counted = [place for place, own in enumerate(written) if own]
        called = counted[1:2] == [3]  # made_up's results are tokens 1 and 2
        cuts = [counted[:1], counted[1:]] if called else [counted]
        for number, tokens in enumerate(cuts):
            turns[prompt, number].append((row, tokens, rewards[row] * discount ** (len(cuts) - 1 - number)))
    group = group_estimate(generation)
    found = torch.tensor([group[key] for key in keys], dtype=torch.float64)[:, None].repeat(1, mask.shape[1])
    for members in turns.values():
        returns = torch.stack([value for *_, value in members])
        if len(members) > 1 and returns.std() > 0:
            for (row, tokens, _), one in zip(members, (returns - returns.mean()) / returns.std(), strict=True):
                found[row, tokens] += weight * one
    assert max(number for _, number in turns) == 1, "nothing was read after the prompt"
    return dict(zip(keys, found, strict=True))


@pytest.mark.parametrize(("weight", "discount"), [(0.4, 0.5), (2.0, 1.0)])
def test_gigpo_takes_its_weight_and_discount(weight, discount, tmp_path):
    settings = {"step_weight": weight, "step_discount": discount, "rollout_func": same_results}
    trainer = run(tmp_path, preset="gigpo", per_device_train_batch_size=8, **settings)
    for step in trainer.steps:
        of_rows = gigpo_oracle(step.generation, weight, discount)

        def share(batch, step, of_rows=of_rows):
            return torch.cat([of_rows[key] for x in step.micro_batches for key in row_keys(x)])

        ones = dict.fromkeys(of_rows, 1.0)
        assert_step(step, truth_of(step, PolicyObjective.preset("gigpo"), advantages=ones, share=share))


def evaluated(folder, **changed):
    """Questions of 2 completions each, where those of training have 4."""
    trainer = make_trainer(
        Recorded,
        AEPOConfig,
        folder,
        rollout_func=same_results,
        eval_dataset=EVALUATED,
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        **changed,
    )
    trainer.evaluate()
    assert len(trainer.generations) == 2
    return trainer.generations


def test_an_evaluation_has_groups_of_its_own(tmp_path):
    for generation in evaluated(tmp_path, preset="gigpo"):
        mask = loss_mask(generation.batch)
        expected = torch.stack([*gigpo_oracle(generation, 1.0, 0.95).values()])
        torch.testing.assert_close(generation.batch["advantages"].double()[mask], expected[mask], rtol=1e-5, atol=1e-6)
    function = "test_trl_estimates:less_than_the_question"
    for generation in evaluated(tmp_path, preset="grpo", advantage=function):
        expected = rewards_of(generation.batch) / 10 - torch.arange(4) // 2
        torch.testing.assert_close(generation.batch["advantages"].double(), expected)
