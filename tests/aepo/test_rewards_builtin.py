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


FIVE = (
    "5|5.|5.0|**5**|$5$|$5|5$|\\$5|\u20ac5|5 \u20ac|\u00a35.00|5%|5 %|5 percent|5 apples|She has 5 apples left.|"
    "She has 5 apples left, and Tom none.|5 more apples than Tom|There are 5 men.|5 boys and girls|5 of them|"
    "5 in all|5 at a time|5 a day|5 for each child|5 per box|5 is the answer|The answer is 5, I think.|5 DVDs|"
    "5 TVs|5 CDs|5 eggs|5 pens|5 red balls|5 kids|5 ice creams|5 hot dogs|5 people|5 grandchildren|5 scores|"
    "The final score is 5.|a score of 5|his score: 5|The pairs cost $5.|5. Pairs are cheaper.|5 pm|5 PM|5:|(5)|"
    "[5]|\\boxed{5}|\\text{5}|x = 5|5 km|5 kg|5kg|5 KG|5 kgs|5 lbs|5 hrs|5 hours|5 min|5 s|5 m|5m|5 mm|5 mph|"
    "5 km/h|5 miles per hour|5 sq ft|$5/hour|$5 per hour|$5 an hour|$5 a day|$5 each|$5 in total|$5 for it|"
    "$5 USD|5 USD|5 dollars|5 bucks|5 cents|5 pts|5 points|5 degrees"
)
NOT_FIVE = (
    "$5 bn|$5bn|\u20ac5 bn|5 bn|5bn|5 Bn|5 BN|$5 m|$5m|$5M|$5 mm|5 MM|\u00a35k|5m dollars|5 m\u20ac|5 mil|5 mn|5mn|"
    "5 mln|5 bln|5 trn|5 tn|5 crore|5 crores|5 cr|5 lakh|5 lakhs|5 lac|5 score|5 pairs|5 pair|5 gross|5 grand|"
    "5 milliard|5 quadrillion|5 zillion|5 **crore**|5 (crore)|5\\text{ crore}|5\\text{ bn}|5\\text{bn}|5-score|"
    "5 **pairs** of shoes|5 million dollars|5 hundred|5 thousandths|5 dozen eggs|half of 5|5 and a half|"
    "a third of 5|5\u2030|1.5e-3|5e-3|5e3|5e-x|5e|5 e-1|5E|5x|5 x|5i|5M|5 K|5k|5!|\\sqrt{5}|-5|- $5|5^2|5\\pi|5 and 6|"
    "5-6|5/6|5,6|five|x > 5|at least 5|more than 5|fewer than 5|not 5|isn't 5|minus 5|5 squared|twice 5|"
    "5 or so 6|(5) bn|$5$ bn|\\boxed{5} bn|5 \\text{MM}"
)


@pytest.mark.parametrize(
    ("given", "right"), [*((text, 1) for text in FIVE.split("|")), *((text, 0) for text in NOT_FIVE.split("|"))]
)
def test_what_says_five(given: str, right: float) -> None:
    """Things, units and prices are five; large-number words and what is done to the number make another one."""
    assert value("numbers", "5", given) == right


@pytest.mark.parametrize(
    ("answer", "given", "right"),
    [
        ("0.0015", "1.5e-3", 1),
        ("1.5e-3", "0.0015", 1),
        ("1.5E-3", "It is 0.0015.", 1),
        ("1e+5", "100000", 1),
        ("1.5e-3", "1.5", 0),
        ("5", "$5 by card", 1),
        ("1e-3x", "0.001", None),
        ("5e-x", "5", None),
        (0, "0", 1),
        (0.0, "0 apples", 1),
        (0, "5", 0),
        ([0, None, ""], "0", 1),
    ],
)
def test_exponents_and_zero(answer: Any, given: str, right: float | None) -> None:
    assert value("numbers", answer, given) == right


@pytest.mark.parametrize("name", ["exact_match", "math", "numbers"])
def test_zero_is_an_answer(name: str) -> None:
    assert value(name, 0, "0") == 1
    assert value(name, 0, "1") == 0
