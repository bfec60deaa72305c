"""An environment: a robot looks for a thing in a house and carries it into the hall.

The interface is that of TRL's environment classes; `fork` is ours, and not needed.
"""

import copy

from aepo.agents.protocol import ToolError

ROOMS = ("kitchen", "cellar", "attic", "garden")


class Robot:
    """Every public method but reset, fork and get_reward is a tool."""

    def reset(self, thing: str, house: dict[str, list[str]], **row: object) -> str:
        """thing: what to look for. house: the things in each room."""
        self.wanted = thing
        self.house = {**copy.deepcopy(house), "hall": []}  # every path of a question gets the same row
        self.room = "hall"
        self.carried: str | None = None
        return f"You are in the hall. Rooms: {', '.join(ROOMS)}."

    def go(self, room: str) -> str:
        """Go into another room, and see what is there.

        Args:
            room: Its name.
        """
        if room not in self.house:
            raise ToolError(f"there is no {room}")
        self.room = room
        return f"You see: {', '.join(self.house[room]) or 'nothing'}."

    def take(self, thing: str) -> str:
        """Take a thing that you see.

        Args:
            thing: Its name.
        """
        if thing not in self.house[self.room]:
            raise ToolError(f"there is no {thing} here")
        if self.carried is not None:
            raise ToolError(f"you carry the {self.carried}")
        self.house[self.room].remove(thing)
        self.carried = thing
        return f"You carry the {thing}."

    def put(self) -> str:
        """Put down what you carry."""
        if self.carried is None:
            raise ToolError("you carry nothing")
        thing, self.carried = self.carried, None
        self.house[self.room].append(thing)
        return f"The {thing} is in the {self.room}."

    def get_reward(self) -> float:
        """1 where the thing is in the hall; a little for having found it."""
        if self.wanted in self.house["hall"]:
            return 1.0
        return 0.2 if self.carried == self.wanted else 0.0


class ForkingRobot(Robot):
    """Branches are made from copies of the state; with `Robot` the calls are repeated in a new house instead."""

    def fork(self) -> "ForkingRobot":
        return copy.deepcopy(self)
