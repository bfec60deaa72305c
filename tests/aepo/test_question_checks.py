"""What would end a run when a question is drawn is said at the start; the truth is every prompt made into tokens."""

from __future__ import annotations

import io
import random
import time
import unicodedata
from collections.abc import Sequence
from typing import Any

import pytest
from format_templates import family, tokenizer
from rich.console import Console
from scoring_toys import response_of
from tokenizers import normalizers

from aepo.agents.agent import Agent
from aepo.agents.formats.chat import ChatTemplateFormat
from aepo.agents.formats.tags import TagsFormat
from aepo.agents.protocol import AgentError, ChatFormat, RewardFunction, Task
from aepo.agents.question_checks import PROBE, Context, Split, _most_tokens, check_questions, fitting, one_of_each_row
from aepo.agents.rewards.builtin import BUILTIN, COMPARED
from aepo.agents.tools.environment import EnvironmentTools
from aepo.agents.tools.toolbox import ToolBox
from aepo.config import load_config
from aepo.types import Message, Question, Response

PIECES = ("a word, ", "12345", "\u0344", "\u00e9", "\U0001d160", "\u4e2d\u6587", "<|im_end|>", "\n\n", "\ud800", " ")
"""U+0344 and U+1D160 become 2 and 3 times as many bytes by NFC; a control token and a lone surrogate."""


class Asking(Task):
    name = "asking"

    def __init__(self, questions: Sequence[Question], system: str | None = None) -> None:
        self.train, self.system = questions, system


class Counting:
    """A format that counts the prompts it makes. times: how often it writes the last text."""

    def __init__(self, inner: ChatFormat, times: int = 1) -> None:
        self.inner, self.times, self.made = inner, times, 0

    def prompt_tokens(self, messages: Sequence[Message]) -> tuple[int, ...]:
        self.made += 1
        *before, last = messages
        return self.inner.prompt_tokens([*before, {**last, "content": last["content"] * self.times}])

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.inner.decode(token_ids)


def formatted(name: str = "qwen", times: int = 1) -> Counting:
    made = family(name)
    return Counting(ChatTemplateFormat(made, len(made), (made.eos_token_id,)), times)


def agent_of(task: Task, made: Any, rewards: Sequence[RewardFunction] = (), environment: Any = None) -> Agent:
    return Agent(task, made, ToolBox([]), environment, dict.fromkeys(rewards, 1.0), chat=True)


def fit(task: Task, made: Any, positions: int, drop: bool = True, environment: Any = None) -> tuple[list[str], str]:
    """Ids that are kept, and what was said."""
    console = Console(file=io.StringIO(), width=10_000)
    context = Context(positions, "as the test says")
    kept = fitting(agent_of(task, made, (), environment), task.train, "training", context, console, drop=drop)
    return [question.id for question in kept], console.file.getvalue()


def normalizing(name: str) -> TagsFormat:
    made = tokenizer(None, eos="<eos>", special=["<eos>"])
    made.backend_tokenizer.normalizer = getattr(normalizers, name)()
    return TagsFormat(made, len(made), (made.eos_token_id,))


def random_questions(seed: int) -> list[Question]:
    draw = random.Random(seed)
    examples = ({"role": "system", "content": "Be brief. " * 20}, {"role": "user", "content": "1 + 1?"})
    examples = (*examples, {"role": "assistant", "content": "2"})
    questions = []
    for index in range(60):
        text = "".join(draw.choice(PIECES) for _ in range(draw.choice((1, 5, 20, 40)))) + "?"
        last = {"role": "user", "content": text}
        named = {**last, "name": "me"}  # what a template does with more than roles and texts is not known
        own = ({"role": "system", "content": text * 2}, last)
        prompt = draw.choice((text, (*examples, last), own, (last, {"role": "assistant", "content": "2"}, named)))
        questions.append(Question(f"q{index}", prompt))
    return questions


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["qwen", "llama3", "NFC", "NFD"])
def test_exactly_the_prompts_that_fill_the_context_are_left_out(name: str, seed: int) -> None:
    """Truth: every prompt made into tokens."""
    made = normalizing(name) if name.isupper() else formatted(name)
    questions = random_questions(seed)
    task = Asking(questions)
    count = {q.id: len(agent_of(task, made).prompt_tokens(q)) for q in questions}
    sizes = sorted(count.values())
    for positions in (sizes[5], sizes[30], sizes[-1], sizes[-1] + 1):
        assert fit(task, made, positions)[0] == [q.id for q in questions if count[q.id] < positions], positions


