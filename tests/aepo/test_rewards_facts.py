"""The demo's score of a path, on hand-made responses."""

import pytest

from aepo.agents.tasks.facts.reward import FORMAT_WEIGHT, answer_reward
from aepo.types import FinishReason, Question, Response, ToolCall, ToolResult, Turn

SEARCH = Turn(
    "<search> capital of Poland</search>", "", (ToolCall("search", {"query": "capital of Poland"}),), False, None
)
FOUND = ToolResult("Warsaw is the capital of Poland.", None, 0.01)


def response(answer: str | None, *, well_formed: bool = True, ends: FinishReason = "answered") -> Response:
    last = Turn("the answer", "", (), answer is not None, answer, well_formed)
    return Response("text", (SEARCH, last), ((FOUND,),), ends, (1, 2, 3))


def question(answer: str) -> Question:
    return Question("capital: Poland", "What is the capital of Poland?", answer, "capital")


@pytest.mark.parametrize(
    ("path", "total", "is_format"),
    [
        (response(" Warsaw"), 1.0, 1),
        (response("  the WARSAW."), 1.0, 1),
        (response("Krakow"), FORMAT_WEIGHT, 1),
        (response("Warsaw or Krakow"), FORMAT_WEIGHT, 1),
        (response(""), FORMAT_WEIGHT, 1),
        (response("Warsaw", well_formed=False), 0.0, 0),
        (response(None, ends="length"), 0.0, 0),
        (response("Warsaw", ends="tool_limit"), 0.0, 0),
    ],
)
def test_hand_made_responses(path: Response, total: float, is_format: int) -> None:
    reward = answer_reward(question("Warsaw"), path)
    assert reward.total == pytest.approx(total)
    assert reward.components == {"format": is_format, "correct": float(total == 1), "tool_calls": 1.0}
    assert reward.success == (total == 1)


@pytest.mark.parametrize(("given", "answer"), [(".5", "5"), ("1/2", "12"), ("3+4", "34"), ("3,5", "35"), ("-25", "25")])
def test_another_number_is_wrong(given: str, answer: str) -> None:
    assert not answer_reward(question(answer), response(given)).success
