"""What a pretrained model is told about the task: instructions, and two dialogues about places that are in no task."""

from __future__ import annotations

from aepo.types import Message

# For models with a chat template: what they are told, and two dialogues about places that are in no task. With the same
# examples inside the system message, SmolLM2-135M-Instruct called no tool for any of 16 questions.
INSTRUCTIONS = (
    "You answer questions with two tools. <search>words</search> finds a sentence about a country. "
    "<python>code</python> runs a program. End with <answer>name or number</answer>."
)
# A line break after each call: without one, a token such as "><" closes the tag and begins the next one.
EXAMPLES = (
    (
        "What is the currency of the country whose capital is Poseidonis?",
        "<search>country with capital Poseidonis</search>\n"
        "<result> Atlantis: Poseidonis is the capital of Atlantis.</result>\n"
        "<search>currency of Atlantis</search>\n"
        "<result> Atlantis: the currency of Atlantis is the Trident.</result>\n"
        "<answer>Trident</answer>",
    ),
    (
        "How many million people live in Atlantis and Lemuria together?",
        "<search>population of Atlantis</search>\n"
        "<result> Atlantis: the population of Atlantis is 12 million.</result>\n"
        "<search>population of Lemuria</search>\n"
        "<result> Lemuria: the population of Lemuria is 30 million.</result>\n"
        "<python>print(12 + 30)</python>\n"
        "<result> 42</result>\n"
        "<answer>42</answer>",
    ),
)


def opening() -> tuple[Message, ...]:
    """The dialogue before the question."""
    dialogue: list[Message] = [{"role": "system", "content": INSTRUCTIONS}]
    for question, walk in EXAMPLES:
        dialogue += [{"role": "user", "content": question}, {"role": "assistant", "content": walk}]
    return tuple(dialogue)
