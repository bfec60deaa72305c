"""Sessions of environments that branch: by fork, by repeating the calls, or not at all."""

import asyncio
import copy
import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aepo.agents.tools.environment import EnvironmentTools
from aepo.agents.tools.functions import FunctionTool
from aepo.agents.tools.toolbox import ToolBox
from aepo.types import Question, ToolCall


class Walk:
    """A list of steps; a branch gets it by repetition."""

    def __init__(self):
        self.path = []

    def reset(self, start=()):
        self.path = list(start)
        return f"at {self.path}"

    def step(self, to: int) -> list[int]:
        """Go there.

        Args:
            to: where; 9 is a wall
        """
        if to == 9:
            raise ValueError("a wall")
        self.path.append(to)
        return self.path

    def back(self) -> int:
        """Undo the last step."""
        return self.path.pop()

    def get_reward(self):
        return float("0" + "".join(map(str, self.path)))


class ForkedWalk(Walk):
    def fork(self):
        other = type(self)()
        other.path = list(self.path)
        return other


class AsyncWalk(Walk):
    async def fork(self):
        await asyncio.sleep(0)
        return copy.deepcopy(self)


QUESTION = Question("q1", "Walk", data={"start": (0,)})


def call(tool, **arguments):
    return ToolCall(tool, arguments)


def steps(*numbers):
    return [call("step", to=number) for number in numbers]


async def opened(environment, timeout=5.0, tools=()):
    tools = EnvironmentTools(environment, ToolBox([FunctionTool(tool, timeout) for tool in tools]), timeout)
    return tools, await tools.open(QUESTION)


def only_refusal(tools):
    """The reason of the one refusal."""
    assert tools.counters["refused"] == 1
    [(reason, count)] = tools.refusals.items()
    assert count == 1
    return reason


# What the walk should say, as a pure function of the calls.
def expected_results(path, calls):
    for one in calls:
        if one.tool == "step" and one.arguments["to"] == 9:
            yield "raised"
        elif one.tool == "step":
            path.append(one.arguments["to"])
            yield str(path)
        elif path:
            yield str(path.pop())
        else:
            yield "raised"


CALL = st.one_of(st.integers(1, 9).map(lambda to: call("step", to=to)), st.just(call("back")))
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["run", "run", "branch", "forget"]), st.integers(0, 99), st.lists(CALL, max_size=3)),
    max_size=25,
)


@pytest.mark.parametrize("environment", [Walk, ForkedWalk, AsyncWalk])
@settings(max_examples=100, deadline=None)
@given(actions=ACTIONS)
def test_paths_are_as_if_each_had_been_alone(environment, actions):
    async def run():
        tools, first = await opened(environment)
        paths = [(first, [])]  # every session with its turns
        forgotten = [0]
        for action, number, calls in actions:
            session, turns = paths[number % len(paths)]
            if action == "run":
                path = [0]
                list(expected_results(path, itertools.chain(*turns)))
                results = await session.run(calls)
                assert ["raised" if r.error else r.text for r in results] == list(expected_results(path, calls))
                turns.append(calls)
                continue
            place = number % (len(turns) + 1)
            own = forgotten[paths.index((session, turns))]
            if action == "forget":
                session.forget(place)
                forgotten[paths.index((session, turns))] = max(own, place)
            elif place > own or not tools.instances.forks:
                branch = await session.branch(place)
                assert branch.observation == "at [0]"
                paths.append((branch, turns[:place]))
                forgotten.append(place - 1)  # its own states begin where it does
        for session, turns in paths:
            path = [0]
            list(expected_results(path, itertools.chain(*turns)))
            assert await session.reward() == float("".join(map(str, path)) or 0)
            await session.close()
        assert tools.counters["refused"] == 0
        assert tools.counters["forked" if tools.instances.forks else "replayed"] == len(paths) - 1
        assert not tools.instances._in_use
        tools.close()

    asyncio.run(run())


