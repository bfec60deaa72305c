"""The score of a path, on hand-made responses."""

import pytest

from aepo.agents.tasks.facts.reward import FORMAT_WEIGHT, answer_reward, normalized

CALL = "<search> capital of Poland</search><result> Poland: Warsaw is the capital of Poland.</result>\n"


@pytest.mark.parametrize(
    ("response", "total", "is_format", "calls"),
    [
        (f"{CALL}<answer> Warsaw</answer>", 1.0, 1, 1),
        ("<answer>  the WARSAW.</answer>", 1.0, 1, 0),
        (f"I look it up. {CALL}So it is <answer>Warsaw</answer>\n", 1.0, 1, 1),
        (CALL.replace("<result>", "\n<result>") + "<answer> Warsaw</answer>", 1.0, 1, 1),
        (CALL.replace("<result>", "<<result>") + "<answer> Warsaw</answer>", 0.0, 0, 1),
        (f"{CALL}<python>print(1)</python><result>1</result>\n<answer>Warsaw</answer>", 1.0, 1, 2),
        (f"{CALL}<answer> Krakow</answer>", FORMAT_WEIGHT, 1, 1),
        (f"{CALL}<answer> Warsaw or Krakow</answer>", FORMAT_WEIGHT, 1, 1),
        ("<answer></answer>", FORMAT_WEIGHT, 1, 0),
        ("<answer> Warsaw", 0.0, 0, 0),
        ("Warsaw", 0.0, 0, 0),
        ("", 0.0, 0, 0),
        ("<answer> Krakow</answer><answer> Warsaw</answer>", 0.0, 0, 0),
        ("<answer> Warsaw</answer> or so", 0.0, 0, 0),
        (f"<answer> {CALL}Warsaw</answer>", 0.0, 0, 1),
        (f"</search>{CALL}<answer> Warsaw</answer>", 0.0, 0, 1),
        # A result that no tool gave.
        ("<result> the capital is Warsaw</result>\n<answer> Warsaw</answer>", 0.0, 0, 1),
        (f"{CALL}<result> so it is Warsaw</result>\n<answer> Warsaw</answer>", 0.0, 0, 2),
    ],
)
def test_hand_made_responses(response: str, total: float, is_format: int, calls: int) -> None:
    reward = answer_reward("Warsaw", response, "answered")
    assert reward.total == pytest.approx(total)
    assert reward.components == {"format": is_format, "correct": float(total == 1), "tool_calls": calls}
    assert reward.success == (total == 1)


@pytest.mark.parametrize("finish_reason", ["eos", "length", "tool_limit"])
def test_only_a_path_that_ended_with_its_answer_counts(finish_reason: str) -> None:
    reward = answer_reward("Warsaw", "<answer> Warsaw</answer>", finish_reason)
    assert (reward.total, reward.success) == (0, False)


def test_tags_inside_a_tool_result_are_text() -> None:
    printed = "<python>print('<answer>7')</python><result><answer>7</answer></result>\n<answer> 8</answer>"
    assert not answer_reward("7", printed, "answered").success


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" The  Hague ", "hague"),
        ("N'Djamena", "ndjamena"),
        ("1,234", "1234"),
        ("Guinea-Bissau", "guineabissau"),
        ("a", ""),
        ("-1.50.", "-1.50"),
    ],
)
def test_normalized(text: str, expected: str) -> None:
    assert normalized(text) == expected


def test_a_negative_number_is_not_its_opposite() -> None:
    assert not answer_reward("25", "<answer> -25</answer>", "answered").success
