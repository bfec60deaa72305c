"""FunctionTool: what the model is told is what the function says, and errors name what is missing and where."""

import asyncio
import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Optional, TypedDict, Union

import pytest

from aepo.agents.tools.functions import FunctionTool, parse_docstring
from aepo.agents.tools.toolbox import ToolBox, schema_of_tool
from aepo.types import ToolCall


def call(function, **arguments):
    tool = FunctionTool(function, 5.0)
    (result,) = asyncio.run(ToolBox([tool]).run([ToolCall(tool.name, arguments)]))
    return result


def properties(function):
    return FunctionTool(function, 5.0).parameters["properties"]


def google(
    city: str,
    days: int,
    unit: Literal["c", "f"] = "c",
    share: float | None = None,
    names: list[str] | None = None,
    ids: Union[str, int] = 1,  # noqa: UP007
    table: dict[str, int] = {},  # noqa: B006
    pair: tuple[int, str] = (1, "a"),
    maybe: Optional[Literal["x"]] = None,  # noqa: UP045
    nested: list[dict[str, list[int]]] | None = None,
    both: list[int] | str = "",
    anything: Any = None,
    *,
    loud: bool = False,
) -> str:
    """
    Tell the weather.

    Longer text.

    Args:
        city: Where, which may
            need two lines.
        days: How many.
        unit: Degrees.
        share: A share.
        names: Some names.
        ids: An id (choices: ["a", 1])
        table: A table.
        pair: Two.
        maybe: One.
        nested: Deep.
        both: Two kinds.
        anything: Whatever.
        loud: Loud?

    Returns:
        The weather.
    """
    return f"{city} {days} {unit} {loud}"


def test_the_schema_is_the_one_that_transformers_and_so_trl_write():
    utils = pytest.importorskip("transformers.utils")
    tool = FunctionTool(google, 5.0)
    expected = utils.get_json_schema(google)
    assert expected["function"].pop("return") == {"type": "string", "description": "The weather."}
    assert schema_of_tool(tool) == expected


def test_rest_docstrings():
    def tool(query: str, n: int = 3) -> str:
        """Find it.

        :param query: What to
            look for.
        :param int n: How many.
        :return: nothing that the model needs
        :raises ValueError: never
        """

    parsed = FunctionTool(tool, 1.0)
    assert parsed.description == "Find it."
    assert parsed.parameters == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "What to look for."},
            "n": {"type": "integer", "description": "How many."},
        },
        "required": ["query"],
    }


def test_a_docstring_without_sections_is_the_description():
    assert parse_docstring("One line.\n\n    Note: a: b\n") == ("One line.\n\n    Note: a: b", {})
    assert parse_docstring("One.\n\nArgs:\n    a (list[int], optional): a: b") == ("One.", {"a": "a: b"})
    two_lines = "Args:\n    a: one\n        of: two\n    b: two"
    assert parse_docstring(two_lines) == ("", {"a": "one of: two", "b": "two"})
    assert parse_docstring("Args:\n    a: one\n    b: two\n\nExample: x") == ("", {"a": "one", "b": "two"})


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


class Row(TypedDict):
    key: str


class TestTypes:
    def test_values_come_as_the_hints_say(self):
        def tool(
            colour: Colour,
            point: Point,
            points: list[Point],
            pair: tuple[int, str],
            many: tuple[int, ...],
            row: Row,
            by_name: dict[str, Point],
            x: float,
            either: Point | int | None = None,
            names: Sequence[str] = (),
            noted: Annotated[int, "a note"] = 0,
        ) -> str:
            """All kinds."""
            return repr([colour, point, points, pair, many, row, by_name, x, either, names, noted])

        result = call(
            tool,
            colour="r",
            point={"x": 1},
            points=[{"x": 1, "y": 2}],
            pair=[1, "a"],
            many=[1, 2],
            row={"key": "k"},
            by_name={"a": {"x": 3}},
            x=2,
            either={"x": 4},
            names=["n"],
            noted="7",
        )
        one = [Colour.RED, Point(1.0), [Point(1.0, 2.0)], (1, "a"), (1, 2), {"key": "k"}, {"a": Point(3.0)}, 2.0]
        assert result.text == repr([*one, Point(4.0), ["n"], 7])

    def test_objects_are_described_and_checked(self):
        def tool(point: Point, colour: Colour = Colour.RED) -> str:
            """One."""

        numbers = {"x": {"type": "number"}, "y": {"type": "number"}}
        assert properties(tool) == {
            "point": {"type": "object", "properties": numbers, "required": ["x"], "additionalProperties": False},
            "colour": {"type": "string", "enum": ["r", "b"]},
        }
        assert call(tool, point={"y": 1}).text.startswith("error: tool: point must be an object with 'x'")
        assert call(tool, point={"x": 1}, colour="g").text.startswith('error: tool: colour must be one of "r", "b"')

    def test_pydantic_models(self):
        pydantic = pytest.importorskip("pydantic")

        class Inner(pydantic.BaseModel):
            n: int

        class Outer(pydantic.BaseModel):
            inner: list[Inner]

        def tool(outer: Outer) -> str:
            """One."""
            return repr(outer)

        tool.__annotations__["outer"] = Outer
        assert "$ref" not in str(properties(tool))
        assert call(tool, outer={"inner": [{"n": "1"}]}).text == "Outer(inner=[Inner(n=1)])"
        assert call(tool, outer={"inner": [{"n": "x"}]}).error == "bad_arguments"


