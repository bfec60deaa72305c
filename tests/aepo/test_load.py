"""What a configuration names becomes objects: tasks, and agents with all their parts."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from door_toys import FILES, OWN, SMALL, aepo, own_modules, save_chat_model, write_home
from rich.console import Console

from aepo.agents.agent import Agent
from aepo.agents.protocol import AgentError
from aepo.agents.question_checks import Context, fitting, one_of_each_row
from aepo.agents.remembered import MEANT_BY, agent_facts, agent_parts, changes, not_as_recorded
from aepo.agents.rewards.builtin import BUILTIN
from aepo.cli_shared import described
from aepo.config import all_keys, load_config
from aepo.load import load_agent, load_model, load_task
from aepo.models.language_model import LanguageModel
from aepo.own_code import Code, code_changes, code_facts, code_of
from aepo.run.log import read_facts, read_records
from aepo.types import Question, ToolCall


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    directory = tmp_path_factory.mktemp("models") / "qwen"
    save_chat_model(directory, "qwen")
    return LanguageModel.from_directory(directory, dtype=torch.float32, device="cpu")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    write_home(tmp_path)
    with own_modules():
        yield tmp_path


def agent_of(model: LanguageModel, *settings: str) -> Agent:
    return load_agent(load_config(None, [*FILES[1:], *settings]), model)


def test_a_task_of_ones_own_gets_its_options() -> None:
    task = load_task(load_config(None, ["task.name=mine:Sums", "task.options={size: 4}"]).task)
    assert [question.id for question in task.train] == ["t0", "t1", "t2", "t3"]
    assert (task.name, task.system) == ("Sums", "Be brief.")


def test_the_task_that_is_named() -> None:
    assert load_task(load_config(None, ["task.name=facts"]).task).name == "facts"
    files = load_task(load_config(None, [*FILES[1:], "task.heldout=0.5", "task.seed=3"]).task)
    assert (len(files.train), len(files.heldout)) == (6, 6)
    other = load_task(load_config(None, [*FILES[1:], "task.heldout=0.5", "task.seed=4"]).task)
    assert [q.id for q in files.heldout] != [q.id for q in other.heldout]


def test_what_is_played_is_said(model: LanguageModel) -> None:
    files = load_config(None, [*FILES[1:], "task.heldout=0.5"])
    said = described(files, load_agent(files, model))
    assert said == "task files: 6 training and 6 held-out questions, prompt from 'prompt', answer from 'answer'"
    facts = load_config(None, ["model.name=qwen"])
    said = described(facts, load_agent(facts, model))
    assert said.endswith(" (the demo's; task.name=files and task.train, or --config, for yours)")
    tiny = load_config(None)
    assert described(tiny, load_agent(tiny, model)).endswith(" held-out questions")


@pytest.mark.parametrize("given", ["Count.", "system.txt", "Read system.txt", "two\nlines.txt"])
def test_the_system_text_or_its_file(home: Path, given: str) -> None:
    """The task's own is replaced; only a path that is there stands for what is in it."""
    (home / "system.txt").write_text("From the file.\n", encoding="utf-8")
    config = load_config(None, ["task.name=mine:Sums", f"task.system={given!r}".replace("'", '"')])
    assert load_task(config.task).system == ("From the file.\n" if given == "system.txt" else given)


def test_the_parts_of_an_agent(model: LanguageModel) -> None:
    """Tools of the environment come first, then those of the task and of the settings; weights as they are given."""
    agent = load_agent(load_config(None, OWN[1:]), model)
    assert agent.environment is not None
    assert [schema["function"]["name"] for schema in agent.environment.schemas] == ["move", "add"]
    assert agent.stateless is None
    assert {function.__name__: weight for function, weight in agent.rewards.items()} == {
        "length": 1.0,
        "calls": 0.5,
        "judge": -0.25,
    }
    agent.close()
    plain = agent_of(model, "task.tools=mine:add")
    assert plain.environment is None
    assert plain.stateless is not None
    assert (plain.format.name, plain.chat) == ("chat", True)
    text = plain.format.decode(plain.prompt_tokens(Question("a", "What is 1 + 1?")))
    assert "Add two numbers." in text
    assert text.endswith("<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n")
    plain.close()


