"""Advantages that are not TRL's own, against numbers made by hand."""

import math

import pytest
import torch

from aepo.integrations.trl.advantages import of_rewards, per_token, step_level, turns

NAN = math.nan


def test_a_completion_is_cut_where_the_model_reads():
    path = turns([9, 8], [1, 2, 70, 71, 3, 72], [1, 1, 0, 0, 1, 0])
    assert path.token_ids == (9, 8, 1, 2, 70, 71, 3, 72)
    assert path.steps == (-1, -1, 0, 0, -1, -1, 1, -1)
    assert path.anchors == ((9, 8), (70, 71))
    assert path.generated == (False, False, True, True, False, False, True, False)


def test_gigpos_steps_are_compared_where_the_same_was_read():
    """Two turns each; the first of all four begin at the prompt, the second of 0 and 2 after the same result."""
    paths = [turns([9], [1, 70, 3], [1, 0, 1]), turns([9], [1, 71, 3], [1, 0, 1])] * 2
    rewards = [1.0, 0.0, 0.0, 1.0]
    found = step_level(paths, rewards, generations=4, discount=0.5)
    # Returns of first steps are 0.5 R = .5, 0, 0, .5: mean .25, unbiased std sqrt(4 * .0625 / 3).
    first = 0.25 / math.sqrt(4 * 0.0625 / 3)
    # After 70: returns 1 and 0 of paths 0 and 2; after 71: 0 and 1 of paths 1 and 3.
    second = 0.5 / math.sqrt(0.5)
    expected = [[first, second], [-first, -second], [-first, -second], [first, second]]
    assert [value for steps in found for value in steps] == pytest.approx([v for steps in expected for v in steps])
    assert per_token(paths[0], found[0], prompt=1) == pytest.approx([first, 0.0, second])


def test_questions_are_apart_and_what_nobody_scored_takes_no_part():
    paths = [turns([9], [1], [1])] * 4
    found = step_level(paths, [1.0, 0.0, 5.0, NAN], generations=2, discount=1.0)
    assert [value for [value] in found] == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2), 0.0, 0.0])


def test_the_batch_and_a_function_of_ones_own():
    rewards = torch.tensor([3.0, 1.0, NAN, 2.0])
    assert of_rewards("batch", rewards, 2).tolist() == pytest.approx([1.0, -1.0, 0.0, 0.0])
    seen = []

    def own(given, questions):
        seen.append((given.tolist(), questions.tolist()))
        return given * 2

    assert of_rewards(own, rewards, 2).tolist() == [6.0, 2.0, 0.0, 4.0]
    assert seen == [([3.0, 1.0, 2.0], [0, 0, 1])]
    assert of_rewards(own, torch.tensor([NAN, 3.0, 1.0, 2.0]), 2).tolist() == [0.0, 6.0, 2.0, 4.0]
    assert seen[1] == ([3.0, 1.0, 2.0], [0, 1, 1])


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (None, "own must return advantages .N.; got NoneType"),
        (torch.ones(2), r"own returned shape \[2\], expected \[3\]"),
        (torch.tensor([0.0, NAN, 1.0]), "own returned nan at 1: expected finite ones"),
    ],
)
def test_what_a_function_does_wrong_is_said(returned, says):
    def own(given, questions):
        return returned

    own.__qualname__ = "own"
    with pytest.raises(ValueError, match=f"^advantage: {says}"):
        of_rewards(own, torch.arange(3.0), 1)
