"""Hand-made trajectories, a tiny random model and a toy task, for the tests of the trainer."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from aepo.advantages import Sample
from aepo.agents.agent import Agent
from aepo.agents.protocol import Task
from aepo.agents.tools.toolbox import ToolBox
from aepo.types import (
    Message,
    Node,
    Path,
    Question,
    Response,
    Reward,
    RolloutTree,
    ScoredTree,
    ToolCall,
    ToolResult,
    Trajectory,
    Turn,
)

VOCAB = 50


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0, vocab_size: int = VOCAB) -> PreTrainedModel:
    """Two Qwen3 layers with grouped-query attention: every kind of layer that the real models have."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.3,  # sharp enough that entropies differ between positions
    )
    return Qwen3ForCausalLM(config).to(dtype).eval()


def trajectory(prompt: Sequence[int], *segments: tuple[Sequence[int], Sequence[int]]) -> Trajectory:
    """Prompt, then (written, read) token pairs; log-probs and entropies are 0 until the test sets them."""
    tokens, generated, steps, anchors = [*prompt], [False] * len(prompt), [-1] * len(prompt), []
    just_read = tuple(prompt)
    for step, (written, read) in enumerate(segments):
        tokens += [*written, *read]
        generated += [True] * len(written) + [False] * len(read)
        steps += [step] * len(written) + [-1] * len(read)
        anchors.append(just_read)
        just_read = tuple(read)
    zeros = (0.0,) * len(tokens)
    return Trajectory(tuple(tokens), tuple(generated), zeros, zeros, tuple(steps), tuple(anchors))


def scored(groups: Sequence[Sequence[Trajectory]], rewards: Sequence[Sequence[float]]) -> list[ScoredTree]:
    """Trees of these paths, all of them fresh, with these total rewards."""
    return [
        ScoredTree(_tree(q, group), tuple(Reward(total, {}, False) for total in totals))
        for q, (group, totals) in enumerate(zip(groups, rewards, strict=True))
    ]


def _tree(index: int, group: Sequence[Trajectory]) -> RolloutTree:
    nodes: list[Node] = []
    paths: list[Path] = []
    for j, path in enumerate(group):
        parent, ends = None, [i for i in range(1, len(path.steps)) if path.steps[i] != path.steps[i - 1]]
        for begin, end in itertools.pairwise([0, *ends, len(path.steps)]):
            source = "prompt" if parent is None else "model" if path.generated[begin] else "tool"
            numbers = (path.logprobs[begin:end], path.entropies[begin:end]) if source == "model" else ((), ())
            nodes.append(Node(len(nodes), parent, source, path.token_ids[begin:end], *numbers))
            parent = nodes[-1].id
        paths.append(Path(j, nodes[-1].id, None, None, "answered"))
    return RolloutTree(Question(f"q{index}", "?"), tuple(nodes), tuple(paths), (), None)


def random_samples(count: int, seed: int = 0) -> list[Sample]:
    """Trajectories of 1 to 3 segments with tool results, off-policy log-probs and advantages of both signs."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(draw.randint(low, high))]

    samples = []
    for j in range(count):
        segments = [(tokens(1, 6), tokens(1, 5)) for _ in range(draw.randint(0, 2))] + [(tokens(1, 6), [])]
        path = trajectory(tokens(2, 6), *segments)

        def where_generated(low: float, high: float, path: Trajectory = path) -> tuple[float, ...]:
            return tuple(draw.uniform(low, high) if g else 0.0 for g in path.generated)

        path = Trajectory(
            path.token_ids,
            path.generated,
            where_generated(-6, -1),
            where_generated(0, 3),
            path.steps,
            path.anchors,
        )
        samples.append(Sample(j // 4, j % 4, path, where_generated(-2, 2)))
    return samples


WORDS = (
    "<pad>",
    "<eos>",
    "?",
    "<search>",
    "</search>",
    "<result>",
    "</result>",
    "<answer>",
    "</answer>",
    *"0123456789",
)


class ToyLanguageModel:
    """A `LanguageModel` whose tokens are the words above and whose weights are random."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        vocabulary = {word: i for i, word in enumerate(WORDS)}
        inner = Tokenizer(WordLevel(vocabulary, unk_token="?"))
        inner.pre_tokenizer = WhitespaceSplit()
        inner.decoder = Fuse()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")
        self.model = tiny_model(dtype, seed, vocab_size=len(WORDS))
        self.eos_ids = (1,)
        self.vocab_size = len(WORDS)


class ToyFormat:
    """A format of one's own: the words above."""

    name = "toy"
    identity = {"name": "toy"}  # noqa: RUF012
    chosen = "toy"
    warnings = ()
    eos_ids = (1,)
    stop_strings = ("</search>", "</answer>")
    vocab_size = len(WORDS)

    def prompt_tokens(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self._encode(f"? {' '.join(messages[-1]['content'])} ?")

    def read(self, token_ids: Sequence[int], finish_reason: str, *, before: Sequence[int] | None = None) -> Turn:
        text = self.decode(token_ids)
        calls = re.findall("<search>((?:(?!<search>).)*)</search>", text)
        if "</answer>" in text:
            return Turn(text, text, answered=True, answer=text)
        if calls:
            return Turn(text, text, (ToolCall("search", {"query": calls[-1]}),))
        return Turn(text, text, (ToolCall("", {}, "no opening tag"),) if "</search>" in text else ())

    def result_tokens(self, turn: Turn, results: Sequence[ToolResult]) -> tuple[int, ...]:
        digits = [c for c in results[0].text if c.isdigit()] or ["?"]
        return self._encode(f"<result> {' '.join(digits)} </result>")

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(WORDS[i] for i in token_ids if i not in self.eos_ids)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(WORDS.index(word) for word in text.split())


class Lookup:
    """A tool that knows one digit per question."""

    name = "search"
    timeout = 5.0
    description = "Looks a digit up."
    parameters = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}  # noqa: RUF012

    def __call__(self, query: str) -> str:
        if "9" in query:
            raise ValueError("nothing about 9")
        return f"{len(query)}"


class ToyTask(Task):
    """A contextual bandit: the first digit that the model writes must be that of the question's kind."""

    name = "toy"
    tools = (Lookup(),)

    def __init__(self, train: int = 8, heldout: int = 4) -> None:
        def question(i: int) -> Question:
            kind, answer = ("even", "7") if i % 2 == 0 else ("odd", "2")
            return Question(id=f"q{i}", prompt=f"{i}", answer=answer, kind=kind)

        self.train = [question(i) for i in range(train)]
        self.heldout = [question(i % train + 100 * i) for i in range(heldout)]  # same last digits, longer numbers

    def reward(self, question: Question, response: Response) -> Reward:
        digits = [c for c in response.text if c.isdigit()]
        success = bool(digits) and digits[0] == question.answer
        return Reward(float(success) + 0.1 * bool(digits), {"digit": float(bool(digits))}, success)


def toy_agent(task: Task | None = None) -> Agent:
    task = task or ToyTask()
    return Agent(task, ToyFormat(), ToolBox(task.tools), None, task.rewards, chat=False)