def test_an_environment_scores_where_nobody_else_does(model: LanguageModel) -> None:
    settings = [setting for setting in FILES[1:] if "rewards" not in setting]
    config = load_config(None, [*settings, "task.environment=mine:World"])
    agent = load_agent(config, model)
    assert agent.rewards == {BUILTIN["environment"]: 1.0}
    agent.close()


def test_tools_are_closed_where_something_else_cannot_be_made(model: LanguageModel, home: Path) -> None:
    """They may hold processes."""
    source = (home / "mine.py").read_text()
    closing = "\n\nclass Closing(Box):\n    closed = []\n\n    def close(self):\n        self.closed.append(1)\n"
    (home / "mine.py").write_text(source + closing)
    for wrong in ("task.rewards=mine:nobody", "format.name=mine:NoFormat", "task.environment=mine:NoWorld"):
        with pytest.raises(ValueError, match=r"expected|has no"):
            agent_of(model, "task.tools=mine:Closing", wrong)
        assert sys.modules["mine"].Closing.closed.pop() == 1
    agent_of(model, "task.tools=mine:Closing").close()
    assert sys.modules["mine"].Closing.closed == [1]


def test_a_parser_of_ones_own(model: LanguageModel) -> None:
    agent = agent_of(model, "task.tools=mine:add", "format.calls=mine:Quoted")
    said = 'I add.<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|im_end|>'
    turn = agent.format.read(model.tokenizer.encode(said, add_special_tokens=False), "eos")
    assert (turn.content, turn.calls) == ("I add.", (ToolCall("add", {"a": 1, "b": 2}),))
    assert agent.format.identity["calls"] == "mine:Quoted"
    agent.close()


def test_a_parser_that_fails_on_what_a_model_wrote(model: LanguageModel) -> None:
    agent = agent_of(model, "task.tools=mine:add", "format.calls=mine:Quoted")
    said = model.tokenizer.encode("<tool_call>add 1 and 2</tool_call><|im_end|>", add_special_tokens=False)
    with pytest.raises(
        AgentError, match=r"format.calls: mine:Quoted, for '<tool_call>add 1 .*JSONDecodeError: .*line "
    ):
        agent.format.read(said, "eos")
    agent.close()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return None", "read returned None, expected a Turn"),
        ("return 1 / 0", "read failed: ZeroDivisionError: division by zero (mine.py, line "),
    ],
)
def test_a_format_that_reads_nothing(model: LanguageModel, home: Path, body: str, expected: str) -> None:
    own = f"\n\nclass Blind(Counting):\n    def read(self, token_ids, finish_reason):\n        {body}\n"
    (home / "mine.py").write_text((home / "mine.py").read_text() + own)
    agent = agent_of(model, "format.name=mine:Blind")
    with pytest.raises(AgentError) as caught:
        agent.format.read([1], "eos")
    assert f"format.name = 'mine:Blind': {expected}" in str(caught.value)
    agent.close()


@pytest.mark.parametrize(
    ("read", "given"),
    [
        ("def read(self, token_ids, finish_reason):", None),
        ("def read(self, token_ids, finish_reason, *, before=None):", (7, 8)),
        ("def read(self, *given, **named):\n        before = named.get('before')", (7, 8)),
    ],
)
def test_a_format_gets_the_tokens_before_a_turn_if_it_takes_them(
    model: LanguageModel, home: Path, read: str, given: Any
) -> None:
    own = f"\n\nclass Seeing(Counting):\n    {read}\n        return Turn(repr(locals().get('before')), '')\n"
    (home / "mine.py").write_text((home / "mine.py").read_text() + own)
    agent = agent_of(model, "format.name=mine:Seeing")
    assert agent.format.read([1], "eos", before=(7, 8)).text == repr(given)
    agent.close()


