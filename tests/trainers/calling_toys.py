"""A real model that writes calls of tools by chance, and tools and environments for it to call.

The weights are a Markov chain over tokens: the embedding of a token is the state that it leads to, the head has the
log-chances of the next token in each state. Small random weights in the layers make its entropies depend on all that
came before, so that no two places are alike.
"""

import copy
import math

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, set_seed
from trl import GRPOConfig
from trl_toys import END, length_reward, make_model, make_tokenizer, settings

CLOSE = "}}\n</tool_call>"
DIGITS, LETTERS = "0123456789", "abcdefgh"


def opening(tool: str) -> str:
    """A token: the text of a call up to its one argument."""
    return f'<tool_call>\n{{"name": "{tool}", "arguments": {{"to": '


def calling_tokenizer(tools: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([*map(opening, tools), CLOSE])
    return tokenizer


def calling_model(
    tokenizer: PreTrainedTokenizerFast, tools: list[str], *, call: float = 0.7, again: float = 0.1, noise: float = 0.05
) -> Qwen3ForCausalLM:
    """call: chance that a turn begins with one. again: that another call follows a call in the same turn. A call is
    three tokens, an answer letters of which every one is the last with a chance of 0.4."""
    model = make_model(tokenizer, spread=noise)
    ids = tokenizer.convert_tokens_to_ids
    calls = {ids(opening(tool)): 1 / len(tools) for tool in tools}
    digits = {ids(digit): 0.1 for digit in DIGITS}
    letters = {ids(letter): 1 / len(LETTERS) for letter in LETTERS}
    close, end = ids(CLOSE), ids(END)
    nothing = 1e-6  # of the tokens that a state does not lead to, all together
    states = [  # the tokens that lead to it, and the chances of what comes next
        ([ids("Ċ")], {**_times(calls, call), **_times(letters, 1 - call)}),  # Ċ: a newline, the end of any prompt
        (list(calls), digits),
        (list(digits), {close: 1.0}),
        ([close], {end: 1 - again, **_times(calls, again)}),
        (list(letters), {end: 0.4, **_times(letters, 0.6)}),
    ]
    with torch.no_grad():
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding[:, : len(states)] = 0
        head.fill_(0)
        for number, (tokens, following) in enumerate(states):
            embedding[tokens] = 0
            embedding[tokens, number] = 1
            chances = torch.full((len(tokenizer),), nothing / len(tokenizer))
            for token, chance in following.items():
                chances[token] += chance
            # The last norm makes the one of the state sqrt(hidden size). From 0 upwards, so that a little of another
            # state cannot make likely what is unlikely there.
            head[:, number] = (chances.log() - chances.log().min()) / math.sqrt(model.config.hidden_size)
    return model


def _times(chances: dict[int, float], factor: float) -> dict[int, float]:
    return {token: chance * factor for token, chance in chances.items()}


def questions(count: int = 4) -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": f"go {i}"}], "start": i} for i in range(count)])


def make_calling_trainer(
    trainer, folder, *, tools=("step",), model=(), rewards=length_reward, own=(), config=GRPOConfig, **changed
):
    """trainer: a class. tools: names that the model calls. model: arguments of `calling_model`. own: of the trainer."""
    tokenizer = calling_tokenizer(list(tools))
    arguments = {"max_completion_length": 220, "max_tool_calling_iterations": 4, "learning_rate": 1e-5} | changed
    return trainer(
        model=calling_model(tokenizer, list(tools), **dict(model)),
        reward_funcs=rewards,
        args=config(**settings(folder, **arguments)),
        processing_class=tokenizer,
        **({"train_dataset": questions()} | dict(own)),
    )


def step(to: int) -> str:
    """Go there.

    Args:
        to: where
    """
    return f"at {to}"


class Walk:
    """A list of steps. No two steps say the same, so that what a state is can be read off."""

    def reset(self, start: int = 0, **_) -> None:
        self.path = [start]

    def step(self, to: int) -> str:
        """Go there; 9 is a wall.

        Args:
            to: where
        """
        if to == 9:
            raise ValueError("a wall")
        self.path.append(to)
        return "at " + "".join(map(str, self.path))


class ForkedWalk(Walk):
    def fork(self):
        return copy.deepcopy(self)


class Recorder:
    """Mixed into a trainer: what `_generate` returned, and the segments that were sampled for it."""

    segments: tuple | list = ()

    def sample(self, seed: int = 0) -> "Batch":
        """One generation batch, as a training step begins with."""
        set_seed(seed)
        self.segments = []
        self.model.train()
        examples = next(iter(self.get_train_dataloader()))
        scored = self._generate_and_score_completions(examples)
        return Batch(self, examples, scored, self.generated, self.segments)

    def _generate(self, prompts):
        self.generated = super()._generate(prompts)
        return self.generated

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        tokens, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        turns = prompt_ids * (len(tokens) // len(prompt_ids))  # of the same length but where TRL evaluates
        self.segments = [*self.segments, *zip(map(tuple, turns), map(tuple, tokens), strict=True)]
        return tokens, logprobs


class Batch:
    def __init__(self, trainer, examples, scored, generated, segments):
        self.trainer, self.examples, self.scored, self.segments = trainer, examples, scored, segments
        self.prompt_ids, self.completion_ids, self.mask, self.messages, self.logprobs, *_ = generated
        self.metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if values}

    def calls(self, row: int) -> list[dict]:
        """Of the completion, in order."""
        asked = [message.get("tool_calls") or [] for message in self.messages[row] if message["role"] == "assistant"]
        read = sum(message["role"] == "tool" for message in self.messages[row])
        return [call["function"] for calls in asked for call in calls][:read]  # the last ones may not have been run

    def results(self, row: int) -> list[str]:
        return [message["content"] for message in self.messages[row] if message["role"] == "tool"]