def test_the_bound_of_a_text() -> None:
    """Of NFC and NFD, over all of Unicode; ASCII is as it is."""
    for code in (*range(0xD800), *range(0xE000, 0x30000)):
        most = _most_tokens(chr(code))
        for form in ("NFC", "NFD"):
            assert len(unicodedata.normalize(form, chr(code)).encode()) <= most, hex(code)
    assert _most_tokens("abc\n") == 4
    assert _most_tokens("\ud800") >= 1


def test_short_prompts_are_not_made_into_tokens() -> None:
    """The shortest and the longest are; a system text and examples that all have count once, as tokens."""
    examples = ({"role": "user", "content": "1 + 1?" * 50}, {"role": "assistant", "content": "2"})
    rows = [Question(f"q{i}", (*examples, {"role": "user", "content": "w " * i})) for i in range(1, 21)]
    task, made = Asking(rows, system="Be brief. " * 50), formatted()
    longest = len(agent_of(task, made).prompt_tokens(rows[-1]))
    made.made = 0
    assert len(fit(task, made, longest + 60)[0]) == 20
    assert made.made == 2


def test_a_format_that_writes_texts_twice_is_noticed() -> None:
    rows = [Question(f"q{i}", "z" * i) for i in (1, 30, 40, 50)]
    count = {q.id: len(agent_of(Asking(rows), formatted(times=3)).prompt_tokens(q)) for q in rows}
    assert fit(Asking(rows), formatted(times=3), count["q40"])[0] == ["q1", "q30"]


@pytest.mark.parametrize("written", ["tojson", "urlencode", "wordwrap(20)", "replace('a', 'aaaa')"])
def test_a_template_that_writes_texts_in_another_way(written: str) -> None:
    """The longest text is not the longest prompt: quotes are escaped, spaces broken, letters repeated."""
    made = family("qwen")
    made.chat_template = made.chat_template.replace("message.content", f"(message.content|{written})")
    rows = [Question("short", "x")]
    rows += [Question(f"q{i}", text * 40) for i, text in enumerate(('"', "%", " a b", "a", "\\", "&"))]
    rows.append(Question("longest", "z" * 170))
    chat = ChatTemplateFormat(made, len(made), (made.eos_token_id,))
    count = {q.id: len(agent_of(Asking(rows), chat).prompt_tokens(q)) for q in rows}
    for limit in sorted(count.values())[1:]:
        short = [name for name, tokens in count.items() if tokens < limit]
        assert fit(Asking(rows), chat, limit)[0] == short


def test_a_message_with_more_than_its_text_is_always_made_into_tokens() -> None:
    class Everything:
        def prompt_tokens(self, messages: Sequence[Message]) -> tuple[int, ...]:
            return (0,) * len(repr(messages))

        def decode(self, token_ids: Sequence[int]) -> str:
            return PROBE

    rows = [Question(f"q{i}", ({"role": "user", "content": "z" * i},)) for i in range(3)]
    rows[1] = Question("named", ({**rows[1].prompt[0], "name": "z" * 100},))
    assert fit(Asking(rows), Everything(), 100)[0] == ["q0", "q2"]


def test_what_is_said_of_long_prompts() -> None:
    rows = [Question(f"q{i}", "z" * (100 if i < 6 else 110 if i == 6 else 1)) for i in range(10)]
    tokens = len(agent_of(Asking(rows), formatted()).prompt_tokens(rows[0]))
    said = (
        "7 of 10 training prompts fill the model's context: "
        + ", ".join(f"q{i} ({tokens} tokens)" for i in range(5))
        + ", ..; expected fewer than 60 tokens (as the test says)"
    )
    with pytest.raises(ValueError, match="fill") as error:
        fit(Asking(rows), formatted(), 60, drop=False)
    assert str(error.value) == f"{said}; task.long_prompts=drop leaves them out"
    assert fit(Asking(rows), formatted(), 60) == (["q7", "q8", "q9"], f"left out: {said}\n")
    with pytest.raises(ValueError, match=r"^7 of 7 training prompts fill") as error:
        fit(Asking(rows[:7]), formatted(), 60)
    assert "drop" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "source"),
    [
        ([], "max_position_embeddings of model.name = 'tiny'"),
        (["vllm.max_model_len=9"], "max_position_embeddings of model.name = 'tiny'"),
        (["rollout.engine=vllm", "vllm.max_model_len=9"], "vllm.max_model_len = 9"),
        (["rollout.engine=vllm"], "what vLLM serves of model.name = 'tiny'"),
        (["rollout.engine=vllm", "vllm.endpoints=[http://a:1]"], "--max-model-len of vllm.endpoints = ['http://a:1']"),
    ],
)
def test_where_the_limit_comes_from(settings: list[str], source: str) -> None:
    assert Context.of(load_config(overrides=settings), 9) == Context(9, source)


