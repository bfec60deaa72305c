"""Arithmetic in two steps: questions, and demonstrations with a calculator.

python calculator_data.py    # writes calculator/questions.jsonl
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from small_chat_model import Demonstration

from aepo.types import Question, ToolCall

SIGNS = {"add": "+", "subtract": "-", "multiply": "*"}
LARGEST = 99  # of all numbers: the small model knows each as a word

HASTY_FIRST, HASTY_SECOND, HASTY_ANSWER = 0.85, 0.3, 0.9  # chances of the right step


@dataclass(frozen=True)
class Step:
    tool: str
    a: int
    b: int

    @property
    def result(self) -> int:
        return {"add": self.a + self.b, "subtract": self.a - self.b, "multiply": self.a * self.b}[self.tool]

    @property
    def call(self) -> tuple[ToolCall, str]:
        return ToolCall(self.tool, {"a": self.a, "b": self.b}), str(self.result)


@dataclass(frozen=True)
class Sum:
    """(a sign b) sign c; or only a sign b."""

    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        first, *others = self.steps
        text = f"{first.a} {SIGNS[first.tool]} {first.b}"
        return f"What is ( {text} ) {SIGNS[others[0].tool]} {others[0].b} ?" if others else f"What is {text} ?"


def invented(draw: random.Random) -> Sum:
    """One of those whose numbers are all small, every way to calculate equally often."""
    tools = draw.choices(list(SIGNS), k=draw.choice([1, 2, 2]))
    while True:
        steps: list[Step] = []
        for tool in tools:
            a = steps[-1].result if steps else draw.randint(1, LARGEST)
            steps.append(Step(tool, a, draw.randint(2, 9 if tool == "multiply" else LARGEST)))
        if all(0 < step.result <= LARGEST for step in steps):
            return Sum(tuple(steps))


def demonstrations(seed: str, careful: bool) -> Iterator[Demonstration]:
    draw = random.Random(seed)
    while True:
        asked = invented(draw)
        yield demonstrate(asked, careful, draw)


def demonstrate(asked: Sum, careful: bool, draw: random.Random) -> Demonstration:
    """Up to the first mistake, and an answer after it: mostly what was read last."""
    chances = (1.0, 1.0, 1.0) if careful else (HASTY_FIRST, HASTY_SECOND, HASTY_ANSWER)
    steps = list(asked.steps)
    if draw.random() > chances[0]:
        others = [tool for tool in SIGNS if tool != steps[0].tool]
        steps = [Step(draw.choice(others), steps[0].a, steps[0].b)]
    elif len(steps) == 2 and draw.random() > chances[1]:
        steps = steps[:1]
    answer = str(steps[-1].result) if draw.random() < chances[2] else "unknown"
    return Demonstration(Question("", asked.text, ""), tuple(step.call for step in steps), answer)


def write(folder: Path, seed: int = 0, count: int = 600) -> None:
    draw = random.Random(f"questions {seed}")
    asked = list({one.text: one for one in (invented(draw) for _ in range(count))}.values())
    rows = [
        {
            "prompt": one.text,
            "answer": str(one.steps[-1].result),
            "kind": " ".join(step.tool for step in one.steps),
            "steps": len(one.steps),
        }
        for one in asked
    ]
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path("calculator"))
