"""Sums of two numbers, learned by GRPO: a script as people write them for TRL, which knows nothing of us.

    python examples/trl/grpo.py --model_name_or_path Qwen/Qwen3-0.6B --output_dir runs/sums --max_steps 50

Any setting of GRPOConfig is an argument. The same script after one line: grpo_patched.py and grpo_aepo.py.
"""

import random
import re

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser


def questions(count: int, seed: int) -> Dataset:
    draw = random.Random(seed)
    pairs = [(draw.randint(1, 99), draw.randint(1, 99)) for _ in range(count)]
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)} for a, b in pairs]
    )


def last_number(completions, answer, **_) -> list[float]:
    """1 where the last number of the completion is the answer, and a little for writing a number at all."""
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        numbers = re.findall(r"\d+", completion[0]["content"])
        rewards.append(1.0 if numbers and numbers[-1] == right else 0.1 * bool(numbers))
    return rewards


def main() -> None:
    config, model = TrlParser((GRPOConfig, ModelConfig)).parse_args_and_config()
    trainer = GRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=last_number,
        args=config,
        train_dataset=questions(1000, seed=0),
        eval_dataset=questions(32, seed=1) if config.eval_strategy != "no" else None,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