def test_a_dialogue_that_the_template_refuses() -> None:
    """Gemma's roles must alternate, and it has none for tools."""
    rows = [Question(f"q{i}", "hello") for i in range(10)]
    twice = {"role": "user", "content": "hm"}
    rows[4:4] = [Question("twice", (twice, twice)), Question("again", ({**twice, "content": "well"}, twice))]
    with pytest.raises(
        ValueError, match=r"question 'twice': the chat template .* refuses a dialogue .*: alternate"
    ) as e:
        fit(Asking(rows), formatted("gemma"), 10**6)
    assert str(e.value).endswith(" (2 of 12 training questions have its roles)")
    rows[4:6] = [Question("named", (twice, {**twice, "name": "me"}))]
    with pytest.raises(ValueError, match="question 'named': the chat template"):
        fit(Asking(rows), formatted("gemma"), 10**6)


def test_messages_of_the_users_own_that_fail() -> None:
    class Broken(Asking):
        def messages(self, question: Question, *, chat: bool) -> tuple[Message, ...]:
            return super().messages(question, chat=chat) if question.id != "q3" else 1 / 0

    with pytest.raises(AgentError, match="task Broken: messages of question 'q3' failed: ZeroDivisionError"):
        fit(Broken([Question(f"q{i}", "hello") for i in range(10)]), formatted(), 10**6)


class Lazy(Sequence):
    """Questions that are made when they are asked for; more than anyone can wait for."""

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: Any) -> Any:
        assert index in (0, slice(None, 1)), "made for a check"
        return [Question("first", "z" * 1000)] if isinstance(index, slice) else Question("first", "z" * 1000)


def test_questions_that_are_made_when_they_are_asked_for_are_not() -> None:
    questions = Lazy()
    agent = agent_of(Asking(questions), formatted(), [BUILTIN["math"]])
    check_questions(agent, questions, "training", Console())
    assert fitting(agent, questions, "training", Context(5, ""), Console(), drop=False) is questions
    assert [question.id for question in one_of_each_row(questions)] == ["first"]


@pytest.mark.parametrize(
    "answer", [None, "", [], [None, ""], 7, "7", "seven", ["x", "B"], "not B", "a, b", 0, [0], "A"]
)
@pytest.mark.parametrize("name", [function.__name__ for function in COMPARED])
def test_a_reward_applies_where_it_has_something_to_compare(name: str, answer: Any) -> None:
    question = Question("q", "?", answer)
    assert (BUILTIN[name](question, response_of("7")) is not None) == bool(COMPARED[BUILTIN[name]](question))


def answered(*answers: Any) -> list[Question]:
    return [Question(f"train.jsonl:{number}", "?", answer) for number, answer in enumerate(answers, start=1)]


def checked(
    questions: Sequence[Question],
    *names: str,
    more: Sequence[RewardFunction] = (),
    split: Split = "training",
    of: Sequence[Question] | None = None,
) -> str:
    """What is said of the questions, which are drawn from the training questions `of` (None: all of them)."""
    agent = agent_of(Asking(of or questions), formatted(), [*more, *(BUILTIN[name] for name in names)])
    console = Console(file=io.StringIO(), width=10**6)
    check_questions(agent, questions, split, console)
    return console.file.getvalue()


def bonus(question: Question, response: Response) -> float:
    return 1.0


def test_answers_that_no_reward_can_compare() -> None:
    rows = answered("7", None, "seven", "B", ["x", 5], "x" * 50, *["no"] * 4)
    with pytest.raises(ValueError, match="reward") as error:
        checked(rows, "numbers")
    assert str(error.value) == (
        "8 of 10 training questions have no answer that the reward numbers can compare: train.jsonl:2 (None), "
        f"train.jsonl:3 ('seven'), train.jsonl:4 ('B'), train.jsonl:6 ('{'x' * 36}...), train.jsonl:7 ('no'), ..; "
        "expected one: leave such rows out, or add a reward of your own for them"
    )
    with pytest.raises(
        ValueError, match=r"^7 of 10 .* the reward numbers or choice can compare: train.jsonl:2 \(None\)"
    ):
        checked(rows, "numbers", "choice")
    with pytest.raises(ValueError, match=r"^1 of 10 training questions have no answer that the reward math can"):
        checked(rows, "math")
    checked(rows, "numbers", "format")
    checked(rows, "math", more=[bonus])
    assert checked(answered("7", ["x", 5]), "numbers") == ""


