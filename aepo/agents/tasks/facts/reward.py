"""The score of a path: is it well formed, and is its answer right?"""

from __future__ import annotations

from aepo.agents.rewards.text import same_text
from aepo.types import Question, Response, Reward

FORMAT_WEIGHT = 0.1  # of a well-formed path with a wrong answer; a right answer has 1


def answer_reward(question: Question, response: Response) -> Reward:
    """1 for a well-formed path with the right answer, FORMAT_WEIGHT for a wrong one, 0 for what is not well formed."""
    well_formed = response.well_formed
    correct = well_formed and same_text(response.answer or "", question.answer)
    components = {
        "format": float(well_formed),
        "correct": float(correct),
        "tool_calls": float(sum(1 for _ in response.calls)),
    }
    total = FORMAT_WEIGHT * components["format"] + (1 - FORMAT_WEIGHT) * components["correct"]
    return Reward(total, components, correct)