def test_a_format_whose_methods_are_partials(model: LanguageModel, home: Path) -> None:
    own = (
        "\n\nimport functools\n\nclass Partial(Counting):\n    def __init__(self, *given, **named):\n"
        "        super().__init__(*given, **named)\n        self.decode = functools.partial(str.format, '{0}')\n"
        "        self.read = functools.partial(self.other)\n"
        "    def other(self, token_ids, finish_reason):\n        return 1 / 0\n"
    )
    (home / "mine.py").write_text((home / "mine.py").read_text() + own)
    agent = agent_of(model, "format.name=mine:Partial")
    assert agent.format.decode(5) == "5"
    with pytest.raises(AgentError, match=r"mine:Partial': read failed: ZeroDivisionError: .* \(mine.py, line \d+\)"):
        agent.format.read([1], "eos")
    agent.close()


@pytest.mark.parametrize("tokens", ["()", "None", "(1, -1)", "(10**6,)", "'ab'"])
def test_a_format_whose_tokens_are_none(model: LanguageModel, home: Path, tokens: str) -> None:
    own = f"\n\nclass Odd(Counting):\n    def prompt_tokens(self, messages):\n        return {tokens}\n"
    (home / "mine.py").write_text((home / "mine.py").read_text() + own)
    agent = agent_of(model, "format.name=mine:Odd")
    with pytest.raises(AgentError, match=r"prompt_tokens returned .*, expected one or more tokens from 0 to \d+$"):
        agent.prompt_tokens(Question("a", "b"))
    agent.close()


def test_a_dialogue_that_the_template_refuses_is_named(model: LanguageModel) -> None:
    agent = agent_of(model)
    model.tokenizer.chat_template, before = "{{ raise_exception('no') }}", model.tokenizer.chat_template
    try:
        with pytest.raises(ValueError, match=r"question 'a7': the chat template of .* refuses a dialogue"):
            agent.prompt_tokens(Question("a7", "b"))
    finally:
        model.tokenizer.chat_template = before
        agent.close()


def test_changes_between_a_run_and_an_agent() -> None:
    """Also what is not there any more; of run.json only what the agent knows."""
    was: dict[str, Any] = {"machine": 1, "tools": ["a"], "rewards": {"m:a": 1.0, "m:b": 1.0}, "environment": None}
    assert changes(was, {key: value for key, value in was.items() if key != "machine"}) == []
    now = {"tools": ["a", "b"], "rewards": {"m:a": 2.0, "n:b": 1.0}, "environment": None}
    assert changes(was, now) == [
        "tools was ['a'] and is ['a', 'b']",
        "rewards.m:a was 1.0 and is 2.0",
        "rewards.m:b was 1.0 and is None",
        "rewards.n:b was None and is 1.0",
    ]


def test_the_order_in_a_schema_is_read_too() -> None:
    def tools(*names: str) -> dict[str, Any]:
        return {"tools": {"f": {"schema": {"parameters": {"properties": {name: {} for name in names}}}}}}

    assert changes(tools("a", "b"), tools("a", "b")) == []
    assert changes(tools("a", "b"), tools("b", "a")) == [
        "tools.f.schema: its keys, which the model reads, are in another order"
    ]