def test_a_reward_that_applies_to_some_questions_only() -> None:
    rows = answered("7", None, "seven", "B", ["x", 5])
    numbers = "reward numbers applies to 2 of 5 {} questions: the others have no answer that it can compare\n"
    assert checked(rows, "numbers", "format") == numbers.format("training")
    math = "reward math applies to 4 of 5 held-out questions: the others have no answer that it can compare\n"
    assert checked(rows, "math", "numbers", more=[bonus], split="held-out") == math + numbers.format("held-out")
    assert checked(rows[:1], "math", "numbers", "format") == ""


def test_a_reward_that_applies_to_no_training_question() -> None:
    """A wrong answer column, whatever else is rewarded."""
    rows = answered(None, "seven", "", "eight")
    with pytest.raises(ValueError, match="reward") as error:
        checked(rows, "numbers", "math", more=[bonus])
    assert str(error.value) == (
        "4 of 4 training questions have no answer that the reward numbers can compare: train.jsonl:1 (None), "
        "train.jsonl:2 ('seven'), train.jsonl:3 (''), train.jsonl:4 ('eight'); expected at least one (task.columns "
        "names the column of answers), or task.rewards without it"
    )
    for names, said in [
        (["numbers"], "numbers"),
        (["math", "numbers", "choice", "format"], "numbers or choice"),
        (["environment", "numbers"], "numbers"),
    ]:
        with pytest.raises(ValueError, match=rf"^4 of 4 .* that the reward {said} can compare: .* at least one \("):
            checked(rows, *names)
    # Of a few of them it is only said: others may have answers.
    none = "reward numbers applies to 0 of 4 {} questions: the others have no answer that it can compare\n"
    assert checked(rows, "numbers", "format", of=answered(*"seven", 8)) == none.format("training")
    assert checked(rows, "numbers", "format", split="held-out") == none.format("held-out")
    with pytest.raises(ValueError, match=r"^4 of 4 held-out .* the reward numbers can compare: .* leave such rows out"):
        checked(rows, "numbers", split="held-out")


def test_ids_of_several_questions() -> None:
    with pytest.raises(
        ValueError, match=r"^task asking: 2 ids belong to several training questions: 'a', 'c'; expected"
    ):
        checked([Question(name, "?", 1) for name in "abacdcc"], "math")


class Coloured:
    def reset(self, colour: str) -> None:
        """It says nothing."""

    def move(self) -> str:
        """Move."""
        return ""


def test_columns_that_only_some_rows_have() -> None:
    rows = [Question(f"q{i}", "?", 1, "", {"colour": "red"} if i < 5 else {"size": 3}) for i in range(10)]
    assert [question.id for question in one_of_each_row(rows)] == ["q0", "q5"]
    environment = EnvironmentTools(Coloured, ToolBox([]), 1.0)
    with pytest.raises(ValueError, match=r"Coloured.reset needs 'colour', question 'q5'"):
        check_questions(agent_of(Asking(rows), formatted(), (), environment), rows, "training", Console())


def test_the_prompt_of_an_environment_may_be_empty_before_its_reset() -> None:
    """What it says then is not known, so only what is there counts."""
    environment = EnvironmentTools(Coloured, ToolBox([]), 1.0)
    rows = [Question("q0", ({"role": "user", "content": None},)), Question("q1", "z" * 100)]
    inner = formatted().inner
    assert fit(Asking(rows), inner, 60, environment=environment)[0] == ["q0"]


def test_a_large_file_takes_no_time() -> None:
    """100,000 rows: 0.4 s for lengths, 0.9 s for answers (one core of a 2-core AMD EPYC VM); here a tenth of it."""
    rows = [Question(f"q{i}", f"What is {i} + 1?" * 10, f"so it is {i} #### {i}") for i in range(10_000)]
    start = time.process_time()
    checked(rows, "numbers")
    assert len(fit(Asking(rows, "Be brief."), formatted(), 4096)[0]) == 10_000
    assert time.process_time() - start < 5
