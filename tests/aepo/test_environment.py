"""Environments of a task: their schemas, rows, calls, rewards and faults. Branches: test_environment_branches.py."""

import asyncio
import itertools
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from aepo.agents.protocol import Session
from aepo.agents.tools.environment import EnvironmentTools
from aepo.agents.tools.environment_instances import EnvironmentFailed
from aepo.agents.tools.functions import FunctionTool
from aepo.agents.tools.toolbox import ToolBox
from aepo.types import Question, ToolCall


class Store:
    """A key-value store, filled from the row."""

    def __init__(self):
        self.items = {}
        self.closed = 0

    def reset(self, items=(), **row):
        self.items = dict(items)
        self.row = row
        return f"{len(self.items)} items"

    def put(self, key: str, value: int) -> str:
        """Store a value.

        Args:
            key: where
            value: what
        """
        self.items[key] = value
        return f"{key} = {value}"

    def get(self, key: str) -> int:
        """Read a value.

        Args:
            key: where
        """
        return self.items[key]

    def get_reward(self):
        return sum(self.items.values())

    def close(self):
        self.closed += 1

    @staticmethod
    def helper():
        raise AssertionError("no tool")

    def _private(self):
        raise AssertionError("no tool")


def double(number: int) -> int:
    """Twice the number.

    Args:
        number: of what
    """
    return 2 * number


QUESTION = Question("q1", "Fill it", answer=3, kind="easy", data={"items": {"a": 1}, "level": 2})


def call(tool, **arguments):
    return ToolCall(tool, arguments)


def play(environment, *turns, question=QUESTION, timeout=5.0, tools=()):
    """Results of every turn as (text, error), then the reward; and the session's instance."""

    async def run():
        toolbox = ToolBox([FunctionTool(tool, timeout) for tool in tools])
        environments = EnvironmentTools(environment, toolbox, timeout)
        session = await environments.open(question)
        instance = session._instance
        try:
            results = [[(r.text, r.error) for r in await session.run(turn)] for turn in turns]
            return [*results, await session.reward()], instance
        finally:
            await session.close()
            environments.close()

    return asyncio.run(run())


def test_schemas_are_those_of_the_public_methods():
    tools = EnvironmentTools(Store, ToolBox([FunctionTool(double, 1.0)]), 1.0)
    assert tools.stateful
    functions = [schema["function"] for schema in tools.schemas]
    assert [function["name"] for function in functions] == ["get", "put", "double"]
    assert functions[1]["parameters"]["required"] == ["key", "value"]
    assert functions[1]["parameters"]["properties"]["value"] == {"type": "integer", "description": "what"}
    assert functions[0]["description"] == "Read a value."


def test_calls_of_a_turn_run_in_order_on_one_instance_beside_stateless_tools():
    turn = [
        call("put", key="b", value=5),
        call("double", number=4),
        call("get", key="b"),
        call("put", key="b", value="7"),
    ]
    (results, reward), instance = play(Store, turn, tools=[double])
    assert results == [("b = 5", None), ("8", None), ("5", None), ("b = 7", None)]
    assert reward == 8.0
    assert isinstance(reward, float)
    assert instance.closed == 1


def test_order_holds_when_the_first_call_is_slow():
    class Slow(Store):
        def put(self, key: str, value: int) -> str:
            """Store a value, the first one slowly.

            Args:
                key: where
                value: what
            """
            time.sleep(0.1 if value == 1 else 0)
            return super().put(key, value)

    (results, _), _ = play(Slow, [call("put", key="a", value=1), call("put", key="a", value=2), call("get", key="a")])
    assert [text for text, _ in results] == ["a = 1", "a = 2", "2"]


def test_method_may_change_what_it_was_given():
    class Eats(Store):
        def eat(self, numbers: list[int], options: Any) -> int:
            """Eat them.

            Args:
                numbers: what
                options: how
            """
            options["eaten"] = numbers.pop()
            return options["eaten"]

    turn = [call("eat", numbers=[1, 2], options={})]
    (results, _), _ = play(Eats, turn)
    assert results == [("2", None)]
    assert turn == [call("eat", numbers=[1, 2], options={})]  # the tree and a repetition have it as it was


