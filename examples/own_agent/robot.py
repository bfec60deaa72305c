"""An environment: a robot in the dark looks for a thing in a house and carries it into the hall.

The interface is that of TRL's environment classes; `fork` is ours, and not needed.
"""

import copy

from aepo.agents.protocol import ToolError

ROOMS = ("kitchen", "cellar", "attic")


class Robot:
    """Every public method but reset, fork and get_reward is a tool."""

    def reset(self, thing: str, house: dict[str, list[str]], **row: object) -> str:
        """thing: what to look for. house: the things in each room."""
        self.wanted = thing
        self.house = copy.deepcopy(house)  # it changes, and belongs to the row
        self.room = "hall"
        self.carried: str | None = None
        return f"You are in the hall. Rooms: {', '.join(ROOMS)}."

    def go(self, room: str) -> str:
        """Go into another room.

        Args:
            room: Its name.
        """
        if room not in (*ROOMS, "hall"):
            raise ToolError(f"There is no {room}.")
        self.room = room
        return f"You are in the {room}."

    def take(self, thing: str) -> str:
        """Feel for a thing in this room and take it.

        Args:
            thing: Its name.
        """
        if self.carried is not None:
            raise ToolError(f"You carry the {self.carried}.")
        if thing not in self.house.get(self.room, []):
            return f"There is no {thing} here."
        self.house[self.room].remove(thing)
        self.carried = thing
        return f"You carry the {thing}."

    def get_reward(self) -> float:
        """1 for the thing in the hall; a little for having found it."""
        if self.carried != self.wanted:
            return 0.0
        return 1.0 if self.room == "hall" else 0.2


class ForkingRobot(Robot):
    """Branches are made from copies of the state; with `Robot` the calls are repeated in a new house instead."""

    def fork(self) -> "ForkingRobot":
        return copy.deepcopy(self)