@pytest.mark.parametrize("environment", [Walk, ForkedWalk, AsyncWalk])
def test_branch_sees_nothing_of_what_its_parent_did_later(environment):
    async def run():
        tools, parent = await opened(environment)
        await parent.run(steps(1, 2))
        at_end = await parent.branch(1)
        await parent.run(steps(3))
        await parent.run(steps(4))
        branch = await parent.branch(1)
        [result] = await branch.run(steps(5))
        assert result.text == "[0, 1, 2, 5]"
        await parent.run(steps(6))
        assert [await session.reward() for session in (parent, branch, at_end)] == [12346, 125, 12]
        way = "forked" if tools.instances.forks else "replayed"
        assert tools.counters == {"opened": 1, "forked": 0, "replayed": 0, "refused": 0, way: 2}

    asyncio.run(run())


@pytest.mark.parametrize("environment", [Walk, ForkedWalk])
def test_branch_while_the_parent_runs(environment):
    class Slow(environment):
        def step(self, to: int) -> list[int]:
            """Go there slowly.

            Args:
                to: where
            """
            time.sleep(0.02)
            return super().step(to)

    async def run():
        _, parent = await opened(Slow)
        await parent.run(steps(1))
        running = asyncio.create_task(parent.run(steps(2, 3)))
        await asyncio.sleep(0.03)
        branches = await asyncio.gather(*(parent.branch(1) for _ in range(3)))
        await running
        assert [await branch.reward() for branch in branches] == [1, 1, 1]
        assert await parent.reward() == 123

    asyncio.run(run())


def test_branch_of_a_branch():
    async def run():
        for environment in (Walk, ForkedWalk):
            _, parent = await opened(environment)
            await parent.run(steps(1))
            child = await parent.branch(1)
            await child.run(steps(2))
            grandchild = await child.branch(2)
            await child.run(steps(3))
            sibling = await child.branch(1)
            assert [await session.reward() for session in (parent, child, grandchild, sibling)] == [1, 123, 12, 1]

    asyncio.run(run())


def test_states_are_kept_only_as_long_as_somebody_may_branch_there():
    made, closed = [], []

    class Counting(ForkedWalk):
        def fork(self):
            made.append(super().fork())
            return made[-1]

        def close(self):
            closed.append(self)

    async def run():
        tools, session = await opened(Counting)
        await session.run(steps(1))
        session.forget(1)
        await session.run(steps(2))
        assert made == []  # nobody may branch after turn 1
        await session.run(steps(3))
        assert len(made) == 1  # the state after turn 2
        session.forget(2)
        await session.run(steps(4))
        assert closed == [made[0]]
        with pytest.warns(RuntimeWarning, match=r"no branch: Counting.fork came too late: turn 2 was forgotten"):
            assert await session.branch(2) is None
        assert only_refusal(tools) == "fork came too late"
        await session.close()
        await session.close()
        assert len(closed) == len(made) + 1 == 3
        assert not tools.instances._in_use

    asyncio.run(run())


def test_number_of_turns_that_never_were():
    async def run():
        _, session = await opened(Walk)
        for turns in (1, -1):
            with pytest.raises(ValueError, match=f"turns must be 0 to 0, got {turns}"):
                await session.branch(turns)

    asyncio.run(run())