def test_bad_calls_are_results_and_touch_nothing():
    turn = [
        call("reset", items={}),
        call("get_reward"),
        call("_private"),
        call("helper"),
        call("put", key="a"),
        ToolCall("put", {}, problem="not JSON"),
        call("get", key="missing"),
    ]
    (results, reward), _ = play(Store, turn)
    assert [error for _, error in results] == [*["unknown_tool"] * 4, "bad_arguments", "unparsed", "raised"]
    assert "tools: get, put" in results[0][0]
    assert "value" in results[4][0]
    assert results[6][0] == "error: KeyError: 'missing'"
    assert reward == 1


class TestReset:
    def test_gets_the_row(self):
        _, instance = play(Store)
        assert instance.row == {"prompt": "Fill it", "answer": 3, "id": "q1", "kind": "easy", "level": 2}

    def test_gets_only_what_it_takes(self):
        class Few(Store):
            def reset(self, answer, level, missing="default"):
                self.items = {"all": answer + level}
                assert missing == "default"

        assert play(Few)[0] == [5]

    def test_gets_messages_as_a_list(self):
        class Prompted(Store):
            def reset(self, prompt):
                assert prompt == [{"role": "user", "content": "hello"}]
                prompt.clear()

        question = Question("q", ({"role": "user", "content": "hello"},))
        play(Prompted, question=question)
        assert question.prompt == ({"role": "user", "content": "hello"},)

    def test_may_keep_and_change_the_row(self):
        class Keeps(Store):
            def reset(self, path):
                path.append(1)
                self.items = {"steps": len(path)}

        question = Question("q", "", data={"path": []})
        assert [play(Keeps, question=question)[0] for _ in range(2)] == [[1], [1]]
        assert question.data == {"path": []}

    @pytest.mark.parametrize(("said", "observation"), [("a maze", "a maze"), (None, None), ("", None)])
    def test_observation(self, said, observation):
        class Says(Store):
            def reset(self):
                return said

        async def run():
            session: Session = await EnvironmentTools(Says, ToolBox([]), 1.0).open(QUESTION)
            assert session.observation == observation

        asyncio.run(run())

    def test_column_that_no_row_has_is_named_before_the_first_step(self):
        class Needs(Store):
            def reset(self, seed, **row): ...

        with pytest.raises(
            ValueError, match=r"Needs.reset needs 'seed', question 'q1' has prompt, answer, id, kind, it"
        ):
            EnvironmentTools(Needs, ToolBox([]), 1.0).check(QUESTION)
        EnvironmentTools(Store, ToolBox([]), 1.0).check(QUESTION)


def untyped(self, x):
    """Do it."""


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (Store(), r"expected a class with reset\(\*\*row\), got <.*Store"),
        (type("Bare", (), {}), r"environment Bare: expected a method reset\(self, \*\*row\), there is none"),
        (
            type("Closed", (Store,), {"__init__": lambda self, size: None}),
            r"Closed is made without arguments: .*'size'",
        ),
        (type("Mute", (), {"reset": lambda self: None}), r"environment Mute has no tool: expected a public method"),
        (type("Places", (Store,), {"reset": lambda self, *row: None}), r"Places: reset gets a row's columns by name"),
        (type("Untyped", (Store,), {"untyped": untyped}), r"test_environment.py:\d+.*'x' has no type hint"),
    ],
)
def test_class_that_cannot_be_used(environment, message):
    with pytest.raises(ValueError, match=message) as caught:
        EnvironmentTools(environment, ToolBox([]), 1.0)
    assert "\n" not in str(caught.value)


def test_two_tools_of_one_name():
    def get(number: int) -> int:
        """Get it.

        Args:
            number: which
        """

    with pytest.raises(ValueError, match=r"two tools are called 'get': Store.get and FunctionTool\(get of"):
        EnvironmentTools(Store, ToolBox([FunctionTool(get, 1.0)]), 1.0)


