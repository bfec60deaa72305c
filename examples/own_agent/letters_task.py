"""A task as a class, for what files cannot say: task.name=letters_task:Letters"""

from aepo.agents.protocol import Task
from aepo.types import Question, Response


def count(word: str) -> int:
    """Count the letters of a word.

    Args:
        word: The word.
    """
    return len(word)


class Letters(Task):
    """How many letters have words of a length up to `longest`? (task.options.longest)"""

    tools = (count,)
    system = "Answer with a number."

    def __init__(self, longest: int = 9) -> None:
        words = ["abcdefghijklmnopqrstuvwxyz"[start : start + n] for n in range(1, longest + 1) for start in range(9)]
        questions = [Question(word, f"How many letters has {word}?", len(word)) for word in words]
        self.train = [question for i, question in enumerate(questions) if i % 5]
        self.heldout = questions[::5]

    def reward(self, question: Question, response: Response) -> float:
        return float(response.answer == str(question.answer))
