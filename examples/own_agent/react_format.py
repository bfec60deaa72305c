"""A chat format of one's own, in the style of ReAct: format.name=react_format:React

Question: How many letters has abc?
Action: count[abc]
Observation: 3
Answer: 3
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from aepo.agents.formats.text import TextTokenizer
from aepo.config import FormatConfig
from aepo.models.language_model import LanguageModel
from aepo.types import Message, TokenIds, ToolCall, ToolResult, Turn

ACTION = re.compile(r"Action: (\w+)\[(.*?)\]", re.DOTALL)
ANSWER = re.compile(r"Answer: (.*?)\n")


class React:
    """One call per turn; its text goes to the first parameter of the tool."""

    name = "react"
    stop_strings = ("]", "\n")  # a call or an answer is complete

    def __init__(
        self,
        settings: FormatConfig,
        language_model: LanguageModel,
        schemas: Sequence[Mapping[str, Any]],
        *,
        tool_instructions: str | None = None,
    ) -> None:
        self.vocab_size, self.eos_ids = language_model.vocab_size, language_model.eos_ids
        self._text = TextTokenizer(language_model.tokenizer)
        functions = [schema["function"] for schema in schemas]
        self._parameters = {one["name"]: next(iter(one["parameters"]["properties"]), "") for one in functions}
        told = [f"{one['name']}: {one['description']}" for one in functions]
        self._instructions = tool_instructions or "\n".join(told)

    def prompt_tokens(self, messages: Sequence[Message]) -> TokenIds:
        said = "\n".join(message["content"] for message in messages)
        return self._text.plain_tokens(f"{self._instructions}\nQuestion: {said}\n")

    def read(self, token_ids: Sequence[int], finish_reason: Literal["stop", "eos", "length"]) -> Turn:
        text = self.decode([token for token in token_ids if token not in self.eos_ids])
        if action := ACTION.search(text):
            tool, words = action.groups()
            call = ToolCall(tool, {self._parameters.get(tool, "text"): words})
            return Turn(text, text[: action.start()], (call,))
        answer = ANSWER.search(text)
        found = answer[1] if answer else None
        return Turn(text, text, answered=True, answer=found, well_formed=answer is not None)

    def result_tokens(self, turn: Turn, results: Sequence[ToolResult]) -> TokenIds:
        return self._text.plain_tokens(f"\nObservation: {results[0].text}\n")

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._text.decode(token_ids)
