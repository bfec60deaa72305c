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

HASTY_NEXT, HASTY_BACK = 0.4, 0.5  # chances: to try another room, and to come back with the thing


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
    """Room after room until the thing is there, then back with it; a hasty robot gives up at either."""
    robot = Robot()
    observation = robot.reset(**row)
    calls: list[tuple[ToolCall, str]] = []

    def call(tool: str, argument: str, value: str) -> None:
        calls.append((ToolCall(tool, {argument: value}), getattr(robot, tool)(**{argument: value})))

    for room in ROOMS:
        if calls and not (careful or draw.random() < HASTY_NEXT):
            break
        call("go", "room", room)
        call("take", "thing", row["thing"])
        if robot.carried is not None:
            if careful or draw.random() < HASTY_BACK:
                call("go", "room", "hall")
            break
    return Demonstration(Question("", row["prompt"]), tuple(calls), "done" if robot.carried else "lost", observation)


def write(folder: Path, seed: int = 0, count: int = 200) -> None:
    draw = random.Random(f"houses {seed}")
    rows = [invented(draw) for _ in range(count)]
    folder.mkdir(exist_ok=True)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write(Path("robot"))