def test_only_a_setting_that_explains_a_difference_allows_it() -> None:
    was = {"task": {"data": "1"}, "tools": {"f": {"schema": {"description": "x"}}}, "rewards": {"m:r": 1.0}}
    now = {"task": {"data": "2"}, "tools": {"f": {"schema": {"description": "y"}}}, "rewards": {"m:r": 1.0}}
    for named in ((), ("task.tool_timeout", "format.name", "train.steps"), ("task.tools",), ("task.rewards",)):
        with pytest.raises(
            ValueError, match=r"^run: .* another agent: task\.data was '1' and is '2'\. Expected the same "
        ):
            not_as_recorded("run", was, now, named=named)
    with pytest.raises(ValueError, match=r"another agent: tools\.f\.schema.description was 'x' and is 'y'\. "):
        not_as_recorded("run", was, now, named=["task.train"])
    both = ["task.data was '1' and is '2'", "tools.f.schema.description was 'x' and is 'y'"]
    assert not_as_recorded("run", was, now, named=["task.train", "task.tools"]) == both
    assert not_as_recorded("run", was, now, named=["task.name"]) == both
    assert not_as_recorded("run", None, now, named=()) == not_as_recorded("run", was, was, named=()) == []


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("task", "name options seed train heldout columns system"),
        ("tools", "tools environment name options"),
        ("environment", "environment name options"),
        ("rewards", "rewards environment name options"),
    ],
)
def test_what_a_setting_speaks_for(part: str, settings: str) -> None:
    was, now = ({part: {"x": {"y": value}}} for value in "12")
    for entry in all_keys():
        if entry.name.startswith("task.") and entry.name.removeprefix("task.") in settings.split():
            assert len(not_as_recorded("run", was, now, named=[entry.name])) == 1
        else:
            with pytest.raises(ValueError, match=rf"another agent: {part}\.x\.y was '1' and is '2'"):
                not_as_recorded("run", was, now, named=[entry.name])


def test_every_part_of_an_agent_can_be_meant(model: LanguageModel) -> None:
    agent = agent_of(model)
    assert agent_facts(agent).keys() | {"long_prompts_dropped"} == MEANT_BY.keys()
    settings = {entry.name for entry in all_keys()}
    assert all(any(s.startswith(name) for s in settings) for names in MEANT_BY.values() for name in names)


def test_the_code_of_a_parser_of_ones_own(model: LanguageModel) -> None:
    parts = agent_parts(agent_of(model, "task.tools=mine:add", "format.calls=mine:Quoted"))
    assert "mine.py" in code_of({"format": parts["format chat"]})["format"]


def test_what_is_told_of_a_template_may_be_told_otherwise() -> None:
    """A release that words a warning in another way must not refuse the runs of the one before."""
    was = {"format": {"name": "chat", "chat_template": "1", "notes": ["a"], "warnings": None}}
    now = {"format": {"name": "chat", "chat_template": "1", "notes": ["b"], "warnings": ["c"]}}
    assert changes(was, now) == changes({"format": {"name": "chat", "chat_template": "1"}}, now) == []
    now["format"] |= {"chat_template_kwargs": {"enable_thinking": False}, "answer": "tag"}
    assert changes(was, now) == [
        "format.chat_template_kwargs was None and is {'enable_thinking': False}",
        "format.answer was None and is 'tag'",
    ]


def test_the_order_of_tools_is_read_too() -> None:
    was = {"tools": {"a": {"schema": "x"}, "b": {"schema": "y"}}}
    now = {"tools": dict(reversed(was["tools"].items()))}
    assert changes(was, was) == changes({"tools": ["a", "b"]}, was) == []
    assert changes(was, now) == ["tools was ['a', 'b'] and is ['b', 'a']"]


def test_a_server_that_offers_something_else(model: LanguageModel, home: Path) -> None:
    """Under the same names: what the model reads, or the code alone."""
    pytest.importorskip("mcp")
    source = (Path(__file__).parents[2] / "examples" / "own_agent" / "calculator_server.py").read_text()

    def remembered(text: str) -> tuple[dict[str, Any], Code]:
        (home / "server.py").write_text(text)
        agent = agent_of(model, "task.tools=['mcp:python server.py']")
        agent.close()
        return agent_facts(agent), code_of(agent_parts(agent))

    facts, code = remembered(source)
    assert list(facts["tools"]) == ["add", "subtract", "multiply"]
    edited, edited_code = remembered(source.replace("return a + b", "return b + a"))
    assert changes(facts, edited) == []
    assert code_changes(code_facts(code), edited_code) == [
        "tool add, tool subtract, tool multiply: server.py is not as it was in the run"
    ]
    other, _ = remembered(source.replace("The sum of two numbers", "Both numbers together"))
    (change,) = changes(facts, other)
    assert change.startswith("tools.add.schema.description was 'The sum of two numbers.' and is 'Both ")


