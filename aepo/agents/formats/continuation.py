"""What a chat template puts after a turn with calls: its rest, the results, the beginning of the next."""

from __future__ import annotations

import re
from collections.abc import Sequence

from aepo.agents.formats.chat_template import (
    ASKED,
    RESULT,
    VALUE,
    ChatTemplate,
    TemplateRefused,
    calling,
    tool_result,
    user,
)
from aepo.agents.formats.text import TextTokenizer
from aepo.types import Message, TokenIds

MAX_SKELETONS = 512  # of the continuations kept, one per sequence of tool names
AWKWARD = 'a "b"\n{c: [d]} \\ <e>'  # what a template that escapes results would change


class Continuation:
    """Cut out of renderings of short dialogues of our own, from behind the end of the turn.

    turn_ends: texts of the tokens that end a turn. name: of a tool. ValueError: the template does not show results.
    """

    def __init__(self, template: ChatTemplate, text: TextTokenizer, turn_ends: Sequence[str], name: str) -> None:
        self._template = template
        self._text = text
        self._turn_ends = re.compile("|".join(map(re.escape, sorted(turn_ends, key=len, reverse=True))))
        self._skeletons: dict[tuple[str, ...], list[str]] = {}
        self._skeleton((name, name))
        self._copies = self._render((name,), [tool_result(0, name, AWKWARD)]) == AWKWARD.join(self._skeleton((name,)))

    def tokens(self, names: Sequence[str], results: Sequence[str]) -> TokenIds:
        """names: of the tools that were called. results: one per call, in order; they stay letters."""
        key = tuple(names)
        if self._copies and all(result == result.strip() for result in results):
            pieces = _filled(self._skeleton(key), [self._text.cut(result) for result in results])
        else:
            answers = [tool_result(n, name, text) for n, (name, text) in enumerate(zip(key, results, strict=True))]
            pieces = self._text.rendered_pieces(answers, lambda cut, _: self._render(key, cut))
        return self._text.continued(pieces)

    def _skeleton(self, names: tuple[str, ...]) -> list[str]:
        """The parts around the results. Most templates copy a result as it is: none is rendered for one then."""
        if names not in self._skeletons:
            if len(self._skeletons) >= MAX_SKELETONS:
                self._skeletons.clear()
            slots = [f"{RESULT}{n}x" for n in range(len(names))]
            text = self._render(names, [tool_result(n, name, slots[n]) for n, name in enumerate(names)])
            parts = re.split("|".join(slots), text)
            if len(parts) != len(slots) + 1:
                raise ValueError(
                    f"the chat template of {self._template.name} does not show results of tools: "
                    f"{' and '.join(map(repr, slots))} became {text!r}; set format.name=tags"
                )
            self._skeletons[names] = parts
        return self._skeletons[names]

    def _render(self, names: tuple[str, ...], answers: Sequence[Message]) -> str:
        """What follows the turn that called these tools.

        Some templates take one call per turn only: the others are left out there, and their results follow all the
        same.
        """
        try:
            return self._behind_turn([user(ASKED), calling(names), *answers])
        except TemplateRefused:
            if len(names) == 1:
                raise
            return self._behind_turn([user(ASKED), calling(names[:1]), *answers])

    def _behind_turn(self, dialogue: Sequence[Message]) -> str:
        # Everything before the results is ours, so these are the first ones, whatever the results hold.
        behind = self._template.render(dialogue, generate=True).partition(VALUE)[2]
        end = self._turn_ends.search(behind)
        if end is None:
            shown = behind.partition(RESULT)[0].rpartition(VALUE)[2]
            raise ValueError(
                f"the chat template of {self._template.name} has no token that ends a turn with a call: from there to "
                f"the result it writes {shown!r}; set format.name=tags"
            )
        return behind[end.end() :]


def _filled(skeleton: Sequence[str], results: Sequence[Sequence[str]]) -> list[str]:
    """The pieces of the text: those of a result are cut, its ends go on in what is around it."""
    pieces = [skeleton[0]]
    for parts, after in zip(results, skeleton[1:], strict=True):
        pieces[-1] += parts[0]
        pieces += parts[1:]
        pieces[-1] += after
    return pieces
