"""A small chat model that has learned to call a tool through its template: plans of one to four calls, by heart."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from aepo.agents.formats.chat import ChatTemplateFormat
from aepo.agents.tools.make import make_tools
from aepo.agents.tools.toolbox import ToolBox
from aepo.models.language_model import LanguageModel
from aepo.types import ToolResult
from tests.aepo.format_templates import CHATML, HERMES_TAGS, QWEN, tokenizer
from tests.integrations.own_agent import pay

TURN_END, TEXT_END = "<|im_end|>", "<|endoftext|>"
# How many calls the turns of a plan have. The model answers with the plan's letter.
PLANS = {"a": (2, 1), "b": (1, 1), "c": (), "d": (2, 2), "e": (3,)}
ENDS_THE_TEXT = "c"  # its answer ends with the other token
STEPS = 170

Encode = Callable[[str], list[int]]


def write_questions(path: Path) -> Path:
    rows = [
        {"prompt": f"Plan {plan}", "answer": plan, "id": plan, "kind": f"{sum(PLANS[plan])} calls"} for plan in PLANS
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def save_saver(path: Path) -> None:
    """Trained for some seconds, until it mostly follows the plans: sampling still finds other calls."""
    made = tokenizer(QWEN, CHATML, HERMES_TAGS, eos=TEXT_END, name="saver")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(made) + 3,  # padded
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,  # vLLM's reload on a CPU breaks tied ones
        eos_token_id=made.eos_token_id,
        bos_token_id=None,
    )
    language_model = LanguageModel(Qwen3ForCausalLM(config), made)
    _train(language_model)
    language_model.model.save_pretrained(path)
    made.save_pretrained(path)


def _train(saver: LanguageModel) -> None:
    schemas = ToolBox(make_tools([pay], 1.0, "tools")).schemas
    chat = ChatTemplateFormat(saver.tokenizer, saver.vocab_size, saver.eos_ids, schemas)
    encode = partial(saver.tokenizer.encode, add_special_tokens=False)
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(saver.model.parameters(), lr=5e-3)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, (step + 1) / 10) * (1 - 0.9 * step / STEPS)
        rows = [_dialogue(chat, encode, plan, draw) for plan in PLANS]
        length = max(len(tokens) for tokens, _ in rows)
        tokens = torch.tensor([row + [0] * (length - len(row)) for row, _ in rows])
        written = torch.tensor([mask + [False] * (length - len(mask)) for _, mask in rows])[:, 1:]
        hidden = saver.model.model(input_ids=tokens).last_hidden_state[:, :-1][written]
        loss = F.cross_entropy(saver.model.lm_head(hidden), tokens[:, 1:][written])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _dialogue(chat: ChatTemplateFormat, encode: Encode, plan: str, draw: random.Random) -> tuple[list[int], list[bool]]:
    """Tokens, and which of them the model writes."""
    tokens = list(chat.prompt_tokens([{"role": "user", "content": f"Plan {plan}"}]))
    written = [False] * len(tokens)

    def add(more: Sequence[int], own: bool) -> None:
        tokens.extend(more)
        written.extend([own] * len(more))

    for calls in PLANS[plan]:
        coins = [draw.randint(1, 4) for _ in range(calls)]
        text = "\n".join(f'<tool_call>\n{{"name": "pay", "arguments": {{"coins": {n}}}}}\n</tool_call>' for n in coins)
        segment = encode(text + TURN_END)
        add(segment, True)
        results = [ToolResult(f"{draw.randint(1, 20)} in {draw.randint(1, 4)}", None, 0.0) for _ in coins]
        add(chat.result_tokens(chat.read(segment, "eos"), results), False)
    end = TEXT_END if plan == ENDS_THE_TEXT else TURN_END
    add(encode(f"<answer>{plan}</answer>{end}"), True)
    return tokens, written