class Told:
    """A tool that says what it answers from."""

    name, timeout, description = "told", 1.0, "Says it."
    parameters: ClassVar[dict[str, Any]] = {"type": "object", "properties": {}}

    def __init__(self, identity: Any) -> None:
        self.identity = identity

    def __call__(self) -> str:
        return "it"


def facts_of(model: LanguageModel, identity: Any) -> dict[str, Any]:
    task = load_task(load_config(None, FILES[1:]).task)
    task.tools = (Told(identity),)
    return agent_facts(load_agent(load_config(None, FILES[1:]), model, task))


def test_what_a_tool_says_itself(model: LanguageModel) -> None:
    one, two = facts_of(model, {"sizes": (1, 2)}), facts_of(model, {"sizes": (1, 3)})
    assert changes(json.loads(json.dumps(one)), one) == [], "as it comes back from run.json"
    assert changes(one, two) == ["tools.told.sizes was [1, 2] and is [1, 3]"]
    assert one["tools"]["told"].keys() == {"sizes", "schema"}


@pytest.mark.parametrize("identity", ["abc", 5, {"a": object()}, {"a": float("nan")}, {"a": {1, 2}}, {("a", 1): 2}])
def test_what_a_tool_says_wrongly(model: LanguageModel, identity: Any) -> None:
    with pytest.raises(ValueError, match=r"^tool told: identity = .*: expected JSON values by name: "):
        facts_of(model, identity)


OWN_TASK = """
import collections
import numpy as np
from aepo.agents.protocol import Task
from aepo.types import Question

ROWS = [Question(f"q{{i}}", f"What is {{i}}?", i) for i in range(6)]


class Lazy:
    count, most, made = 6, 6, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.made.append(index)
        if type(index) is not int:
            raise TypeError("an int")
        if index >= self.most:
            raise IndexError(index)
        return ROWS[index % 6]


class Lying(Lazy):
    count = 9


class Endless(Lazy):
    most = 10**9


class Short(list):
    def __len__(self):
        return 9


def fair(question, response):
    return 1.0


class Own(Task):
    train = heldout = ROWS

    def reward(self, question, response):
        return 1.0
    {body}
"""


