"""An agent with tools in TRL, trained by AEPO: completions branch where the model is unsure about what a tool said.

    python examples/trl/agent.py --model_name_or_path Qwen/Qwen3-0.6B --output_dir runs/agent --max_steps 50

Any setting of AEPOConfig is an argument: --preset grpo samples and trains as GRPO does. Needs a model whose chat
template has tools.
"""

import random

from datasets import Dataset
from trl import ModelConfig, TrlParser

from aepo.integrations.trl import AEPOConfig, AEPOTrainer

PRICES = {"apple": 3, "bread": 7, "cheese": 12, "honey": 9, "olives": 5, "rice": 4}  # in coins


def price(item: str) -> str:
    """Looks up what an item costs.

    Args:
        item: The name of the item, in small letters.
    """
    return f"{PRICES[item]} coins" if item in PRICES else f"{item} is not sold here"


def questions(count: int, seed: int) -> Dataset:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        one, other = draw.sample(sorted(PRICES), 2)
        prompt = [{"role": "user", "content": f"How many coins do {one} and {other} cost together?"}]
        rows.append({"prompt": prompt, "answer": str(PRICES[one] + PRICES[other])})
    return Dataset.from_list(rows)


def right_sum(completions, answer, **_) -> list[float]:
    """1 where the last thing that is said has the sum; 0.1 for a price that was looked up on the way."""
    rewards = []
    for messages, total in zip(completions, answer, strict=True):
        looked_up = any(m["role"] == "tool" and "coins" in m["content"] for m in messages)
        said = messages[-1].get("content") or ""
        rewards.append(1.0 if messages[-1]["role"] == "assistant" and total in said.split() else 0.1 * looked_up)
    return rewards


def main() -> None:
    config, model = TrlParser((AEPOConfig, ModelConfig)).parse_args_and_config()
    trainer = AEPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=right_sum,
        tools=[price],
        args=config,
        train_dataset=questions(1000, seed=0),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