def failing(**methods):
    return type("Faulty", (Store,), methods)


def raises(self, **_):
    raise RuntimeError("no luck\nat all")


def hangs(self, **_):
    time.sleep(0.5)


async def hangs_async(self, **_):
    await asyncio.sleep(60)


def test_failed_or_hung_reset_names_environment_and_question():
    for method, message in [
        (raises, r"^Faulty.reset raised RuntimeError: no luck at all \(test_environment.py, line \d+\) "),
        (hangs, r"^Faulty.reset gave no answer: no answer after 0.1 s"),
        (hangs_async, r"^Faulty.reset gave no answer"),
        (lambda self: 3, r"^Faulty.reset returned int, expected a text or None"),
    ]:
        with pytest.raises(EnvironmentFailed, match=message) as caught:
            play(failing(reset=method), timeout=0.1)
        assert str(caught.value).endswith("(question 'q1')")
        assert "\n" not in str(caught.value)


def test_constructor_that_raises():
    with pytest.raises(EnvironmentFailed, match=r"Faulty.__init__ raised RuntimeError: .*no luck"):
        play(failing(__init__=raises))


def test_instance_whose_reset_failed_is_closed():
    closed = []
    with pytest.raises(EnvironmentFailed, match="no luck"):
        play(failing(reset=raises, close=lambda self: closed.append(self)))
    assert len(closed) == 1


def test_one_instance_for_all_is_refused():
    class Single(Store):
        only = None

        def __new__(cls):
            cls.only = cls.only or super().__new__(cls)
            return cls.only

    async def run():
        tools = EnvironmentTools(Single, ToolBox([]), 1.0)
        first = await tools.open(QUESTION)
        with pytest.raises(EnvironmentFailed, match=r"Single.__init__ returned an instance that is in use"):
            await tools.open(QUESTION)
        await first.close()
        await (await tools.open(QUESTION)).close()

    asyncio.run(run())


class TestReward:
    @pytest.mark.parametrize("value", [1, -0.5, np.float32(0.5), np.bool_(True), np.array(2.0)])
    def test_numbers(self, value):
        reward = play(failing(get_reward=lambda self: value))[0][-1]
        assert reward == value
        assert type(reward) is float

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), None, "1.0", [1.0], 1j, 10**400])
    def test_what_is_no_finite_number_is_named(self, value):
        with pytest.raises(EnvironmentFailed, match=r"Faulty.get_reward returned no number: .*\(question 'q1'\)"):
            play(failing(get_reward=lambda self: value))

    def test_without_get_reward(self):
        assert play(type("Mute", (), {"reset": lambda self: None, "put": Store.put}))[0] == [None]

    def test_that_raises_or_hangs(self):
        for method, message in [(raises, "get_reward raised RuntimeError: .*no luck"), (hangs, "gave no answer")]:
            with pytest.raises(EnvironmentFailed, match=message):
                play(failing(get_reward=method), timeout=0.1)


def test_close_that_raises_or_hangs_is_a_warning():
    for method in (raises, hangs):
        with pytest.warns(RuntimeWarning, match=r"Faulty.close .*\(question 'q1'\)"):
            play(failing(close=method), timeout=0.1)


def test_call_that_hangs_is_a_timeout_and_its_instance_is_left_alone():
    entered = []

    class Hangs(Store):
        def get(self, key: str) -> str:
            """Hang.

            Args:
                key: where
            """
            entered.append(key)
            time.sleep(0.5)

    turn = [call("get", key="a"), call("put", key="b", value=1), call("double", number=1)]
    (first, second, _), _ = play(Hangs, turn, [call("get", key="c")], timeout=0.1, tools=[double])
    assert first == [
        ("error: no answer after 0.1 s", "timeout"),
        ("error: the environment does not respond", "timeout"),
        ("2", None),
    ]
    assert second == [("error: the environment does not respond", "timeout")]
    assert entered == ["a"]


