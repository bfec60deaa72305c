"""How many tokens per second the rollout engine writes on the CPU, and how much of that time is the model's forward.

python -m benchmarks.rollout_engine              # two sizes of the small agent, about three minutes
python -m benchmarks.rollout_engine --quick      # half a minute

Every row writes three segments of 48 tokens and reads 30 after each but the last, 8 samples per prompt of 60 tokens.
Providers run in turn; CPU seconds are comparable also when other jobs share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from aepo.bench.clock import machine
from aepo.rollout.engine import GenerationRequest
from aepo.rollout.engines.huggingface import engine as huggingface

VOCAB, PROMPT, SEGMENT, READ, SEGMENTS, SAMPLES = 1000, 60, 48, 30, 3, 8
SIZES = {128: 64, 256: 128}  # hidden size: rows


def make_model(hidden: int) -> PreTrainedModel:
    torch.manual_seed(0)
    heads = hidden // 32
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def make_engine(model: PreTrainedModel) -> huggingface.HuggingFaceEngine:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)})))
    return huggingface.HuggingFaceEngine(model, tokenizer, eos_ids=())


def run_engine(model: PreTrainedModel, prefixes: list[tuple[int, ...]], attention: str) -> None:
    engine = make_engine(model)
    ours, huggingface.ATTENTION = huggingface.ATTENTION, attention
    for segment in range(SEGMENTS):
        requests = [GenerationRequest(p, SEGMENT, 1.0, segment * 1000 + i, ()) for i, p in enumerate(prefixes)]
        results = asyncio.run(engine.generate(requests))
        prefixes = [p + got.token_ids + tuple(range(READ)) for p, got in zip(prefixes, results, strict=True)]
    huggingface.ATTENTION = ours


def run_generate(model: PreTrainedModel, prefixes: list[tuple[int, ...]]) -> None:
    """transformers' own loop: samples alone, and every segment starts from the first token again."""
    read = torch.arange(READ).expand(len(prefixes), READ)
    tokens = torch.tensor(prefixes)
    for _ in range(SEGMENTS):
        written = model.generate(  # type: ignore[operator]
            tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0, max_new_tokens=SEGMENT,
            min_new_tokens=SEGMENT, pad_token_id=0,
        )  # fmt: skip
        tokens = torch.cat([written, read], dim=1)


def check(model: PreTrainedModel) -> None:
    """Gate: the log-probs are the model's own."""
    prompt = tuple(range(PROMPT))
    got = asyncio.run(make_engine(model).generate([GenerationRequest(prompt, SEGMENT, 1.0, 1, ())]))[0]
    tokens = torch.tensor([prompt + got.token_ids])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(tokens).logits[0, PROMPT - 1 : -1].double(), dim=-1)
    expected = logprobs.gather(1, tokens[0, PROMPT:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(got.logprobs, dtype=torch.float64), expected, rtol=0, atol=1e-4)


def forward_share(model: PreTrainedModel, run: Callable[[], None]) -> float:
    """CPU seconds inside the model / all CPU seconds of run()."""
    inside = [0.0]
    before = model.register_forward_pre_hook(lambda *_: inside.append(inside.pop() - time.process_time()))
    after = model.register_forward_hook(lambda *_: inside.append(inside.pop() + time.process_time()))
    start = time.process_time()
    run()
    before.remove()
    after.remove()
    return inside[0] / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smaller size, one round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("hidden size, rows", "provider", "tokens / CPU s", "tokens / s", "forward's share", "x generate")
    for hidden, rows in list(SIZES.items())[: 1 if args.quick else None]:
        model = make_model(hidden)
        check(model)
        draw = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, VOCAB, (rows // SAMPLES, PROMPT), generator=draw).repeat_interleave(SAMPLES, 0)
        prefixes = [tuple(prompt) for prompt in prompts.tolist()]
        providers: dict[str, Callable[[], None]] = {
            "HuggingFaceEngine": partial(run_engine, model, prefixes, huggingface.ATTENTION),
            "the same, sdpa attention": partial(run_engine, model, prefixes, "sdpa"),
            "transformers generate": partial(run_generate, model, prefixes),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in providers}
        for _ in range(1 if args.quick else 3):
            for name, run in providers.items():
                start = time.process_time(), time.perf_counter()
                run()
                times[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
        tokens = rows * SEGMENT * SEGMENTS
        medians = {
            name: [statistics.median(column) for column in zip(*pairs, strict=True)] for name, pairs in times.items()
        }
        for name, (cpu, wall) in medians.items():
            share = f"{forward_share(model, providers[name]):.0%}"
            ratio = f"{medians['transformers generate'][0] / cpu:.2f}"
            table.add_row(f"{hidden}, {rows}", name, f"{tokens / cpu:,.0f}", f"{tokens / wall:,.0f}", share, ratio)
    console = Console()
    console.print(table)
    console.print(machine("cpu"))


if __name__ == "__main__":
    main()
