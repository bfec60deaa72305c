"""The arguments of its own that a chat template reads: enable_thinking, reasoning_effort, date_string."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
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


def own_arguments(source: str, tokens: Iterable[str] = ()) -> dict[str, bool]:
    """Names that the template may look up in its arguments and is not given anyway, ascending. True: it surely does;
    False: it sets the name before it reads it. tokens: names of special tokens that the tokenizer has beside the usual
    ones. ValueError: it is no Jinja template.

    Jinja looks up a name that is set in some branches only, and whether it is ever read unset is not known.
    """
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        tree = environment.parse(source)
        looked_up = find_undeclared_variables(tree)
        first: dict[str, bool] = {}
        for name in _names(tree):
            first.setdefault(name.name, name.ctx == "load")
    except TemplateError as error:
        raise ValueError(f"the chat template cannot be parsed: line {getattr(error, 'lineno', '?')}: {error}") from None
    except RecursionError:  # rendering it would fail, too
        raise ValueError("the chat template cannot be parsed: an expression in it is nested too deeply") from None
    return {name: first.get(name, True) for name in sorted(looked_up - GIVEN - set(tokens))}


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    """In the order of execution: what is assigned comes before what it is assigned to."""
    if isinstance(node, nodes.Name) and node.ctx != "param":
        yield node
    values = _VALUES.get(type(node), ())
    for child in (*node.iter_child_nodes(only=values), *node.iter_child_nodes(exclude=values)):
        yield from _names(child)


_VALUES: dict[type[nodes.Node], tuple[str, ...]] = {nodes.Assign: ("node",), nodes.For: ("iter",)}