class Counter:
    """Not the tool's docstring."""

    def __init__(self):
        self.n = 0

    def add(self, n: int) -> str:
        """Add.

        Args:
            n: How much.
        """
        self.n += n
        return str(self.n)

    @staticmethod
    def static(n: int) -> str:
        """Static."""
        return str(n)

    @classmethod
    def of_class(cls, n: int) -> str:
        """Of the class."""
        return cls.__name__ * n

    def __call__(self, n: int) -> str:
        """Call it."""
        return str(self.n + n)


class TestCallables:
    def test_methods_bound_and_unbound(self):
        counter, other = Counter(), Counter()
        bound, unbound = FunctionTool(counter.add, 1.0), FunctionTool(Counter.add, 1.0)
        assert (bound.name, bound.parameters) == (unbound.name, unbound.parameters)
        assert [bound(n=1), unbound.bind(counter)(n=1), unbound.bind(other)(n=5)] == ["1", "2", "5"]

    def test_static_and_class_methods(self):
        for tool in (FunctionTool(Counter.static, 1.0), FunctionTool(Counter().static, 1.0)):
            assert [tool(n=1), tool.bind(Counter())(n=2)] == ["1", "2"]
        for tool in (FunctionTool(Counter.of_class, 1.0), FunctionTool(Counter().of_class, 1.0)):
            assert [tool(n=1), tool.bind(Counter())(n=2)] == ["Counter", "CounterCounter"]

    def test_objects_that_can_be_called(self):
        tool = FunctionTool(Counter(), 1.0)
        assert (tool.name, tool.description, tool(n=2)) == ("Counter", "Call it.", "2")

    def test_partials_keep_what_they_fix(self):
        tool = FunctionTool(functools.partial(google, days=3), 1.0)
        assert tool.name == "google"
        assert "days" not in tool.parameters["properties"]
        assert tool.parameters["required"] == ["city"]
        assert tool(city="Rome") == "Rome 3 c False"
        assert call(functools.partial(google, "Rome", 3), city="Oslo").error == "bad_arguments"

    def test_decorators_with_wraps(self):
        @functools.wraps(google)
        def decorated(*args, **kwargs):
            return google(*args, **kwargs).upper()

        assert call(decorated, city="Rome", days=1, loud=True).text == "ROME 1 C TRUE"

    def test_async_functions(self):
        async def tool(n: int) -> int:
            """One."""
            await asyncio.sleep(0)
            return n + 1

        assert call(tool, n="1").text == "2"

    def test_other_keywords(self):
        def tool(a: str, **others: int) -> str:
            """One."""
            return str(others)

        assert FunctionTool(tool, 1.0).parameters["additionalProperties"] == {"type": "integer"}
        assert call(tool, a="x", b="2").text == "{'b': 2}"

    def test_the_errors_of_a_function_keep_their_message(self):
        def tool(n: int) -> str:
            """One."""
            raise ValueError(f"no {n}")

        assert call(tool, n=1).text == "error: ValueError: no 1"


def no_docstring(a: str):
    return a


def no_hint(a):
    """One."""


def bad_hint(a: object):
    """One."""


def unknown_hint(a: "Nowhere"):  # noqa: F821
    """One."""


def positional(a: str, /):
    """One."""


def star(*a: str):
    """One."""


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (no_docstring, "it has no docstring"),
        (no_hint, "parameter 'a' has no type hint; expected one, as in a: str"),
        (bad_hint, "parameter 'a': object has no JSON form; expected int, float, "),
        (unknown_hint, "its type hints cannot be read: name 'Nowhere' is not defined"),
        (positional, "parameter 'a' cannot be given by name"),
        (star, "parameter 'a' cannot be given by name"),
    ],
)
def test_faults_are_one_line_with_function_and_place(function, problem):
    line = function.__code__.co_firstlineno
    with pytest.raises(ValueError, match="tool") as caught:
        FunctionTool(function, 1.0)
    expected = f"tool {function.__name__} (test_tools_functions.py:{line}): {problem}"
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [lambda a: a, len, Counter().add.__func__.__get__, 5])
def test_what_is_no_function_of_this_kind(function):
    with pytest.raises(ValueError, match=r"^tool "):
        FunctionTool(function, 1.0)
