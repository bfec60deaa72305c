"""The built-in rewards on hand-made answers."""

from __future__ import annotations

from typing import Any

import pytest
from scoring_toys import response_of

from aepo.agents.rewards.builtin import BUILTIN
from aepo.types import Question


def value(name: str, answer: Any, given: str) -> float | None:
    return BUILTIN[name](Question("q", "?", answer), response_of(given))


@pytest.mark.parametrize(
    ("name", "answer", "given", "right"),
    [
        ("exact_match", "Warsaw", " the warsaw.", 1),
        ("exact_match", "Warsaw", "Krakow", 0),
        ("exact_match", ["NYC", "New York"], "new york", 1),
        ("exact_match", 7, "7", 1),
        ("exact_match", None, "7", None),
        ("exact_match", "", "7", None),
        ("exact_match", [], "7", None),
        ("math", r"\\frac{1}{2}".replace("\\\\", "\\"), "0.5", 1),
        ("math", 0.5, "1/2", 1),
        ("math", "(1,2)", "(2,1)", 0),
        ("numbers", "42", "The answer is 42 apples.", 1),
        ("numbers", 42, "$42.00", 1),
        ("numbers", "1,234", "1234", 1),
        ("numbers", "48/2 = 24. She sold 24. #### 24", "24", 1),
        ("numbers", "24", "#### 24", 1),
        ("numbers", "0.5", ".5", 1),
        ("numbers", "0.5", "1/2", 1),
        ("numbers", "-5", "\u22125", 1),
        ("numbers", "5", "-5", 0),
        ("numbers", "5", ".5", 0),
        ("numbers", "12", "1/2", 0),
        ("numbers", "34", "3+4", 0),
        ("numbers", "35", "3,5", 0),
        ("numbers", "42", "41 or 42", 0),
        ("numbers", "42", "forty-two", 0),
        ("numbers", "7", "1/0", 0),
        ("numbers", "7", "9" * 100_000, 0),
        ("numbers", "seven", "7", None),
        ("numbers", "5", "-$5", 0),
        ("numbers", "-5", "-$5", 1),
        ("numbers", "-5", r"-\$5.00", 1),
        ("numbers", "5", "- \u20ac5", 0),
        ("numbers", "16", "\u221a16", 0),
        ("numbers", "16", "16!", 0),
        ("numbers", "16", r"\sqrt{16}", 0),
        ("numbers", "16", "sqrt(16)", 0),
        ("numbers", "5", "-(5)", 0),
        ("numbers", "5", "5 million", 0),
        ("numbers", "5", "5k", 0),
        ("numbers", "5", "5M", 0),
        ("numbers", "5", "5^3", 0),
        ("numbers", "5", "5 m", 1),
        ("numbers", "5", "5 times", 1),
        ("numbers", "5", r"5\%", 1),
        ("numbers", "90", r"90^\circ", 1),
        ("numbers", "90", r"90^{\circ}", 1),
        ("numbers", "5", "x > 5", 0),
        ("numbers", "5", "not 5", 0),
        ("numbers", "5", "it isn't 5", 0),
        ("numbers", "5", "minus 5", 0),
        ("numbers", "5", "5\u00b2", 0),
        ("numbers", "5", "5\u0663x6", 0),
        ("numbers", "5", "5 and v6", 0),
        ("numbers", "5", "**5**", 1),
        ("numbers", "5", r"\boxed{5}", 1),
        ("numbers", "5", r"$x = 5$", 1),
        ("numbers", "24", "#### 1 #### 24", 0),
        *(("numbers", "5", text, 0) for text in ("5x", "5 x", "5i", "x/5", "x - 5", "5-x", "5*(x)", "(x)+5", "x+5")),
        *(("numbers", "5", text, 0) for text in ("5 fifths", "5 sevenths", "5 millionths", "twice 5", "double 5")),
        *(
            ("numbers", "5", text, 0)
            for text in ("at least 5", "at most 5", "more than 5", "less than $5", "5 or more")
        ),
        *(("numbers", "5", text, 0) for text in ("5 or more", "5...", "5\u2026", "triple 5")),
        *(("numbers", "5", text, 1) for text in ("$5/hour", "5 km/h", "5 months", "5m", "5 more than Tom", "5 a day")),
        ("exact_match", "5", "5!", 0),
        ("exact_match", "Yes", "yes!", 1),
        ("numbers", "#### 1 #### 24", "24", 1),
        ("exact_match", "O", "O-", 0),
        ("exact_match", "B", "B-", 0),
        ("exact_match", "B-", "B-.", 1),
        ("exact_match", "B-", "B\u2212", 1),
        ("exact_match", "23", "2_3", 0),
        ("exact_match", "x1", "x_1", 0),
        ("exact_match", "Warsaw", "_Warsaw_", 1),
        ("exact_match", "a cat", "a - cat", 1),
        ("choice", "B", "b", 1),
        ("choice", "b", "B", 1),
        ("choice", "B", "not B", 0),
        ("choice", "B", "It isn't B", 0),
        ("choice", "B", "B is wrong", 0),
        ("choice", "B", "(b) cat", 1),
        ("choice", "B", "(a) cat", 0),
        ("choice", "B", "b) cat", 1),
        ("choice", "B", "Answer: b", 1),
        ("choice", "B", "The correct answer is (b).", 1),
        ("choice", "B", "B) Plan A", 1),
        ("choice", "A", "B) Plan A", 0),
        ("choice", "B", "B) or A", 0),
        ("choice", "B", "B) maybe C", 0),
        ("choice", "B", "B. A", 0),
        ("choice", "B", "**B**", 1),
        ("choice", "AC", "A, C", 1),
        ("choice", "AC", "AC", 1),
        ("choice", "AC", "A", 0),
        ("choice", "A", "AC", 0),
        ("choice", "CA", "A", None),
        ("choice", None, "A", None),
        ("math", None, "7", None),
        ("choice", "B", "B", 1),
        ("choice", "B", "(b)", 1),
        ("choice", "(B)", "B) Paris", 1),
        ("choice", "B", "The answer is B, I think.", 1),
        ("choice", "A", "A", 1),
        ("choice", "A", "A is right", 1),
        ("choice", "A", "A cat", 0),
        ("choice", "A", "\\boxed{A}", 1),
        ("choice", "B", "A or B", 0),
        ("choice", "B", "Banana", 0),
        ("choice", "A, C", "C and A", 1),
        ("choice", "A, C", "A", 0),
        ("choice", "Paris", "B", None),
        ("choice", ["A", "B"], "B", 1),
    ],
)
def test_answers(name: str, answer: Any, given: str, right: float | None) -> None:
    assert value(name, answer, given) == right


@pytest.mark.parametrize("name", ["exact_match", "math", "numbers", "choice"])
def test_no_answer_is_wrong(name: str) -> None:
    answer = {"choice": "B"}.get(name, "7")
    assert BUILTIN[name](Question("q", "?", answer), response_of(answer, "length")) == 0.0


def test_the_environments_own_reward() -> None:
    question = Question("q", "?")
    assert BUILTIN["environment"](question, response_of("x", environment_reward=0.25)) == 0.25
    assert BUILTIN["environment"](question, response_of("x")) is None


def test_format_is_what_the_chat_format_says() -> None:
    question = Question("q", "?")
    assert BUILTIN["format"](question, response_of("x")) == 1.0
    assert BUILTIN["format"](question, response_of("x", "length")) == 0.0