class TestRepetition:
    def test_repeats_failed_calls_too_and_no_stateless_ones(self):
        asked = []

        def ask(question: str) -> str:
            """Ask.

            Args:
                question: what
            """
            asked.append(question)
            return f"answer {len(asked)}"

        async def run():
            tools, session = await opened(Walk, tools=[ask])
            await session.run([*steps(9), call("ask", question="a"), *steps(1)])
            await session.run([call("nothing"), call("step"), *steps(2)])
            branch = await session.branch(2)
            assert await branch.reward() == 12
            assert asked == ["a"]
            assert tools.counters["replayed"] == 1

        asyncio.run(run())

    def test_results_that_differ_are_refused(self):
        class Dice(Walk):
            thrown = itertools.count()

            def throw(self) -> int:
                """Throw a die that never falls twice alike."""
                return next(self.thrown)

        async def run():
            tools, session = await opened(Dice)
            await session.run(steps(1))
            await session.run([call("throw")])
            assert await (await session.branch(1)).reward() == 1  # before the die
            with pytest.warns(RuntimeWarning, match=r"throw gave another result when .*'0'\), then .*'1'\)"):
                assert await session.branch(2) is None
            assert only_refusal(tools) == "throw gave another result when it was repeated"
            assert len(tools.instances._in_use) == 2  # the refused one is closed
            await session.run(steps(2))
            assert await session.reward() == 12

        asyncio.run(run())

    def test_state_that_the_class_shares_is_noticed(self):
        class Leaky(Walk):
            seen = []  # noqa: RUF012

            def step(self, to: int) -> list[int]:
                """Go there.

                Args:
                    to: where
                """
                self.seen.append(to)
                return self.seen

        async def run():
            tools, session = await opened(Leaky)
            await session.run(steps(1))
            with pytest.warns(RuntimeWarning, match="another result"):
                assert await session.branch(1) is None
            assert tools.counters["refused"] == 1

        asyncio.run(run())

    def test_another_observation_is_refused(self):
        class Random(Walk):
            seeds = itertools.count()

            def reset(self):
                return f"maze {next(self.seeds)}"

        async def run():
            tools, session = await opened(Random)
            await session.run(steps(1))
            with pytest.warns(RuntimeWarning, match="'maze 0', then 'maze 1'"):
                assert await session.branch(1) is None
            assert only_refusal(tools) == "reset gave another result when it was repeated"

        asyncio.run(run())

    def test_call_that_timed_out_is_not_repeated(self):
        begun = []

        class Hangs(Walk):
            def reset(self):
                begun.append(self)

            def wait(self) -> str:
                """Wait long."""
                time.sleep(0.3)

        async def run():
            _, session = await opened(Hangs, timeout=0.1)
            await session.run(steps(1))
            await session.run([call("wait")])
            await session.run(steps(2))
            with pytest.warns(RuntimeWarning, match="fork is missing, and a call timed out"):
                assert await session.branch(3) is None
            assert len(begun) == 1
            assert await (await session.branch(1)).reward() == 1

        asyncio.run(run())


class TestForkThatFails:
    @staticmethod
    async def branch_with(fork, message, timeout=0.1):
        """The walk goes on; a branch before and after its next turn is refused."""
        tools, session = await opened(type("Broken", (Walk,), {"fork": fork}), timeout)
        await session.run(steps(1))
        with pytest.warns(RuntimeWarning, match=message):
            assert await session.branch(1) is None
        await session.run(steps(2))
        assert await session.branch(1) is None
        assert await session.reward() == 12
        assert tools.counters == {"opened": 1, "forked": 0, "replayed": 0, "refused": 2}
        assert len(tools.refusals) == 1
        await session.close()
        assert not tools.instances._in_use

    @pytest.mark.parametrize(
        ("fork", "message"),
        [
            (lambda self: self, "fork returned an instance that is in use, expected a new one"),
            (lambda self: None, "fork returned NoneType, expected another Broken"),
            (lambda self: copy.deepcopy(x for x in ()), r"fork raised TypeError: .*cannot pickle"),
            (lambda self: time.sleep(0.2), "fork gave no answer: no answer after 0.1 s"),
        ],
    )
    def test_is_refused_and_the_path_goes_on(self, fork, message):
        asyncio.run(self.branch_with(fork, message))

    def test_async(self):
        async def fork(self):
            await asyncio.sleep(60)

        asyncio.run(self.branch_with(fork, "fork gave no answer"))

    def test_after_a_call_without_an_end_there_is_no_fork(self):
        class Hangs(ForkedWalk):
            def wait(self) -> str:
                """Wait long."""
                time.sleep(0.3)

        async def run():
            tools, session = await opened(Hangs, timeout=0.1)
            await session.run(steps(1))
            await session.run([call("wait")])
            await session.run(steps(2))
            with pytest.warns(RuntimeWarning, match="fork is not possible: a call did not end"):
                assert await session.branch(2) is None
            assert await session.branch(3) is None
            assert await (await session.branch(1)).reward() == 1
            assert tools.refusals == {"fork is not possible": 2}

        asyncio.run(run())

    def test_after_a_turn_that_was_cancelled_there_is_no_fork(self):
        class Slow(ForkedWalk):
            async def wait(self) -> str:
                """Wait long."""
                self.path.append(8)
                await asyncio.sleep(60)

        async def run():
            _, session = await opened(Slow)
            await session.run(steps(1))
            running = asyncio.create_task(session.run([call("wait")]))
            await asyncio.sleep(0.05)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            branch = await session.branch(1)  # kept before the turn
            assert await branch.reward() == 1
            await session.close()

        asyncio.run(run())
