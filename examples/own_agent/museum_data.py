"""An invented museum: its documents, questions about it, and demonstrations in other museums of the same words.

python museum_data.py    # writes museum/corpus.jsonl, museum/train.jsonl and museum/heldout.jsonl
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from small_chat_model import Demonstration

from aepo.agents.tools.search import SearchTool
from aepo.types import Question, ToolCall

COLOURS = ["Copper", "Silver", "Crimson", "Golden", "Green", "White", "Black", "Marble", "Wooden", "Broken"]
THINGS = ["Heron", "Lantern", "Clock", "Mask", "Harp", "Globe", "Chariot", "Comet", "Lion", "Mirror", "Compass", "Vase"]
ROOMS = ["Amber", "Cedar", "Coral", "Ebony", "Jasmine", "Linen", "Maple", "Opal", "Pearl", "Velvet"]
KEEPERS = ["Ada", "Boris", "Carla", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas"]
FLOORS = ["1", "2", "3", "4", "5", "6"]
EXHIBITS = [f"{colour} {thing}" for colour, thing in product(COLOURS, THINGS)]
HELDOUT = EXHIBITS[::4]  # questions about these are held out

HASTY_FIRST, HASTY_SECOND, HASTY_ANSWER = 0.85, 0.3, 0.9  # chances of the right step


@dataclass(frozen=True)
class Museum:
    room: dict[str, str]  # of an exhibit
    keeper: dict[str, str]  # of a room
    floor: dict[str, str]  # of a room

    def documents(self) -> list[str]:
        return [
            *(f"The {exhibit} stands in the {room} Room." for exhibit, room in self.room.items()),
            *(f"The keeper of the {room} Room is {keeper}." for room, keeper in self.keeper.items()),
            *(f"The floor of the {room} Room is {floor}." for room, floor in self.floor.items()),
        ]

    def questions(self, exhibit: str) -> dict[str, tuple[str, str]]:
        """Question and answer of each kind."""
        room = self.room[exhibit]
        return {
            "room": (f"In which room is the {exhibit}?", room),
            "keeper": (f"Who keeps the room of the {exhibit}?", self.keeper[room]),
            "floor": (f"On which floor is the room of the {exhibit}?", self.floor[room]),
        }


def museum(draw: random.Random) -> Museum:
    keepers = draw.sample(KEEPERS, len(KEEPERS))
    return Museum(
        {exhibit: draw.choice(ROOMS) for exhibit in EXHIBITS},
        dict(zip(ROOMS, keepers, strict=True)),
        {room: draw.choice(FLOORS) for room in ROOMS},
    )


def demonstrations(seed: str, careful: bool) -> Iterator[Demonstration]:
    """In a new museum every 20 questions, so that no answer of the user's museum is learned, only how to find one."""
    draw = random.Random(seed)
    while True:
        other = museum(draw)
        search = SearchTool(other.documents())
        for _ in range(20):
            yield demonstrate(other, search, careful, draw)


def demonstrate(other: Museum, search: SearchTool, careful: bool, draw: random.Random) -> Demonstration:
    """Up to the first mistake, and an answer after it."""
    exhibit, kind = draw.choice(EXHIBITS), draw.choice(["room", "keeper", "floor"])
    text, answer = other.questions(exhibit)[kind]
    room = other.room[exhibit]
    queries = [f"room of the {exhibit}"] + ([f"{kind} of the {room} Room"] if kind != "room" else [])
    chances = (1.0, 1.0, 1.0) if careful else (HASTY_FIRST, HASTY_SECOND, HASTY_ANSWER)
    if draw.random() > chances[0]:
        queries, answer = [f"{draw.choice(['keeper', 'floor'])} of the {exhibit}"], "unknown"
    elif len(queries) == 2 and draw.random() > chances[1]:
        queries, answer = queries[:1], room
    if draw.random() > chances[2]:
        answer = "unknown"
    calls = tuple((ToolCall("search", {"query": query}), search(query=query)) for query in queries)
    return Demonstration(Question("", text, answer), calls, answer)


def write(folder: Path) -> None:
    ours = museum(random.Random("ours"))
    rows = [
        {"id": f"{kind}: {exhibit}", "prompt": text, "answer": answer, "kind": kind}
        for exhibit in EXHIBITS
        for kind, (text, answer) in ours.questions(exhibit).items()
    ]
    held_out = [any(exhibit in row["id"] for exhibit in HELDOUT) for row in rows]
    folder.mkdir(exist_ok=True)
    _write(folder / "corpus.jsonl", [{"text": text} for text in ours.documents()])
    _write(folder / "train.jsonl", [row for row, held in zip(rows, held_out, strict=True) if not held])
    _write(folder / "heldout.jsonl", [row for row, held in zip(rows, held_out, strict=True) if held])


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write(Path("museum"))
