"""Houses with things in them, and demonstrations of how to find one.

python robot_data.py    # writes robot/questions.jsonl
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robot import ROOMS, Robot
from small_chat_model import Demonstration

from aepo.types import Question, ToolCall

THINGS = ["lamp", "cup", "key", "book", "rope", "coin", "bell", "brush", "candle", "apple"]

HASTY_NEXT, HASTY_TAKE, HASTY_END = 0.5, 0.7, 0.8  # chances: to look into another room, to take it, to bring it back


def invented(draw: random.Random) -> dict[str, Any]:
    """A row: two things in every room, one of them is wanted."""
    things = draw.sample(THINGS, 2 * len(ROOMS))
    house = {room: things[2 * i : 2 * i + 2] for i, room in enumerate(ROOMS)}
    thing = draw.choice(things)
    return {"prompt": f"Bring the {thing} into the hall.", "thing": thing, "house": house}


def demonstrations(seed: str, careful: bool) -> Iterator[Demonstration]:
    draw = random.Random(seed)
    while True:
        yield demonstrate(invented(draw), careful, draw)


def demonstrate(row: dict[str, Any], careful: bool, draw: random.Random) -> Demonstration:
    """Room after room until the thing is there, then back with it; a hasty robot gives up at any of these."""
    robot = Robot()
    observation = robot.reset(**row)
    calls: list[tuple[ToolCall, str]] = []

    def does(chance: float) -> bool:
        return careful or draw.random() < chance

    def call(tool: str, **arguments: str) -> None:
        calls.append((ToolCall(tool, arguments), getattr(robot, tool)(**arguments)))

    question = Question("", row["prompt"])
    for room in draw.sample(ROOMS, len(ROOMS)):
        if calls and not does(HASTY_NEXT):
            return Demonstration(question, tuple(calls), "not found", observation)
        call("go", room=room)
        if row["thing"] in robot.house[room]:
            break
    if does(HASTY_TAKE):
        call("take", thing=row["thing"])
        if does(HASTY_END):
            call("go", room="hall")
            call("put")
    return Demonstration(question, tuple(calls), "done", observation)


def write(folder: Path, seed: int = 0, count: int = 200) -> None:
    draw = random.Random(f"houses {seed}")
    rows = [invented(draw) for _ in range(count)]
    folder.mkdir(exist_ok=True)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write(Path("robot"))