def own_task(home: Path, body: str, model: LanguageModel, *settings: str) -> Agent:
    shutil.rmtree(home / "__pycache__", ignore_errors=True)
    sys.modules.pop("own", None)
    (home / "own.py").write_text(OWN_TASK.format(body=body))
    return load_agent(load_config(None, ["task.name=own:Own", "model.name=x", *settings]), model)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("(one for one in ROWS)", "train: expected a list of questions, or what has len() and [index], got generator"),
        ("set(ROWS[:0])", "train: expected a list of questions, or what has len() and [index], got set"),
        ("{'a': ROWS}", "train: expected a list of questions, or what has len() and [index], got dict"),
        ("'a text'", "train: expected a list of questions, or what has len() and [index], got str"),
        ("None", "train: expected a list of questions, or what has len() and [index], got NoneType"),
        ("[*ROWS, {'prompt': 'a'}]", "train[6]: expected a Question, got dict {'prompt': 'a'}"),
        ("np.array(['a', 'b'])", "train[0]: expected a Question, got str_ "),
        ("[Question(['a'], 'b')]", "train[0], question ['a']: id = ['a']: expected text, got list"),
        ("[Question('1', 'b'), Question(1, 'b')]", "train[1], question 1: id = 1: expected text, got int"),
        ("[Question('a', None)]", "train[0], question 'a': prompt = None: expected text or messages, got NoneType"),
        ("[Question('a', ['b'])]", "train[0], question 'a': prompt = ['b']: expected text or messages, got list"),
        ("[Question('a', 'b', 1, '', None)]", "train[0], question 'a': data = None: expected columns by name, got"),
        ("Lying()", "train[8] failed: IndexError: 8 (own.py, line "),
        ("Short(ROWS)", "train: expected the 9 questions that its len() says, got 6"),
        ("property(lambda self: 1 / 0)", "train failed: ZeroDivisionError: division by zero"),
    ],
)
def test_questions_of_ones_own_that_are_none(home: Path, model: LanguageModel, train: str, message: str) -> None:
    with pytest.raises(AgentError) as caught:
        own_task(home, f"train = {train}", model)
    assert str(caught.value).startswith(f"task Own: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("train", ["Lazy()", "Endless()", "collections.deque(ROWS)", "np.array(ROWS, dtype=object)"])
def test_sequences_of_ones_own(home: Path, model: LanguageModel, train: str) -> None:
    """Without slices, and where asking for a question beyond the last one is no error: as many as len() says."""
    agent = own_task(home, f"train = {train}", model, "task.environment=mine:World")
    assert [question.id for question in one_of_each_row(agent.task.train)] == ["q0"]
    in_a_list = own_task(home, "train = list(ROWS)", model)
    assert agent.task.identity == in_a_list.task.identity
    agent.close()
    in_a_list.close()


def test_of_a_lazy_sequence_the_first_and_the_last_question_are_made(home: Path, model: LanguageModel) -> None:
    agent = own_task(home, "train = Lazy()", model)
    assert set(sys.modules["own"].Lazy.made) == {0, 5}
    agent.close()
    sys.modules["own"].ROWS[3] = "no question"
    with pytest.raises(AgentError, match=r"^task Own: train\[3\]: expected a Question, got str 'no question'$"):
        _ = agent.task.identity


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("'hello'", "expected one message or more, got str 'hello'"),
        ("()", "expected one message or more, got tuple ()"),
        ("None", "expected one message or more, got NoneType None"),
        ("question.messages[0]", "expected one message or more, got dict {"),
        ("(message for message in question.messages)", "expected one message or more, got generator"),
        ("[{'role': 'user'}]", "expected content in message 1 of 1, got {'role': 'user'}"),
        ("[*question.messages, {'role': 'user', 'content': 5}]", "expected content in message 2 of 2, got {'role'"),
        ("1 / 0", "failed: ZeroDivisionError: division by zero (own.py, line "),
    ],
)
def test_messages_that_say_nothing(home: Path, model: LanguageModel, messages: str, message: str) -> None:
    body = "def messages(self, question, *, chat):\n        "
    body += f"return {messages} if question.id == 'q4' else question.messages"
    expected = f"task Own: messages of question 'q4' {message}".replace("' exp", "': exp")
    for settings in ([], ["format.name=tags"]):
        agent = own_task(home, body, model, *settings)
        with pytest.raises(AgentError) as caught:  # before the first step
            fitting(agent, agent.task.train, "training", Context(1000, ""), Console(), drop=False)
        assert str(caught.value).startswith(expected)
        with pytest.raises(AgentError) as caught:  # when it is drawn
            agent.prompt_tokens(next(question for question in agent.task.train if question.id == "q4"))
        assert str(caught.value).startswith(expected)


def test_messages_that_need_no_content(home: Path, model: LanguageModel) -> None:
    """Calls of a tool have none, and what an environment says at the start comes behind the last message."""
    call = "{'role': 'assistant', 'tool_calls': [{'function': {'name': 'add', 'arguments': {}}}]}"
    body = "def messages(self, question, *, chat):\n        return [*question.messages, "
    own_task(home, f"{body}{call}, *question.messages]", model).close()
    own_task(home, f"{body}{{'role': 'user'}}]", model, "task.environment=mine:World").close()
    with pytest.raises(AgentError, match="expected content in message 2 of 3"):
        own_task(home, f"{body}{{'role': 'user'}}, *question.messages]", model, "task.environment=mine:World")
    own_task(home, "train = [Question('a', ())]\n" + f"    {body}{{'role': 'user', 'content': 'b'}}]", model).close()


