"""The arguments of its own that a chat template reads: enable_thinking, reasoning_effort, date_string."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from transformers import PreTrainedTokenizerBase

# What is given to every template, or would change how transformers renders it.
GIVEN = frozenset(
    (
        *("messages", "conversations", "raise_exception", "strftime_now"),
        *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
        *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
    )
)


class _Generation(Extension):
    """{% generation %}, a tag of transformers around what the model says."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 has it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def own_arguments(source: str, tokens: Iterable[str] = ()) -> list[str]:
    """Names that the template reads before it sets them, and is not given anyway, ascending. tokens: names of special
    tokens that the tokenizer has beside the usual ones. ValueError: it is no Jinja template.

    jinja2.meta.find_undeclared_variables would also name what is set in a branch and read in that branch only.
    """
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        tree = environment.parse(source)
    except TemplateError as error:
        raise ValueError(f"the chat template cannot be parsed: line {getattr(error, 'lineno', '?')}: {error}") from None
    return sorted(set(_read(tree, set(environment.globals))) - GIVEN - set(tokens))


def _read(node: nodes.Node, known: set[str]) -> Iterator[str]:
    """Names that are read where they are not known, in the order of execution. known: grows by those that are set."""
    if isinstance(node, nodes.Name):
        if node.ctx != "load":
            known.add(node.name)
        elif node.name not in known:
            yield node.name
        return
    if isinstance(node, nodes.Macro):
        known.add(node.name)
    within = known  # what is set in a loop or a macro is not known behind it
    if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
        within = known | {"loop", "caller", "varargs"}
    first = _BEFORE_TARGET.get(type(node).__name__, ())
    for child in node.iter_child_nodes(only=first):
        yield from _read(child, known)
    for child in node.iter_child_nodes(exclude=first):
        yield from _read(child, within)


_BEFORE_TARGET = {"Assign": ("node",), "For": ("iter",)}