class Async:
    """Every method is a coroutine, and all of them run on one loop."""

    async def reset(self, **row):
        self.loop = asyncio.get_running_loop()
        self.lock = asyncio.Lock()
        self.total = 0
        return "ready"

    async def add(self, number: int) -> int:
        """Add to the total.

        Args:
            number: how much
        """
        async with self.lock:
            assert asyncio.get_running_loop() is self.loop
            await asyncio.sleep(0.001)
            self.total += number
        return self.total

    async def fork(self):
        await asyncio.sleep(0)
        other = type(self)()
        other.loop, other.lock, other.total = self.loop, asyncio.Lock(), self.total
        return other

    async def get_reward(self):
        await asyncio.sleep(0)
        return self.total

    async def close(self):
        await asyncio.sleep(0)
        self.total = None


def test_async_methods():
    (results, reward), instance = play(Async, [call("add", number=2), call("add", number=3)])
    assert results == [("2", None), ("5", None)]
    assert reward == 5
    assert instance.total is None


def test_many_sessions_at_once_do_not_share_anything():
    before = threading.active_count()  # other tests' libraries leave some behind

    async def run():
        tools = EnvironmentTools(Store, ToolBox([]), 5.0)
        numbers = itertools.count()

        async def path():
            session = await tools.open(QUESTION)
            mine = next(numbers)
            for _ in range(3):
                await session.run([call("put", key="mine", value=mine)])
            [result] = await session.run([call("get", key="mine")])
            assert result.text == str(mine)
            reward = await session.reward()
            await session.close()
            return reward == mine + 1

        assert all(await asyncio.gather(*(path() for _ in range(24))))
        assert tools.counters == {"opened": 24, "forked": 0, "replayed": 0, "refused": 0}
        assert not tools.instances._in_use
        tools.close()

    asyncio.run(run())
    assert threading.active_count() - before < 24


def test_exit_in_a_method_is_named_and_ends_no_run():
    for name in ("__init__", "reset", "get_reward"):
        for code in (0, None):
            with pytest.raises(
                EnvironmentFailed,
                match=rf"^Faulty.{name} raised SystemExit(: 0)? \(test_environment.py, line \d+\) \(question 'q1'\)$",
            ):
                play(failing(**{name: lambda self, code=code: sys.exit(code)}))


def test_a_value_that_cannot_be_shown_is_no_reward():
    class Odd:
        def __float__(self):
            raise KeyError("no")

        __repr__ = __float__

    with pytest.raises(EnvironmentFailed, match=r"get_reward returned no number: a value that cannot be shown"):
        play(failing(get_reward=lambda self: Odd()))


def test_a_stateless_tool_that_hangs_does_not_cost_the_environment():
    def slow() -> str:
        """Hangs."""
        time.sleep(0.6)
        return "late"

    turns = [call("slow")], [call("get", key="a")]
    (first, second, reward), _ = play(Store, *turns, tools=[slow], timeout=0.2)
    assert (first, second, reward) == ([("error: no answer after 0.2 s", "timeout")], [("1", None)], 1.0)


def test_an_instance_whose_call_was_cancelled_is_left_alone():
    entered, leave = [], threading.Event()

    class Slow(Store):
        def get(self, key: str) -> int:
            """Read slowly.

            Args:
                key: where
            """
            entered.append(key)
            leave.wait(30)
            return 1

    async def run():
        environments = EnvironmentTools(Slow, ToolBox([]), 30.0)
        session = await environments.open(QUESTION)
        turn = asyncio.ensure_future(session.run([call("get", key="a")]))
        while not entered:
            await asyncio.sleep(0.001)
        turn.cancel()
        leave.set()
        with pytest.raises(asyncio.CancelledError):
            await turn
        [result] = await session.run([call("get", key="b")])
        assert (result.text, result.error) == ("error: the environment does not respond", "timeout")
        await session.close()
        environments.close()

    asyncio.run(run())
    assert entered == ["a"]