def test_answers_that_built_in_rewards_cannot_read(home: Path, model: LanguageModel) -> None:
    for answer in (
        "np.array([1, 2])",
        "[1, np.array([1, 2])]",
        "{'ground_truth': 'x'}",
        "b'x'",
        "{'x', 'y'}",
        "[['x']]",
    ):
        train = f"train = [*ROWS, Question('a', 'b', {answer})]"
        with pytest.raises(AgentError) as caught:
            own_task(home, train, model, "task.rewards=[own:fair, math]")
        expected = "expected text, a number or a list of these for the reward math, got "
        assert str(caught.value).startswith(f"task Own: train: answer of question 'a': {expected}")
        own_task(home, train, model).close()  # a reward of ones own may
    fine = ("np.float64(2)", "True", "['x', 2, None]", "('x',)")
    train = f"train = [{', '.join(f'Question(str({i}), chr(98), {answer})' for i, answer in enumerate(fine))}]"
    own_task(home, train, model, "task.rewards=math").close()


def test_a_large_task_takes_no_time(home: Path, model: LanguageModel) -> None:
    """100,000 questions: 0.4 s (one core of a 2-core AMD EPYC VM); here a tenth of it."""
    own_task(home, "train = ROWS * 10", model).close()
    start = time.process_time()
    own_task(home, "train = [Question(str(i), 'b', i) for i in range(10_000)]", model).close()
    assert time.process_time() - start < 5


def test_a_task_derived_from_another_has_its_own_name(home: Path) -> None:
    (home / "mine.py").write_text((home / "mine.py").read_text() + "\n\nclass More(Sums):\n    pass\n")
    assert load_task(load_config(None, ["task.name=mine:More"]).task).name == "More"


def test_the_tiny_model_without_a_warm_start(tmp_path: Path) -> None:
    config = load_config(None, ["warm_start.steps=0", f"model.cache_dir={tmp_path}"])
    assert load_model(config.model, config.warm_start).vocab_size > 1000


SLOW = '''

import time

JUDGED, NAPS = [], []


def nap(n: int) -> str:
    """Wait.

    Args:
        n: nothing
    """
    time.sleep(0.4)
    NAPS.append(time.perf_counter())
    return "awake"


class Napping(Counting):
    def read(self, token_ids, finish_reason):
        text = self.decode(token_ids)
        if len(token_ids) % 2 or finish_reason == "length":
            return Turn(text, text, answered=True, answer="")
        return Turn(text, text, (ToolCall("nap", {"n": 1}),))


async def slow_judge(question, response):
    await asyncio.sleep(0.3)
    JUDGED.append(time.perf_counter())
    return float(len(response.token_ids))
'''


def test_a_slow_judge_overlaps_with_rollouts_that_still_run(model: LanguageModel, home: Path) -> None:
    model.model.save_pretrained(home / "qwen")
    model.tokenizer.save_pretrained(home / "qwen")
    (home / "mine.py").write_text((home / "mine.py").read_text() + SLOW)
    settings = ["train.questions=6", "rollout.paths=2", "train.steps=1", "eval.questions=1", "rollout.max_tool_calls=2"]
    own = ["task.name=mine:Sums", "task.tools=mine:nap", "format.name=mine:Napping", "task.rewards=mine:slow_judge"]
    began = time.perf_counter()
    done = aepo("train", *SMALL, *settings, "model.name=qwen", *own)
    assert done.code == 0, done.output
    (record,) = read_records(Path("run/metrics.jsonl"))
    seconds = record["seconds.rollout"] + record["seconds.reward"]
    naps = [t for t in done.mine.NAPS if t > began]
    training = done.mine.JUDGED[1:13]
    assert sum(t < max(naps) for t in training) >= 2, "judged before the last tool had answered"
    assert record["tools.calls"] > 2
    assert seconds < 0.5 * (12 * 0.3 + record["tools.seconds"]), "all the waiting, one after the other"
    assert record["seconds.reward"] < 0.3, "less than one judge takes: none is left to wait for"
    assert record["reward.mean"] > 0
    assert read_facts(Path("run"))["rewards"] == {"mine:slow_judge": 1.0}
