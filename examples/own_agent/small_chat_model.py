"""Makes a chat model small enough to be trained on two cores, as a model directory in the format of transformers.

    python small_chat_model.py museum.yaml museum_data:demonstrations

It has about a million parameters, a chat template with tools, and what it imitated for a minute: somebody who knows how
to use the tools of the agent in the YAML file, and who often decides badly. What is right is left for AEPO to find.

Any chat model whose template shows tools can stand in its place; this one is here because it learns while you watch.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from json import dumps
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aepo.agents.agent import Agent
from aepo.agents.formats.make import make_format
from aepo.config import WarmStartConfig, load_config
from aepo.load import load_agent
from aepo.models.language_model import LanguageModel
from aepo.models.small import IGNORED, Example, imitate, small_llama
from aepo.registry import resolve_function
from aepo.types import Question, ToolCall, ToolResult

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# As models of the Hermes and Qwen families are told about tools, but in one short line for each.
TEMPLATE = """
{%- if tools or messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n' }}{% endif %}
    {%- for tool in tools or [] %}
        {{- 'tool ' + tool.function.name + '(' + tool.function.parameters.properties | join(', ') + ')\n' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'tool' %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}{{- '<|im_start|>user\n' }}{% endif %}
        {{- '<tool_response>' + message.content + '</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""
# A word or a run of signs takes the space before it along.
PIECES = r" ?[A-Za-z_]+|[0-9]+| ?[^A-Za-z0-9_\s]+|\s"


@dataclass(frozen=True)
class Demonstration:
    """What somebody did who was asked: calls with their results, one after the other, and an answer."""

    question: Question
    calls: tuple[tuple[ToolCall, str], ...]
    answer: str
    observation: str | None = None  # what the environment said at the start


Demonstrations = Callable[[str, bool], Iterator[Demonstration]]
"""(seed, careful) -> without end; careful: without mistakes."""


def make_model(config_file: Path, demonstrations: Demonstrations, training: WarmStartConfig) -> None:
    """Written to the directory that `model.name` of the configuration names."""
    config = load_config(config_file)
    spelling = chat_tokenizer(())  # one token per byte, to see what there is to read and write
    with closing(load_agent(config, LanguageModel(small_llama(spelling, 0), spelling))) as agent:
        samples = islice(demonstrations("words", True), 3000)
        texts = [agent.format.decode(dialogue(agent, spelling, one)[0]) for one in samples]
        tokenizer = chat_tokenizer(texts)
        language_model = LanguageModel(small_llama(tokenizer, training.seed), tokenizer)
        schemas = (agent.environment or agent.toolbox).schemas
        agent = replace(agent, format=make_format(config.format, language_model, schemas))

        def examples(careful: bool) -> Iterator[Example]:
            return (dialogue(agent, tokenizer, one) for one in demonstrations(f"{training.seed} {careful}", careful))

        imitate(language_model.model, training, examples(True), examples(False), show)
    language_model.model.save_pretrained(config.model.name)
    tokenizer.save_pretrained(config.model.name)


def chat_tokenizer(texts: Iterator[str] | tuple[str, ...] | list[str]) -> PreTrainedTokenizerFast:
    """One token for every word and number of the texts; whatever else there is in bytes."""
    control = [AddedToken(token, special=token not in TAGS, normalized=False) for token in (PAD, START, END, *TAGS)]
    tags = "|".join(map(re.escape, (PAD, START, END, *TAGS)))
    words = {piece for text in texts for part in re.split(tags, text) for piece in re.findall(PIECES, part)}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    known = {byte_level.pre_tokenize_str(word)[0][0] for word in words}
    entries = [*(str(token.content) for token in control), *sorted(known | set(byte_level.alphabet()))]
    # With these merges, none, a piece is a word of the vocabulary or else its bytes.
    inner = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, [], ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), byte_level])
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens(control)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=END)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def dialogue(agent: Agent, tokenizer: PreTrainedTokenizerFast, demonstration: Demonstration) -> Example:
    """The tokens that the agent's format makes of a demonstration, as in a rollout; labels where the model writes."""
    tokens = list(agent.prompt_tokens(demonstration.question, demonstration.observation))
    labels = [IGNORED] * len(tokens)
    for call, result in demonstration.calls:
        arguments = dumps(dict(call.arguments))
        text = f'<tool_call>{{"name": "{call.tool}", "arguments": {arguments}}}</tool_call>{END}'
        written = tokenizer.encode(text, add_special_tokens=False)
        turn = agent.format.read(written, "eos")
        assert turn.calls == (call,), f"{text} is read as {turn.calls}"
        read = agent.format.result_tokens(turn, [ToolResult(result, None, 0.0)])
        tokens += [*written, *read]
        labels += [*written, *[IGNORED] * len(read)]
    written = tokenizer.encode(demonstration.answer + END, add_special_tokens=False)
    return [*tokens, *written], [*labels, *written]


def show(step: int, steps: int, loss: float) -> None:
    if step % 50 == 0 or step == steps:
        print(f"step {step} of {steps}: loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a model gains nothing from a second one
    config_file, name, *steps = sys.argv[1:]
    training = WarmStartConfig(steps=int(steps[0]) if steps else 400, batch_tokens=1024)
    make_model(Path(config_file), resolve_function(name, "demonstrations", "seed, careful"), training)
