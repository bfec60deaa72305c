"""Calls of tools in branched rollouts: what a call does wrong is a result, and what it does is seen by nobody else."""

import asyncio
import threading

import pytest

from aepo.integrations.trl.branching.tools import Tools, run_calls


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def run_alone(calls, loop=None, **tools):
    asynchronous = {name: tool for name, tool in tools.items() if asyncio.iscoroutinefunction(tool)}
    sync = {name: tool for name, tool in tools.items() if name not in asynchronous}
    [results] = run_calls([(calls, Tools(sync, asynchronous))], loop)
    return results


@pytest.fixture
def loop():
    """In a thread of its own, as TRL's."""
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever, daemon=True)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join()
    made.close()


def take(items):
    return items.pop()


async def take_later(items):
    await asyncio.sleep(0)
    return items.pop()


def test_a_tool_may_change_its_arguments_but_not_the_completion(loop):
    for tool in (take, take_later):
        asked = call("take", items=[1, 2])
        [result] = run_alone([asked], loop, take=tool)
        assert (result.content, result.failed) == ("2", False)
        assert result.call == call("take", items=[1, 2])
        assert asked == call("take", items=[1, 2])


def leave():
    raise SystemExit("over")


async def leave_later():
    raise SystemExit("over")


def test_a_tool_that_exits_does_not_end_the_run(loop):
    for tool in (leave, leave_later):
        results = run_alone([call("leave"), call("take", items=[3])], loop, leave=tool, take=take)
        assert {result.name: (result.content, result.failed) for result in results} == {
            "leave": ("{'error': 'over'}", True),
            "take": ("3", False),
        }


def test_a_call_of_another_type_is_a_failure():
    other = call("take", items=[1]) | {"type": "custom", "name": "grammar"}
    unnamed = {"type": "custom"}
    results = run_alone([other, unnamed], take=take)
    said = "{'error': 'Unsupported tool call type: custom'}"
    assert [one.name for one in results] == ["grammar", "unknown"]
    assert all((one.content, one.failed) == (said, True) for one in results)


def test_blocks_stay_blocks():
    blocks = [{"type": "text", "text": "a"}]
    [result] = run_alone([call("show")], show=lambda: blocks)
    assert result.message == {"role": "tool", "name": "show", "content": blocks}
