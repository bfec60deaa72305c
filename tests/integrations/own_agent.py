"""What a user's own file has: a tool, an environment with the same tool, and a reward. Settings name them."""

from __future__ import annotations

from typing import Any

from aepo.types import Question, Response


def pay(coins: int) -> str:
    """Pay in.

    Args:
        coins: how many
    """
    return f"{coins} in 1"


class Account:
    """Says how many coins there are, so that a result tells which calls were made before it."""

    open = 0  # instances that have not been closed

    def __init__(self) -> None:
        self._paid: list[int] = []
        Account.open += 1

    def reset(self, **row: Any) -> None:
        self._paid = []

    def pay(self, coins: int) -> str:
        """Pay in.

        Args:
            coins: how many
        """
        self._paid.append(coins)
        return f"{sum(self._paid)} in {len(self._paid)}"

    def fork(self) -> Account:
        other = Account()
        other._paid = [*self._paid]
        return other

    def get_reward(self) -> float:
        return float(sum(self._paid))

    def close(self) -> None:
        Account.open -= 1


def as_planned(question: Question, response: Response) -> float:
    return float(response.answer == question.answer)
