"""A reward of one's own: the right number, and no more calls than it needs."""

from aepo.types import Question, Response


def right_and_brief(question: Question, response: Response) -> float:
    """1 for the right number, less 0.1 for every call that was not needed; 0 for a wrong one."""
    if response.answer != question.answer:
        return 0.0
    calls = sum(1 for _ in response.calls)
    return 1.0 - 0.1 * max(0, calls - question.data["steps"])
